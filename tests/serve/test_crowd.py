"""256 connections at once, a third of which hang up: right answers, free blocks, flat memory."""

import asyncio
import json
import random
import re
import signal
import time
from collections import Counter

import psutil
import pytest

from nanovllm import LLM, SamplingParams
from tests.serve.conftest import until
from tests.serve.test_server import server

pytestmark = pytest.mark.processes
CONNECTIONS = 256
BAD = [{"prompt": "a", "temperature": -1}, {"prompt": [10**9]}, {"prompt": "a", "n": 10**6},
       {"prompt": "a", "max_tokens": 4, "logit_bias": {"x": 1}}, {"prompt": ""}, {}]


async def send(port, method, path, body=None, hang_up=None):
    """(status, body) of a request on a connection of its own; None after `hang_up` seconds."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    content = json.dumps(body).encode() if body is not None else b""
    try:
        writer.write(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                     f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
                     .encode() + content)
        await writer.drain()
        if hang_up is not None:
            await asyncio.sleep(hang_up)
            return None
        answer = (await reader.read()).decode()
        return int(answer.split()[1]), answer.partition("\r\n\r\n")[2]
    finally:
        writer.close()


def text_of(body, stream):
    """The text of a completion; of a stream from its events (the lengths of chunks between)."""
    if not stream:
        return json.loads(body)["choices"][0]["text"]
    events = re.findall(r"^data: (\{.*\})\r?$", body, re.M)
    assert re.search(r"^data: \[DONE\]\r?$", body, re.M), body[-300:]
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


async def user(port, rng, until, answers, counts):
    """Asks, hangs up or asks badly, again and again."""
    while time.monotonic() < until:
        kind = rng.random()
        (prompt, limit), want = rng.choice(answers)
        stream = rng.random() < 0.5
        body = {"prompt": prompt, "max_tokens": limit, "temperature": 0, "stream": stream}
        if kind < 1 / 3:
            await send(port, "POST", "/v1/completions", body, hang_up=rng.random() * 2)
            counts["hung up"] += 1
            continue
        if kind < 0.4:
            status, text = await send(port, "POST", "/v1/completions", rng.choice(BAD))
            assert status == 400 and "error" in json.loads(text), (status, text)
            counts["refused"] += 1
            continue
        status, text = await send(port, "POST", "/v1/completions", body)
        if status == 429:
            counts["busy"] += 1
            await asyncio.sleep(rng.random())
            continue
        assert status == 200, (status, text)
        assert text_of(text, stream) == want, (prompt, limit)
        counts["right"] += 1


async def crowd(port, duration, answers, seed):
    counts, rng, end = Counter(), random.Random(seed), time.monotonic() + duration
    await asyncio.gather(*(user(port, random.Random(rng.random()), end, answers, counts)
                           for _ in range(CONNECTIONS)))
    return counts


def idle(port):
    """Whether /metrics says that nobody waits or runs, and no block is in use."""
    _, text = asyncio.run(send(port, "GET", "/metrics"))
    return all(re.search(rf"^vllm:{name}{{.*}} 0(\.0)?$", text, re.M)
               for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"))


@pytest.mark.slow
@pytest.mark.parametrize("duration", [8, pytest.param(300, marks=pytest.mark.long)])
def test_a_crowd(duration):
    asks = [(prompt, limit) for limit in (1, 5, 30, 90) for prompt in
            ("A block", "TTFT", "The scheduler", "Decode is", "Why is decode memory bound?")]
    with LLM(device="cpu", dtype="float32", num_kvcache_blocks=512) as llm:
        params = [SamplingParams(temperature=0, max_tokens=limit) for _, limit in asks]
        outputs = llm.generate([prompt for prompt, _ in asks], params, use_tqdm=False)
    answers = [(ask, output["text"]) for ask, output in zip(asks, outputs)]
    with server() as (process, port):
        server_process = psutil.Process(process.pid)
        files, threads = server_process.num_fds(), None
        counts = asyncio.run(crowd(port, duration / 4, answers, seed=0))
        until(lambda: idle(port), 60)
        threads, memory = server_process.num_threads(), server_process.memory_info().rss
        counts += asyncio.run(crowd(port, duration * 3 / 4, answers, seed=1))
        until(lambda: idle(port), 60)
        until(lambda: server_process.num_fds() <= files, 60)
        print(dict(counts), f"{memory / 1e6:.0f} MB, then",
              f"{server_process.memory_info().rss / 1e6:.0f}")
        assert server_process.num_threads() <= threads
        assert server_process.memory_info().rss < memory * 1.1 + 20e6
        assert min(counts[kind] for kind in ("right", "hung up", "refused")) > 20, counts
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
