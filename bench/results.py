"""What is made of a run: what a client sees of it, medians of several, and what memory allows."""

from __future__ import annotations

import statistics

COUNTS = ("preemptions", "peak_memory_bytes", "steps", "computed_tokens", "cached_tokens",
          "peak_blocks", "peak_running", "largest_step_tokens")


def figures(requests: list[dict], result: dict) -> dict:
    """What a client sees of a run: rates a second, latencies in seconds.

    result: what `Recorder.result` made, times in seconds since the start of the run.
    """
    from nanovllm.utils.metrics import latency_figures  # brings PyTorch: not for --help
    arrived, times, wall = result["arrived"], result["times"], result["seconds"]
    output = sum(map(len, times))
    prompt = sum(len(r["prompt"]) for r, came in zip(requests, times) if came)
    cached = result.get("cached_tokens")
    return {
        "seconds": wall, "was_cut": result["was_cut"],
        "finished_requests": sum(len(t) == r["max_tokens"] for t, r in zip(times, requests)),
        "prompt_tokens": prompt, "output_tokens": output,
        "output_throughput": output / wall if wall else 0.0,
        "total_throughput": (output + prompt) / wall if wall else 0.0,
        **latency_figures(arrived, times),
        "prefix_hit_rate": None if cached is None else cached / prompt if prompt else 0.0,
        **{name: result.get(name) for name in COUNTS}}


def summarize(runs: list[dict]) -> dict:
    """Median, least and most over the runs, of every figure; {"ttft": {"p50": …}} is ttft_p50."""
    flat = []
    for run in runs:
        flat.append({})
        for name, value in run.items():
            nested = value.items() if isinstance(value, dict) else ()
            flat[-1].update({f"{name}_{part}": v for part, v in nested} or {name: value})
    out = {}
    for name in dict.fromkeys(name for run in flat for name in run):
        values = [run[name] for run in flat if run.get(name) is not None]
        out[name] = {"median": statistics.median(values), "min": min(values),
                     "max": max(values)} if values else None
    return out


def decode_floor(requests: list[dict], limits: dict) -> float | None:
    """Seconds in which no engine can be done that reads each weight once a pass; None if unknown.

    All requests together: a pass for each token of the longest, and in each pass the weights once,
    and every row's keys and values. Arithmetic and prefill cost nothing here.
    """
    if limits["weight_bytes"] is None or any(r.get("at", 1) for r in requests):
        return None  # who waits for arrivals is not bound by memory
    passes = max(r["max_tokens"] for r in requests)
    kv_reads = sum(n * len(r["prompt"]) + n * (n - 1) // 2
                   for r in requests for n in [r["max_tokens"]])
    moved = passes * limits["weight_bytes"] + kv_reads * limits["kv_bytes_per_token"]
    return moved / limits["bandwidth"]
