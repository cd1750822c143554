"""Each feature of this engine switched off in turn, on the workload where it matters."""

from __future__ import annotations

from bench.compare import Bench
from bench.models import Model
from bench.options import engine_list
from bench.report import print_ablation
from bench.workloads import longest_request, make_workload


def ablations(device: str, scale: float, rows: int) -> list[dict]:
    """What is switched off, and how: the engine's settings with and without each feature.

    figures: what to look at, counts first. Contiguous reservation is paging with blocks as long as
    the longest request allowed: then each request takes one, however short it turns out to be.
    """
    block = 16 if device == "cpu" else 256  # what every backend there takes, powers of two as well
    most = 4 * block
    while most < 2 * 1024 * scale:
        most *= 2
    long_prompt = max(256, round(8192 * scale))
    pool = (4 if device == "cpu" else 32) * most
    same = dict(max_model_len=most, enable_prefix_caching=False)
    return [
        dict(feature="prefix cache", workload="shared-prefix", on={},
             off=dict(enable_prefix_caching=False),
             figures=["computed_tokens", "peak_blocks", "ttft_p50", "output_throughput"]),
        dict(feature="continuous batching", workload="nano-vllm", on=dict(max_num_seqs=rows),
             off=dict(max_num_seqs=rows, static_batch=rows), requests=6 * rows,
             figures=["steps", "ttft_p50", "output_throughput"]),
        dict(feature="chunked prefill", workload="long-prompt",
             on=dict(max_num_batched_tokens=max(32, long_prompt // 16)), off={},
             figures=["largest_step_tokens", "steps", "itl_max", "ttft_max"]),
        dict(feature="paging", workload="nano-vllm",
             on=dict(same, kvcache_block_size=block, num_kvcache_blocks=pool // block),
             off=dict(same, kvcache_block_size=most, num_kvcache_blocks=pool // most),
             figures=["peak_running", "steps", "preemptions", "output_throughput"]),
        dict(feature="CUDA Graphs", workload="decode", on={}, off=dict(enforce_eager=True),
             figures=["tpot_p50", "output_throughput"], needs="a GPU"),
        dict(feature="tensor parallelism 2", workload="decode", on=dict(tensor_parallel_size=2),
             off={}, figures=["steps", "tpot_p50", "output_throughput"], needs="two devices"),
    ]


def is_possible(case: dict, device: str) -> bool:
    """Whether this machine has what a case needs; two processes on a CPU count as two devices."""
    if device == "cpu":
        return case.get("needs") != "a GPU"
    import torch
    return case.get("needs") != "two devices" or torch.cuda.device_count() > 1


def ablate(args, model: Model) -> list[dict]:
    """Measure and print every ablation that this machine can; the records, each with its case."""
    records = []
    _, common = engine_list(args).get("nanovllm", ("nanovllm", {}))
    for case in ablations(args.device, args.scale, args.rows):
        if not is_possible(case, args.device):
            print(f"\n{case['feature']}: needs {case['needs']}, not measured here")
            continue
        engines = {"with": ("nanovllm", {**common, **case["on"]}),
                   "without": ("nanovllm", {**common, **case["off"]})}
        requests = args.requests[0] if args.requests else case.get("requests")
        most = longest_request(make_workload(case["workload"], args.scale, args.seed,
                                             requests=requests))
        with Bench(args, model, engines, most + 1) as bench:
            record = bench.run(case["workload"], args.scale, requests)
        records.append({**record, "ablation": case})
        print_ablation(records[-1], args.markdown)
    return records
