"""What HTTP costs: the same requests by `generate` and over a server's socket, in turns.

    python -m bench.serving                      the bundled demo model
    python -m bench.serving --model FOLDER       a checkpoint

All requests come at once, as greedy completions of token ids, each on a connection of its own. The
clients run on the same cores as the server, which is part of what is measured; so they are plain
sockets.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def server(settings: list[str], patience: float = 120):
    """The port of a server on loopback; RuntimeError with its last words if it does not start."""
    with tempfile.TemporaryFile("w+") as words:
        process = subprocess.Popen([sys.executable, "-m", "nanovllm", "serve", "--port", "0",
                                    *settings], cwd=ROOT, stdout=words, stderr=words)
        try:
            deadline = time.monotonic() + patience
            while not (found := re.search(r"running on http://[^:]+:(\d+)", said := read(words))):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the server did not start: {said[-500:]}")
                time.sleep(0.1)
            yield int(found[1])
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()


def read(file) -> str:
    """All that somebody else has written to a file."""
    file.seek(0)
    return file.read()


async def complete(port: int, prompt: list[int], max_tokens: int, stream: bool) -> float:
    """Ask for a completion and read all of it: the second at which its first token was there."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps({"prompt": prompt, "max_tokens": max_tokens, "temperature": 0,
                       "ignore_eos": True, "stream": stream}).encode()
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                 b"Content-Type: application/json\r\n"
                 b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
    status = (await reader.readline()).decode()
    if "200" not in status:
        raise RuntimeError(f"the server answers {status.strip()}")
    while stream and not (await reader.readline()).startswith(b"data:"):
        pass
    first = time.perf_counter()
    await reader.read()
    writer.close()
    return first


async def over_http(port: int, requests: list[tuple], stream: bool) -> float:
    """Seconds until all requests are answered, all of them sent at once."""
    start = time.perf_counter()
    await asyncio.gather(*(complete(port, *request, stream) for request in requests))
    return time.perf_counter() - start


def by_generate(llm, requests: list[tuple]) -> float:
    """Seconds that the library takes for them."""
    from nanovllm import SamplingParams
    start = time.perf_counter()
    llm.generate([prompt for prompt, _ in requests],
                 [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True)
                  for _, n in requests], use_tqdm=False)
    return time.perf_counter() - start


def first_token(llm, port: int, prompt: list[int]) -> tuple[float, float]:
    """Milliseconds until a lone request has its first token: by `stream`, and over HTTP."""
    from nanovllm import SamplingParams
    start = time.perf_counter()
    stream = llm.stream(prompt, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    next(stream)
    library = time.perf_counter() - start
    stream.close()
    start = time.perf_counter()
    return library * 1e3, (asyncio.run(complete(port, prompt, 4, True)) - start) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m bench.serving",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint (default: the bundled demo model)")
    parser.add_argument("--requests", type=int, default=256, metavar="N", help="default: 256")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="default: 5")
    args = parser.parse_args()
    if min(args.requests, args.runs) < 1:
        parser.error("--requests and --runs must be at least 1")
    from nanovllm import LLM
    rng = random.Random(0)
    requests = [([rng.randrange(3, 1000) for _ in range(rng.randrange(16, 128))],
                 rng.randrange(32, 128)) for _ in range(args.requests)]
    settings = ["--device", "cpu", "--num-kvcache-blocks", "4096",
                "--max-waiting", str(args.requests), *(["--model", args.model] * bool(args.model))]
    with LLM(args.model, device="cpu", num_kvcache_blocks=4096) as llm, server(settings) as port:
        ways = {"generate": lambda: by_generate(llm, requests),
                "whole answers": lambda: asyncio.run(over_http(port, requests, False)),
                "streams": lambda: asyncio.run(over_http(port, requests, True))}
        times = {name: [] for name in ways}
        for _ in range(args.runs + 1):               # the first one warms up
            for name, way in ways.items():
                times[name].append(way())
        alone = [first_token(llm, port, requests[0][0]) for _ in range(20)]
    library = times["generate"][1:]
    tokens = sum(n for _, n in requests)
    print(f"{len(requests)} requests at once, {tokens:,} tokens; medians of {args.runs} runs, "
          "shares of generate's rate in the same run (smallest to largest)")
    for name, seconds in times.items():
        shares = [before / now for before, now in zip(library, seconds[1:])]
        print(f"{name:14}{tokens / statistics.median(seconds[1:]):9,.0f} tokens/s  "
              f"{statistics.median(shares):5.0%} ({min(shares):.0%} to {max(shares):.0%})")
    print("first token of a lone request: {:.1f} ms by the library, {:.1f} ms over HTTP".format(
        *(statistics.median(column) for column in zip(*alone))))


if __name__ == "__main__":
    main()
