"""One engine in a process of its own, at bench.py's command: requests in, token times out.

It needs the standard library and the engine, nothing else, so that it can run in another Python.
Commands come as JSON on standard input, one a line; answers leave the same way. Progress is
{"progress": n}, an answer {"done": ...}, a failure {"error": "..."}.
"""

from __future__ import annotations  # a worker may be an older Python than the one that asks

import json
import os
import sys
import time
import traceback
from pathlib import Path


class Jobs:
    """What a worker can be told to do: a method for each."""

    engine = None

    def __init__(self, tell):
        self.tell = tell  # reports progress

    def probe(self, **job) -> dict:
        """What the machine and a model can do at best."""
        from bench.machine import probe
        return probe(**job)

    def bandwidth(self, device: str) -> float:
        """Bytes a second of the memory."""
        from bench.machine import measure_bandwidth
        return measure_bandwidth(device)

    def to_gguf(self, **job) -> None:
        """Write a model as a file for llama.cpp."""
        from bench.to_gguf import write_gguf
        write_gguf(**job)

    def soak(self, seconds: float, **job) -> dict:
        """Look for leaks; here, so that the memory that is watched is the engine's alone."""
        from bench.soak import Soak
        return Soak(**job).run(seconds, self.tell)

    def kill_workers(self, **job) -> float:
        """Kill workers of engines with several ranks; here, where no memory is watched."""
        from bench.soak import kill_workers
        return kill_workers(tell=self.tell, **job)

    def open(self, engine: str, device: str, **job) -> dict:
        """Load an engine."""
        from bench.engines import engine_class
        start = time.perf_counter()
        self.on_gpu = device.startswith("cuda")
        self.engine = engine_class(engine)(device=device, **job)
        return {"load_seconds": time.perf_counter() - start}

    def run(self, **job) -> dict:
        """Serve requests; on a GPU also the most memory that was allocated there meanwhile."""
        if not self.on_gpu:
            return self.engine.run(tell=self.tell, **job)
        import torch
        torch.cuda.reset_peak_memory_stats()
        result = self.engine.run(tell=self.tell, **job)
        return {**result, "peak_memory_bytes": torch.cuda.max_memory_allocated()}


def main() -> None:
    """Obey commands from standard input, one JSON object a line, until it closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def tell(**news):
        print(json.dumps(news), file=answers, flush=True)

    jobs = Jobs(tell)
    for line in sys.stdin:
        job = json.loads(line)
        try:
            tell(done=getattr(jobs, job.pop("do"))(**job))
        except Exception as error:
            traceback.print_exc()
            tell(error=f"{type(error).__name__}: {error}")
    if jobs.engine:
        jobs.engine.close()


if __name__ == "__main__":
    # this folder has files named as the libraries that they drive: look in the repository instead
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    main()
