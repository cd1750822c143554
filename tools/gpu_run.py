#!/usr/bin/env python3
"""Everything that needs a GPU, in one go of less than ten minutes.

    python tools/gpu_run.py OUT                  one GPU: tests, notebooks, measurements
    python tools/gpu_run.py OUT --gpus 2         two GPUs: tensor parallelism
    python tools/gpu_run.py OUT --only decode    some of the stages
    python tools/gpu_run.py OUT --dry-run        only say what would run

Each stage is a process of its own with a time limit; those that are not about speed run together,
first. OUT gets results.json, a log of every stage, what was measured, and the notebooks with new
outputs. It needs PyTorch with CUDA, Triton, transformers, pytest and matplotlib; the notebooks need
nbclient, ipykernel and fastcore too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = "-m pytest -q -ra -p no:cacheprovider"
BENCH = "bench.py --device cuda --dtype bfloat16 --runs 1 --quiet --json OUT/{0}.json"
CELLS = "-m tools.run_notebooks {0} --flags gpu --only-flagged --keep-going"
STAGES = {  # GPUs -> stage -> (arguments for Python, seconds that it may take, runs with others)
    1: {"tokens": (f"{TESTS} tests/gpu/test_tokens.py", 200, True),
        "kernels": (f"{TESTS} tests/gpu/test_kernels.py", 200, True),
        "sampling": (f"{TESTS} tests/gpu/test_sampling.py", 200, True),
        "requests": (f"{TESTS} tests/gpu/test_requests.py", 200, True),
        **{f"notebook_{name}": (CELLS.format(name), 240, True) for name in ("3", "4")},
        "memory": (f"{TESTS} tests/gpu/test_memory.py", 150, False),
        **{f"notebook_{name}": (CELLS.format(name), 240, False)       # they measure times
           for name in ("6", "7", "B")},
        "decode": ("-m bench.gpu decode OUT/decode.json", 200, False),
        "sampled": ("-m bench.gpu sampled OUT/sampled.json", 200, False),
        "against_hf": (BENCH.format("against_hf") + " --shape qwen3-0.6b --scale 1 --engines "
                       "nanovllm hf --hf-batch 64 --limit 30", 160, False)},
    2: {"tests": (f"{TESTS} tests/gpu/test_parallel.py", 300, False),
        "parallel": ("-m bench.gpu parallel OUT/parallel.json", 260, False)}}


def run_stage(out: Path, name: str, arguments: str, seconds: float) -> dict:
    """Its exit status, or why it has none, and how long it took. Its words go to OUT/name.log."""
    command = [sys.executable, *arguments.replace("OUT", str(out)).split()]
    paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(paths)}
    start = time.perf_counter()
    with open(out / f"{name}.log", "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log,
                                   stderr=log, env=env, start_new_session=True)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = f"cut after {seconds:.0f} s"
        finally:                                 # after Ctrl-C too nothing stays on the GPU
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return {"status": status, "seconds": round(time.perf_counter() - start, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=lambda text: Path(text).resolve(), metavar="OUT")
    parser.add_argument("--gpus", type=int, default=1, choices=STAGES, help="default: 1")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="some of the stages")
    parser.add_argument("--limit", type=float, default=570, metavar="S", help="seconds in all")
    parser.add_argument("--dry-run", action="store_true", help="only list the stages")
    args = parser.parse_args()
    stages, results = STAGES[args.gpus], {}
    chosen = args.only or list(stages)
    if unknown := set(chosen) - set(stages):
        parser.error(f"no such stage: {', '.join(sorted(unknown))} "
                     f"(there are: {', '.join(stages)})")
    for name in chosen:
        print(f"{name:12} up to {stages[name][1]:3} s: {stages[name][0]}")
    if args.dry_run:
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = time.perf_counter() + args.limit

    def run(name: str) -> None:
        arguments, seconds, _ = stages[name]
        left = min(seconds, deadline - time.perf_counter())
        result = results[name] = ({"status": "no time left"} if left < 15 else
                                  run_stage(args.out, name, arguments, left))
        (args.out / "results.json").write_text(json.dumps(results, indent=1))
        print(f"{name:12} {result['status']} {result.get('seconds', '')}", flush=True)
        if result["status"] and (log := args.out / f"{name}.log").exists():
            print(log.read_text()[-1500:], flush=True)

    with ThreadPoolExecutor() as pool:
        list(pool.map(run, [name for name in chosen if stages[name][2]]))
    for name in chosen:
        if not stages[name][2]:
            run(name)
    for notebook in (ROOT / "nbs").rglob("*.ipynb"):
        shutil.copy(notebook, args.out)
    failed = [name for name, result in results.items() if result["status"]]
    print(f"{len(results) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
