"""A clock for day 4's scheduler: requests come, steps take time, and no model is needed.

`serve` runs a scheduler on requests with a time of arrival. Each step takes as long as `Cost`
says; its three numbers are fitted to steps that were measured once:

    PYTHONPATH=. python nbs/clock.py nbs/measured/steps.json      on a GPU, in two minutes
"""

import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nanovllm.engine.scheduler import ScheduledRow
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams

MEASURED = Path(__file__).resolve().parent / "measured" / "steps.json"
END = 1      # the token that ends an answer; all others are 0


@dataclass
class Cost:
    """Seconds of a step: `fixed`, and so much for each new token and each key that is read."""
    fixed: float
    token: float
    key: float

    def seconds(self, tokens: int, keys: int) -> float:
        """How long a step takes with so many new tokens, in rows with so many keys in all."""
        return self.fixed + self.token * tokens + self.key * keys

    @classmethod
    def fit(cls, steps: list[dict]) -> "Cost":
        """The cost that is off least from measured steps, each weighed by its own length."""
        rows = np.array([[1, step["tokens"], step["keys"]] for step in steps], dtype=float)
        seconds = np.array([step["ms"] for step in steps]) / 1000
        found = np.linalg.lstsq(rows / seconds[:, None], np.ones(len(steps)), rcond=None)[0]
        return cls(*found.tolist())


@dataclass
class Request:
    """What a client asks for and when; `times`: when each token came.

    output_tokens: how long its answer becomes, which nobody knows. max_tokens: what it allows.
    """
    arrival: float
    prompt_tokens: int
    output_tokens: int
    max_tokens: int = 600
    times: list[float] = field(default_factory=list)

    @property
    def ttft(self) -> float:
        """Seconds from the arrival to the first token."""
        return self.times[0] - self.arrival

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens."""
        return [b - a for a, b in zip(self.times, self.times[1:])]

    @property
    def tpot(self) -> float:
        """Mean seconds between tokens; 0 where there is one token."""
        return (self.times[-1] - self.times[0]) / max(1, len(self.times) - 1)


def workload(rate: float, count: int = 150, seed: int = 0, prompt: float = 400,
             output: float = 100) -> list[Request]:
    """Requests that come by chance, `rate` a second, most of them short and some long.

    prompt, output: the median numbers of tokens.
    """
    rng, now, requests = random.Random(seed), 0.0, []
    for _ in range(count):
        now += rng.expovariate(rate)
        requests.append(Request(
            now, min(8000, int(prompt * rng.lognormvariate(0, 1.2)) + 1),
            min(600, max(2, int(output * rng.lognormvariate(0, .7))))))
    return requests


def keys_of(batch: list[ScheduledRow]) -> int:
    """Keys that the rows of a step read: those of all their tokens so far."""
    return sum(row.seq.num_computed_tokens + row.num_new_tokens for row in batch)


def serve(scheduler, requests: list[Request], cost: Cost) -> list[Request]:
    """Run the scheduler until all is done, by the simulated clock; fills in `times`."""
    now, coming, of = 0.0, list(requests), {}
    scheduler.eos_token_ids = frozenset({END})
    while coming or not scheduler.is_finished():
        if scheduler.is_finished():
            now = max(now, coming[0].arrival)            # nothing to do until somebody comes
        while coming and coming[0].arrival <= now:
            request = coming.pop(0)
            seq = Sequence([len(of) + 2] * request.prompt_tokens,
                           SamplingParams(max_tokens=request.max_tokens))
            of[seq] = request
            scheduler.add_sequence(seq)
        batch = scheduler.schedule()
        now += cost.seconds(sum(row.num_new_tokens for row in batch), keys_of(batch))
        sampling = [of[row.seq] for row in batch if row.samples]
        for request in sampling:
            request.times.append(now)
        scheduler.postprocess(batch, [END if len(r.times) == r.output_tokens else 0
                                      for r in sampling])
    return requests


def figures(requests: list[Request], ttft: float = 1.0, gap: float = 0.2) -> dict[str, float]:
    """What the clients saw, in ms; goodput: requests a second that kept both promises.

    ttft: seconds until the first token at the most. gap: seconds between two tokens.
    """
    ms = lambda values, q: 1000 * float(np.percentile(values, q))
    first, gaps = [r.ttft for r in requests], [each for r in requests for each in r.gaps]
    took = max(r.times[-1] for r in requests) - requests[0].arrival
    kept = sum(r.ttft <= ttft and max(r.gaps, default=0) <= gap for r in requests)
    return {"ttft_p50": ms(first, 50), "ttft_p95": ms(first, 95),
            "tpot_p50": ms([r.tpot for r in requests], 50), "itl_p99": ms(gaps, 99),
            "longest": 1000 * max(gaps), "tokens_per_s": sum(len(r.times) for r in requests) / took,
            "goodput": kept / took}


PLANS = [  # (rows that decode, keys of each, new tokens of one more row, its keys before)
    *((rows, keys, 0, 0) for rows in (1, 8, 32, 64, 128, 256) for keys in (128, 512, 2048, 8192)
      if rows * keys <= 200_000),
    *((0, 0, new, before) for new in (128, 512, 2048, 8192) for before in (0, 4096)),
    *((64, 1024, new, 0) for new in (64, 192, 448, 960, 1984))]


def measure(out: Path, shape: str = "qwen3-14b") -> None:
    """How long steps of a model in this shape take on this GPU, host work included, as JSON."""
    import torch

    from bench.models import make_model_folder
    from nanovllm.config import Config
    from nanovllm.engine.model_runner import ModelRunner

    folder = make_model_folder(shape, Path(tempfile.mkdtemp(prefix="nanovllm-")))
    runner = ModelRunner(Config(str(folder), device="cuda", dtype="bfloat16", load_format="dummy",
                                max_num_seqs=256, max_model_len=16384))
    steps = []
    for rows, keys, new, before in PLANS:
        batch, free = [], iter(range(runner.num_blocks))
        for n, start in [(1, keys - 1)] * rows + [(new, before)] * (new > 0):
            seq = Sequence([i % 1000 for i in range(start + n)])
            seq.num_computed_tokens = start
            seq.block_table = [next(free) for _ in range(-(-len(seq) // runner.block_size))]
            batch.append(ScheduledRow(seq, n, samples=True))
        laps = []
        for _ in range(25):
            start = time.perf_counter()
            runner.run(batch).argmax(-1).tolist()
            laps.append(time.perf_counter() - start)
        steps.append(dict(decode_rows=rows, tokens=rows + new,
                          keys=keys_of(batch), ms=1000 * statistics.median(laps[5:])))
        print(steps[-1], flush=True)
    out.write_text(json.dumps({
        "command": "python nbs/clock.py", "model": f"{shape}, bfloat16, random weights",
        "gpu": torch.cuda.get_device_name(), "blocks": runner.num_blocks,
        "block_size": runner.block_size, "steps": steps}, indent=1) + "\n")


if __name__ == "__main__":
    measure(Path(sys.argv[1]))
