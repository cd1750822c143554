#!/usr/bin/env python3
"""Measure this engine against others: the same token ids, in turn, several times over.

    python bench.py                                        a few minutes on two cores
    python bench.py --shape qwen3-0.6b --dtype bfloat16    one model (random weights), one workload
    python bench.py --device cuda --shape qwen3-0.6b --dtype bfloat16 --scale 1 \\
        --engines nanovllm hf --config "eager:enforce_eager=True" --hf-batch 64 --limit 120
    python bench.py --gguf Qwen3-0.6B-Q4_K_M.gguf --model Qwen3-0.6B --llama-python PATH
                                                           four bits by llama.cpp beside bf16 here

Each engine works in a process of its own, so that its memory is its own, and so that one may live
in another Python (--vllm-python, --llama-python, --nano-vllm). The engines take turns within each
run, and every run has new token ids, so that no prefix cache knows them from the run before. What
is printed are medians over the runs, with the smallest and the largest. Times are what a client
sees: from the moment a request is due to the moment its token is there.
"""

import json
import sys
from pathlib import Path

from bench.options import parse_args  # the folder beside this file
from bench.plot import draw_report
from bench.process import WorkerError
from bench.run import failures, measure


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write: the exit status."""
    args = parse_args(argv, about=__doc__)
    try:
        report = measure(args)
    except (ValueError, WorkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report = {"command": ["bench.py", *(sys.argv[1:] if argv is None else argv)], **report}
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1))
    if args.plot:
        draw_report(report).savefig(args.plot)
    return 1 if failures(report) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nstopped")
