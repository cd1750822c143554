"""What the options ask for: which models and workloads, and doing it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from bench.ablation import ablate
from bench.compare import Bench
from bench.models import Model, demo_model, gguf_model, shape_model
from bench.options import engine_list
from bench.report import print_limits, print_record
from bench.soak import run_soak
from bench.workloads import WORKLOADS, longest_request, make_workload


def measure(args) -> dict:
    """Do what the options say, and print it: a report for JSON, see failures() and plot.py.

    {"records": […]} with one for each model and workload, or {"ablations": […]}, or {"soak": {…}}.
    ValueError or WorkerError if nothing can be measured.
    """
    with tempfile.TemporaryDirectory(prefix="nanovllm-bench-") as folder:
        model = chosen_model(args, Path(folder))
        if args.soak:
            return {"soak": run_soak(args, model)}
        if args.ablate:
            return {"ablations": ablate(args, model)}
        if args.model or args.gguf or args.shape or args.workload:
            tour = [(model, args.workload or ["nano-vllm"], args.scale, args.requests or [None])]
        else:  # nothing was said: a short tour of two models
            small = shape_model("qwen3-0.6b", Path(folder), args.layers, "bfloat16")
            tour = [(model, WORKLOADS, args.scale, args.requests or [None]),
                    (small, ["nano-vllm", "decode"], args.scale / 4, [8])]
        return {"records": [record for stop in tour for record in compare(args, *stop)]}


def chosen_model(args, folder: Path) -> Model:
    """The model that is asked for; a shape's config.json is written into the folder."""
    if args.shape:
        return shape_model(args.shape, folder, args.layers, args.dtype)
    if args.gguf:
        return gguf_model(args.gguf, args.model, folder, args.dtype)
    if args.model:
        return Model(args.model, Path(args.model).name, dtype=args.dtype)
    return demo_model(args.dtype)


def compare(args, model: Model, workloads, scale: float, counts: list[int | None]) -> list[dict]:
    """A record for each workload and number of requests, printed as it is measured."""
    todo = [(name, scale, count) for name in workloads for count in counts]
    most = max(longest_request(make_workload(name, scale, args.seed, requests=count))
               for name, _, count in todo)
    records = []
    with Bench(args, model, engine_list(args), most + 1) as bench:
        print_limits(model.limits)
        for workload in todo:
            records.append(bench.run(*workload))
            print_record(records[-1], args.markdown)
    print()
    return records


def failures(report: dict) -> list[str]:
    """What went wrong in a report, a line for each engine that failed."""
    records = report.get("records", report.get("ablations", []))
    return [f"{record['workload']}, {name}: {entry['error']}" for record in records
            for name, entry in record["engines"].items() if entry["error"]]
