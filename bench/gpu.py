"""What a GPU reaches, and what each part of the engine gives there; results as JSON.

    python -m bench.gpu decode OUT.json      share of the memory's limit, without each part in turn
    python -m bench.gpu parallel OUT.json    one GPU and two: time of a step, share of the sums
    python -m bench.gpu sampled OUT.json     a step and nano-vLLM's benchmark, greedy and sampled

It takes two to four minutes. Models have random weights in the shape of Qwen3.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

from bench.machine import measure_bandwidth
from bench.models import SHAPES, make_model_folder

WITHOUT = {  # what is switched off -> settings
    "": {}, "a step ahead": dict(look_ahead=False),
    "CUDA Graphs": dict(enforce_eager=True), "fast kernels": dict(kernels="plain")}


def decode_seconds(llm, rows: int, prompt: int, new: int, seed: int = 0, **wish) -> float:
    """Median seconds of a step in which `rows` sequences decode, host work included.

    wish: fields of SamplingParams; nothing means greedy.
    """
    laps = list(decode_steps(llm, rows, prompt, new, seed, **wish))
    return statistics.median(laps[-new + 3:-2])


def decode_steps(llm, rows: int, prompt: int, new: int, seed: int = 0, **wish):
    """Seconds of each step until `rows` random prompts have `new` tokens each."""
    from nanovllm import SamplingParams
    rng = random.Random(seed)
    params = SamplingParams(**{"temperature": 0, **wish}, max_tokens=new, ignore_eos=True)
    for _ in range(rows):
        llm.add_request([rng.randrange(150_000) for _ in range(prompt)], params)
    while not llm.is_finished():
        start = time.perf_counter()
        llm.step()
        yield time.perf_counter() - start


def measure_decode(out: Path) -> dict:
    """Time of a decode step beside the time in which weights and keys can be read."""
    import torch

    from nanovllm import LLM
    report, speed = {}, measure_bandwidth("cuda")
    for shape, prompt, new in (("qwen3-0.6b", 512, 128), ("qwen3-4b", 512, 64)):
        config = SHAPES[shape]
        folder = make_model_folder(shape, Path(tempfile.mkdtemp(prefix="nanovllm-")))
        token = 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
        for what, settings in WITHOUT.items() if shape == "qwen3-0.6b" else [("", {})]:
            with LLM(str(folder), device="cuda", load_format="dummy", max_model_len=1024,
                     max_num_seqs=256, **settings) as llm:
                weights = sum(p.nbytes for p in llm.runner.model.parameters())
                for rows in (1, 32) if what == "fast kernels" else (1, 32, 256):
                    seconds = decode_seconds(llm, rows, prompt, new)
                    limit = (weights + token * rows * (prompt + new / 2)) / speed
                    name = f"{shape}, {rows} rows" + (f", without {what}" if what else "")
                    report[name] = {"ms_per_step": seconds * 1e3, "tokens_per_s": rows / seconds,
                                    "limit_ms": limit * 1e3, "share_of_limit": limit / seconds}
                    print(name, report[name], flush=True)
            torch.cuda.empty_cache()
    return {"bytes_per_s": speed, **report}


WISHES = {"greedy": {}, "temperature 0.6": dict(temperature=.6),
          "temperature 0.6, top-k 20, top-p 0.95": dict(temperature=.6, top_k=20, top_p=.95),
          "temperature 0.6, a seed": dict(temperature=.6, seed=7)}


def measure_sampled(out: Path) -> dict:
    """A decode step and nano-vLLM's benchmark with several wishes; tokens/s of each call."""
    from bench.workloads import make_workload
    from nanovllm import LLM, SamplingParams
    report = {}
    folder = make_model_folder("qwen3-0.6b", Path(tempfile.mkdtemp(prefix="nanovllm-")))
    start = time.perf_counter()
    with LLM(str(folder), device="cuda", load_format="dummy", max_num_seqs=256) as llm:
        report["start_s"] = time.perf_counter() - start
        print("start", report["start_s"], flush=True)

        def workload(run: int, wish: dict) -> float:
            todo = make_workload("nano-vllm", 1.0, run=run)
            params = [SamplingParams(**{"temperature": 0, **wish}, max_tokens=r["max_tokens"],
                                     ignore_eos=True) for r in todo]
            began = time.perf_counter()
            llm.generate([r["prompt"] for r in todo], params, use_tqdm=False)
            return sum(r["max_tokens"] for r in todo) / (time.perf_counter() - began)

        names = ["temperature 0.6", "temperature 0.6, top-k 20, top-p 0.95", "greedy"]
        for run, name in enumerate([names[0], *names, *names]):     # the first of the process once
            rate = workload(run, WISHES[name])
            report.setdefault(f"nano-vllm, {name}, tokens/s", []).append(rate)
            print("nano-vllm", name, round(rate), flush=True)
        for rows in (1, 8, 32, 128, 256):
            for name, wish in WISHES.items():
                ms = 1e3 * decode_seconds(llm, rows, 512, 64, **wish)
                report[f"{rows} rows, {name}, ms"] = ms
                print(rows, "rows", name, f"{ms:.3f} ms", flush=True)
    return report


def measure_parallel(out: Path) -> dict:
    """Time of a decode step on one GPU and on two; what share of it the sums over ranks are."""
    import torch

    from nanovllm import LLM
    report = {}
    for shape in ("qwen3-14b", "qwen3-4b"):
        folder = make_model_folder(shape, Path(tempfile.mkdtemp(prefix="nanovllm-")))
        for size in (2, 1):
            start = time.perf_counter()
            with LLM(str(folder), device="cuda", load_format="dummy", tensor_parallel_size=size,
                     max_model_len=1024, max_num_seqs=256) as llm:
                name = f"{shape}, {size} GPU(s)"
                report[name] = {"blocks": llm.runner.num_blocks,
                                "start_s": time.perf_counter() - start}
                for rows in (1, 32, 256):
                    seconds = decode_seconds(llm, rows, 256, 40)
                    found = {"ms_per_step": seconds * 1e3, "tokens_per_s": rows / seconds}
                    if size == 2 and rows != 32:
                        found["share_of_sums"] = trace(
                            llm, rows, out.with_name(f"trace_{shape}_{rows}.png"),
                            f"{shape}, two GPUs, {rows} row(s): a piece of a decode step")
                    report[f"{name}, {rows} rows"] = found
                    print(name, rows, found, flush=True)
            out.write_text(json.dumps(report, indent=1))      # if the time ends here
            torch.cuda.empty_cache()
    return report


def trace(llm, rows: int, picture: Path, title: str) -> float:
    """The share of a decode step that sums over ranks take, drawn; on the GPU of rank 0."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    steps = decode_steps(llm, rows, 256, 12, seed=1)
    for _ in range(6):
        next(steps)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as prof:
        for _ in range(3):
            next(steps)
    for _ in steps:
        pass
    cuda = torch.autograd.DeviceType.CUDA
    events = [(e.time_range.start, e.time_range.elapsed_us(),
               any(word in e.name.lower() for word in ("nccl", "sum_add_rms_norm")))
              for e in prof.events() if e.device_type == cuda and "gpu_user" not in e.name]
    draw_trace(events, picture, title)
    talk = sum(length for _, length, is_talk in events if is_talk)
    return talk / sum(length for _, length, _ in events)


def draw_trace(events: list[tuple[float, float, bool]], picture: Path, title: str) -> None:
    """A sixtieth of the time, with what computes and what adds up; nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    start, end = min(e[0] for e in events), max(e[0] + e[1] for e in events)
    fig, ax = plt.subplots(figsize=(8.4, 1.8), layout="constrained")
    for is_talk, color, label in ((False, "#3b78b5", "compute"),
                                  (True, "#e08a2c", "sums over ranks")):
        ax.broken_barh([(s - start, n) for s, n, t in events if t is is_talk], (0, 1), color=color,
                       label=label)
    middle = (start + end) / 2 - start
    ax.set(yticks=[], xlabel="microseconds", title=title,
           xlim=(middle, middle + (end - start) / 60))
    ax.legend(loc="upper right", ncols=2)
    fig.savefig(picture, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    what = {"decode": measure_decode, "parallel": measure_parallel, "sampled": measure_sampled}
    parser.add_argument("what", choices=what)
    parser.add_argument("out", type=Path, metavar="OUT.json")
    args = parser.parse_args()
    args.out.write_text(json.dumps(what[args.what](args.out), indent=1))


if __name__ == "__main__":
    main()
