#!/usr/bin/env python3
"""Everything that needs a GPU, in one go of less than ten minutes.

    python tools/gpu_run.py OUT                 one GPU: kernels, graphs, memory, soak, benchmarks
    python tools/gpu_run.py OUT --gpus 2        two GPUs: tensor parallelism over NCCL
    python tools/gpu_run.py OUT --only tokens   some of the stages; two such runs on two GPUs
                                                (CUDA_VISIBLE_DEVICES) do not disturb each other
    python tools/gpu_run.py OUT --dry-run       only say what would run

Each stage is a process of its own with a time limit, so that one that fails or hangs costs no
other; those that are not about speed come first and together. OUT gets results.json, a log of every
stage, and pictures. It needs PyTorch with CUDA, Triton, transformers and matplotlib; the stage
`notebooks` needs nbclient, ipykernel and fastcore too.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "nbs"), str(ROOT / "tools")]
from run_notebooks import to_ourselves  # noqa: E402

SHAPES = {  # hidden, layers, heads, kv heads, inner, tied; Qwen3 technical report, table 1
    "qwen3-0.6b": (1024, 28, 16, 8, 3072, True), "qwen3-4b": (2560, 36, 32, 8, 9728, True),
    "qwen3-14b": (5120, 40, 40, 8, 17408, False)}


def shape_folder(name: str, layers: int | None = None) -> str:
    """A temporary folder with the config.json of this shape, and no weights."""
    import transformers
    hidden, depth, heads, kv_heads, inner, tied = SHAPES[name]
    folder = tempfile.mkdtemp(prefix="nanovllm-")
    transformers.Qwen3Config(
        hidden_size=hidden, num_hidden_layers=layers or depth, num_attention_heads=heads,
        head_dim=128, num_key_value_heads=kv_heads, intermediate_size=inner, vocab_size=151_936,
        tie_word_embeddings=tied, max_position_embeddings=40_960, dtype="bfloat16",
        architectures=["Qwen3ForCausalLM"], bos_token_id=None, eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}).save_pretrained(folder)
    return folder


def bandwidth() -> float:
    """Bytes a second of a large copy on this GPU, read and written."""
    import torch
    source, target = torch.empty(2, 2**32, dtype=torch.uint8, device="cuda")
    laps = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        laps.append(start.elapsed_time(end))
    return 2 * source.nbytes / statistics.median(laps) * 1e3


def decode_seconds(llm, rows: int, prompt: int, new: int, seed: int = 0) -> float:
    """Median seconds of an engine's step in which `rows` sequences decode, host work included."""
    from nanovllm import SamplingParams
    rng = random.Random(seed)
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    for _ in range(rows):
        llm.add_request([rng.randrange(150_000) for _ in range(prompt)], params)
    laps = []
    while not llm.is_finished():
        start = time.perf_counter()
        llm.step()
        laps.append(time.perf_counter() - start)
    return statistics.median(laps[-new + 3:-2])


def environment(out: Path) -> dict:
    """What this machine is."""
    import torch
    import transformers
    import triton
    return {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count(),
            "memory_gb": torch.cuda.get_device_properties(0).total_memory / 1e9,
            "python": sys.version.split()[0], "torch": torch.__version__,
            "triton": triton.__version__, "transformers": transformers.__version__,
            "copy_gb_per_s": bandwidth() / 1e9}


SANITIZED = """
import torch
from nanovllm.layers.peers import sum_add_rms_norm
from nanovllm.layers.triton_kernels import (norm_rope_store_, one_row_linear, paged_decode,
                                            store_kvcache_triton)
from nanovllm.utils.distributed import PeerMemory
torch.manual_seed(0)
k, v = torch.randn(2, 9, 4, 64, device="cuda", dtype=torch.bfloat16)
caches = torch.zeros(2, 5, 16, 4, 64, device="cuda", dtype=torch.bfloat16)
slots = torch.tensor([3, -1, 79, 16, 17, 40, 0, 1, 2], dtype=torch.int32, device="cuda")
store_kvcache_triton(k, v, *caches, slots)
tables = torch.tensor([[4, 0, 1], [2, 0, 0], [3, 0, 0]], dtype=torch.int32, device="cuda")
lens = torch.tensor([45, 7, 0], dtype=torch.int32, device="cuda")
for parts in (1, 4):
    q = torch.randn(3, 8, 64, device="cuda", dtype=torch.bfloat16)
    out = paged_decode(q, *caches, tables, lens, .1, parts)
heads = torch.randn(9, 16, 64, device="cuda", dtype=torch.bfloat16)
cos_sin = torch.randn(9, 2, 32, device="cuda")
norm_rope_store_(heads, torch.arange(9, device="cuda"), cos_sin, torch.rand_like(heads[0, :2]),
                 1e-6, *caches, slots)
x, weight = torch.randn(1, 200, device="cuda"), torch.randn(94, 200, device="cuda")
one_row_linear(x, weight, x[0], 1e-6, gated=True)
one_row_linear(x, weight, residual=torch.zeros(1, 94, device="cuda"))
memory = torch.zeros(PeerMemory.size(2), device="cuda", dtype=torch.uint8)
peers = PeerMemory(memory, 0, [memory.data_ptr()] * 2)
peers.let_go()                                          # there is nobody to wait for
torch.cuda.synchronize()
peers.place(3, 94, torch.float32).zero_()
sum_add_rms_norm(peers, torch.ones(3, 94, device="cuda"), weight[:, 0], 1e-6)
torch.cuda.synchronize()
assert out.isfinite().all()
print("ran")
"""


def sanitizer(out: Path) -> dict:
    """compute-sanitizer's memcheck over the kernels of a decode step."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"skipped": "compute-sanitizer is not on this machine"}
    done = subprocess.run([tool, "--tool", "memcheck", "--error-exitcode", "3", sys.executable,
                           "-c", SANITIZED], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
                               "PYTHONPATH": str(ROOT)})
    print(done.stdout[-3000:], done.stderr[-3000:])
    assert done.returncode == 0 and "ran" in done.stdout, done.returncode
    return {"memcheck": [line for line in done.stdout.splitlines() if "SUMMARY" in line]}


def tokens(out: Path) -> dict:
    """In fp32: replayed against launched, every backend that works here, and transformers."""
    import torch
    from fixtures import hf_generate, make_checkpoint, random_prompts
    from nanovllm import LLM, SamplingParams
    torch.backends.cuda.matmul.allow_tf32 = False
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    report = {}
    for family, shape in (("qwen3", dict(num_attention_heads=4)),
                          ("llama", dict(num_key_value_heads=1, vocab_size=101)),
                          ("qwen3", dict(head_dim=24, tie_word_embeddings=True))):
        folder, model = make_checkpoint(family, **shape)
        prompts = random_prompts([5, 70, 33, 1, 100, 17], model.config.vocab_size)
        want = [hf_generate(model, prompt, 24) for prompt in prompts]
        for backend, eager in (("triton", False), ("triton", True), ("sdpa", True)):
            with LLM(folder, attention_backend=backend, enforce_eager=eager, kvcache_block_size=16,
                     num_kvcache_blocks=24, max_model_len=160, max_num_seqs=5,
                     max_num_batched_tokens=48) as llm:
                outs = llm.generate(prompts, params, use_tqdm=False)
                preemptions = llm.stats.preemptions
            same = sum(o["token_ids"] == w for o, w in zip(outs, want))
            name = f"{family} {shape} {backend} {'launched' if eager else 'replayed'}"
            report[name] = f"{same} of {len(want)} ({preemptions} preemptions)"
            print(name, report[name], flush=True)
            assert same == len(want), name
    return report


def sizing(out: Path) -> dict:
    """The KV cache takes what is left, also beside another process, and a run stays within it."""
    import torch
    from nanovllm import LLM, SamplingParams
    folder, report = shape_folder("qwen3-0.6b"), {}
    total = torch.cuda.mem_get_info()[1]
    holder = None
    for what in ("alone", "beside a process with 20 GB"):
        if what != "alone":
            holder = subprocess.Popen(
                [sys.executable, "-c", "import torch; x = torch.zeros(20 * 10**9, device='cuda', "
                 "dtype=torch.uint8); torch.cuda.synchronize(); print(flush=True); input()"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            holder.stdout.readline()
        free = torch.cuda.mem_get_info()[0]
        with LLM(folder, load_format="dummy", max_num_seqs=256) as llm:
            rng = random.Random(0)
            prompts = [[rng.randrange(150_000) for _ in range(1000)] for _ in range(40)]
            llm.generate(prompts, SamplingParams(temperature=.8, top_p=.9, max_tokens=8),
                         use_tqdm=False)
            left = torch.cuda.mem_get_info()[0]
            report[what] = {"blocks": llm.runner.num_blocks, "free_before_gb": free / 1e9,
                            "engine_took_gb": (free - left) / 1e9, "left_gb": left / 1e9,
                            "wanted_share": .9, "took_share": (free - left) / total}
        print(what, report[what], flush=True)
        torch.cuda.empty_cache()
    holder.communicate("\n")
    assert report["alone"]["blocks"] > report["beside a process with 20 GB"]["blocks"]
    assert report["alone"]["took_share"] < .92
    return report


def decode(out: Path) -> dict:
    """What share of the memory's limit decode reaches, and what each part of part one gives."""
    import torch
    from nanovllm import LLM
    from nanovllm.engine.model_runner import MODEL_OPTIMIZERS
    report, speed = {}, bandwidth()
    configs = {"all": {}, "no step ahead": {}, "no CUDA Graphs": dict(enforce_eager=True),
               "no Triton": dict(attention_backend="sdpa")}
    for shape, prompt, new in (("qwen3-0.6b", 512, 128), ("qwen3-4b", 512, 64)):
        hidden, layers, heads, kv_heads, *_ = SHAPES[shape]
        folder = shape_folder(shape)
        for name, settings in configs.items():
            if shape == "qwen3-4b" and name != "all":
                continue
            fuse = MODEL_OPTIMIZERS["cuda"]
            if name == "no Triton":
                MODEL_OPTIMIZERS["cuda"] = lambda model: model
            with LLM(folder, load_format="dummy", max_model_len=1024, max_num_seqs=256,
                     **settings) as llm:
                llm.runner.looks_ahead &= name != "no step ahead"
                weights = sum(p.nbytes for p in llm.runner.model.parameters())
                for rows in (1, 32, 256):
                    if name == "no Triton" and rows > 32:
                        continue       # it takes longer than all the rest together
                    seconds = decode_seconds(llm, rows, prompt, new)
                    keys = 2 * layers * kv_heads * 128 * 2 * rows * (prompt + new / 2)
                    limit = (weights + keys) / speed
                    report[f"{shape}, {rows} rows, {name}"] = {
                        "ms_per_step": seconds * 1e3, "tokens_per_s": rows / seconds,
                        "limit_ms": limit * 1e3, "share_of_limit": limit / seconds}
                    print(shape, rows, name, report[f"{shape}, {rows} rows, {name}"], flush=True)
            MODEL_OPTIMIZERS["cuda"] = fuse
            torch.cuda.empty_cache()
    return report


def bench(out: Path, name: str, *options: str) -> dict:
    """bench.py with these options; its JSON. OUT gets it too, and a picture of it."""
    file = out.resolve() / f"bench_{name}.json"
    subprocess.run([sys.executable, ROOT / "bench.py", "--device", "cuda", "--dtype", "bfloat16",
                    "--json", file, "--plot", file.with_suffix(".png"), *options],
                   cwd=ROOT, check=True)
    return json.loads(file.read_text())


def bench_small(out: Path) -> dict:
    """Day 7's GPU cell: nano-vllm's 256 requests on Qwen3-0.6B's shape, against transformers."""
    cells = run_cells(out, 7, BENCH_CELL)
    return {"output": [line for shown in cells[BENCH_CELL]["outputs"] for line in
                       shown.get("text", shown.get("data", {}).get("text/markdown", []))]}


def bench_without(out: Path) -> dict:
    """Fewer of them, with CUDA Graphs, prefix cache and Triton switched off where each matters."""
    common = ("--shape", "qwen3-0.6b", "--runs", "1", "--limit", "25", "--engines", "nanovllm")
    return {"nano-vllm": bench(out, "without_graphs", *common, "--workload", "nano-vllm",
                               "--scale", "0.2", "--config", "no graphs:enforce_eager=True",
                               "--config", "no triton:attention_backend=sdpa"),
            "shared-prefix": bench(out, "without_cache", *common, "--workload", "shared-prefix",
                                   "--scale", "0.5",
                                   "--config", "no prefix cache:enable_prefix_caching=False")}


def bench_large(out: Path) -> dict:
    """The same on Qwen3-4B's shape, against transformers."""
    return bench(out, "qwen3-4b", "--shape", "qwen3-4b", "--scale", "1", "--runs", "1", "--engines",
                 "nanovllm", "hf", "--hf-batch", "64", "--limit", "15")


def soak(out: Path) -> dict:
    """A minute of random requests, aborts and bad requests: memory and blocks."""
    return bench(out, "soak", "--soak", "0.7")


# day, ids of `#| gpu` cells that run in one process; none: all of the day
CELLS = ((3,), (4,), (6, "803aa4c2"), (6, "667ea87f"), (7, "6fc8b94b"))
TIMED_CELLS = (6, "c5b136bb", "0a28e9a9", "db5a96e4")  # with the GPU to themselves,
BENCH_CELL = "cc06add4"                                # and this one of day 7


def run_cells(out: Path, day: int, *ids: str) -> dict[str, dict]:
    """GPU cells of a day, stored in its notebook, which is copied to OUT; its cells by their ids.

    AssertionError if one fails.
    """
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "run_notebooks.py", str(day), "--flags", "gpu",
         "--only-flagged", "--keep-going", *(["--cells", *ids] if ids else [])],
        cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-6000:], done.stderr[-2000:], flush=True)
    notebook = next((ROOT / "nbs").glob(f"0{day}_*.ipynb"))
    with to_ourselves(notebook):                 # other cells of it may be running
        shutil.copy(notebook, out)
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    assert done.returncode == 0, f"day {day}: {done.stdout[-500:]}"
    return {cell["id"]: cell for cell in cells}


def notebooks(out: Path) -> dict:
    """The `#| gpu` cells that check; the notebooks with their new outputs go to OUT."""
    with ThreadPoolExecutor() as pool:
        running = {cells: pool.submit(run_cells, out, *cells) for cells in CELLS}
    failed = {" ".join(map(str, cells)): str(job.exception()) for cells, job in running.items()
              if job.exception()}
    assert not failed, failed
    return {"ran": CELLS}


def graph_cells(out: Path) -> dict:
    """Day 6's `#| gpu` cells about graphs, which measure times."""
    cells = run_cells(out, *TIMED_CELLS)
    for name in TIMED_CELLS[1:]:
        for shown in cells[name]["outputs"]:
            if picture := shown.get("data", {}).get("image/png"):
                (out / f"day6_{name}.png").write_bytes(base64.b64decode(picture))
    return {"ran": TIMED_CELLS}


def tp_tokens(out: Path) -> dict:
    """Two ranks against one and transformers in fp32; pools of equal size on both ranks."""
    import torch
    from fixtures import hf_generate, make_checkpoint, random_prompts
    from nanovllm import LLM, SamplingParams
    params, report = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True), {}
    for shape in (dict(num_key_value_heads=2),
                  dict(num_key_value_heads=1, vocab_size=101, tie_word_embeddings=True)):
        folder, model = make_checkpoint(num_attention_heads=4, **shape)
        prompts = random_prompts([5, 9, 33, 17], model.config.vocab_size)
        want = [hf_generate(model, prompt, 16) for prompt in prompts]
        for size, eager in ((1, False), (2, False), (2, True)):
            start = time.perf_counter()
            with LLM(folder, tensor_parallel_size=size, enforce_eager=eager, max_model_len=128,
                     num_kvcache_blocks=5, kvcache_block_size=16, max_num_seqs=4) as llm:
                outs = llm.generate(prompts, params, use_tqdm=False)
                preemptions = llm.stats.preemptions
            same = sum(o["token_ids"] == w for o, w in zip(outs, want))
            name = f"{shape}, {size} rank(s), {'launched' if eager else 'replayed'}"
            report[name] = f"{same} of {len(want)} ({preemptions} preemptions)"
            print(name, report[name], f"{time.perf_counter() - start:.1f} s", flush=True)
            assert same == len(want), name
    assert not torch.cuda.is_available() or torch.cuda.device_count() >= 2
    return report


def tp_logprobs(out: Path) -> dict:
    """Qwen3-4B's shape: how far log-probabilities in bf16 are from fp32, on one rank and on two."""
    import torch
    import transformers
    from nanovllm import LLM, SamplingParams
    folder = shape_folder("qwen3-4b")
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = transformers.Qwen3ForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    generator = torch.Generator("cuda").manual_seed(0)
    for name, weight in model.named_parameters():  # at the usual 0.02 most mistakes do not show
        mean, std = (1.0, 0.3) if "norm" in name else (0.0, 1.8 * config.hidden_size**-0.5)
        weight.data.normal_(mean, std, generator=generator)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    rng = random.Random(0)
    prompts = [[rng.randrange(150_000) for _ in range(64)] for _ in range(4)]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    found = {}
    for name, settings in {"fp32": dict(dtype="float32"), "one": {},
                           "two": dict(tensor_parallel_size=2)}.items():
        with LLM(folder, max_model_len=128, num_kvcache_blocks=64, max_num_seqs=4,
                 **settings) as llm:
            outs = llm.generate(prompts, params, use_tqdm=False)
        found[name] = [[entry[token] for entry, token in zip(o["prompt_logprobs"][1:],
                                                             o["prompt_token_ids"][1:])]
                       for o in outs]
        torch.cuda.empty_cache()
    def off(a: str, b: str) -> float:
        """Root mean square of the differences."""
        return statistics.fmean((x - y)**2 for p, q in zip(found[a], found[b])
                                for x, y in zip(p, q))**.5
    report = {"one rank, off from fp32": off("one", "fp32"),
              "two ranks, off from fp32": off("two", "fp32")}
    print(report)
    assert report["two ranks, off from fp32"] < 1.5 * report["one rank, off from fp32"], report
    return report


def trace(llm, path: Path, title: str) -> float:
    """The share of a decode step that sums over ranks take, drawn; on the GPU of rank 0."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import torch
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as prof:
        for _ in range(3):
            llm.step()
    cuda = torch.autograd.DeviceType.CUDA
    events = [(e.time_range.start, e.time_range.elapsed_us(),
               any(word in e.name.lower() for word in ("nccl", "sum_add_rms_norm")))
              for e in prof.events() if e.device_type == cuda and "gpu_user" not in e.name]
    start, end = min(e[0] for e in events), max(e[0] + e[1] for e in events)
    talk = sum(length for _, length, is_talk in events if is_talk)
    work = sum(length for _, length, is_talk in events if not is_talk)
    fig, ax = plt.subplots(figsize=(8.4, 1.8), layout="constrained")
    for is_talk, color, label in ((False, "#3b78b5", "compute"),
                                  (True, "#e08a2c", "sums over ranks")):
        ax.broken_barh([(s - start, n) for s, n, t in events if t is is_talk], (0, 1), color=color,
                       label=label)
    middle = (start + end) / 2 - start
    ax.set(yticks=[], xlabel="microseconds", title=title,
           xlim=(middle, middle + (end - start) / 60))
    ax.legend(loc="upper right", ncols=2)
    fig.savefig(path, dpi=100)
    return talk / (talk + work)


def tp_speed(out: Path) -> dict:
    """Time per step with one and two GPUs; the share of the sums over ranks; a worker killed."""
    import torch
    from nanovllm import LLM, SamplingParams
    report, rng, before = {}, random.Random(1), memory_in_use()
    for shape in ("qwen3-14b", "qwen3-4b"):
        folder = shape_folder(shape)
        for size in (2, 1):
            start = time.perf_counter()
            llm = LLM(folder, load_format="dummy", tensor_parallel_size=size, max_model_len=1024,
                      max_num_seqs=256)
            report[f"{shape}, {size} GPU(s)"] = {"blocks": llm.runner.num_blocks,
                                                 "start_s": time.perf_counter() - start}
            for rows in (1, 32, 256):
                seconds = decode_seconds(llm, rows, 256, 40)
                report[f"{shape}, {size} GPU(s), {rows} rows"] = {
                    "ms_per_step": seconds * 1e3, "tokens_per_s": rows / seconds}
                print(shape, size, rows, f"{seconds * 1e3:.2f} ms", flush=True)
                if size == 2 and rows in (1, 256):
                    few = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
                    for _ in range(rows):
                        llm.add_request([rng.randrange(150_000) for _ in range(256)], few)
                    for _ in range(6):
                        llm.step()
                    share = trace(llm, out / f"trace_{shape}_{rows}.png",
                                  f"{shape}, two GPUs, {rows} row(s): a piece of a decode step")
                    report[f"{shape}, {rows} rows: share of sums"] = share
                    print("  sums over ranks", f"{share:.0%}", flush=True)
                    while not llm.is_finished():
                        llm.step()
            if size == 2 and shape == "qwen3-4b":
                report["worker killed"] = kill_worker(llm, before)
            start = time.perf_counter()
            llm.close()
            report[f"{shape}, {size} GPU(s)"]["close_s"] = time.perf_counter() - start
            del llm
            torch.cuda.empty_cache()
            (out / "tp_speed_partial.json").write_text(json.dumps(report, indent=1))
    return report


def memory_in_use() -> list[int]:
    """MiB in use on each GPU, whoever uses them."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return [int(n) for n in subprocess.run(query, capture_output=True, text=True).stdout.split()]


def kill_worker(llm, before: list[int]) -> dict:
    """A worker killed in the middle of decoding: seconds until rank 0 says so, and what stays.

    before: memory in use on each GPU before the engine was made.
    """
    from nanovllm import SamplingParams
    worker = llm.runner.workers.processes[1]
    for _ in range(8):
        llm.add_request([5] * 64, SamplingParams(temperature=0, max_tokens=900, ignore_eos=True))
    for _ in range(5):
        llm.step()
    killed = []
    def kill():
        killed.append(time.perf_counter())
        os.kill(worker.pid, signal.SIGKILL)
    threading.Timer(.5, kill).start()
    try:
        while not llm.is_finished():
            llm.step()
    except RuntimeError as error:
        seconds, message = time.perf_counter() - killed[0], str(error)
    print("killed:", f"{seconds:.2f} s", message, flush=True)
    assert seconds < 10 and "rank 1 ended" in message
    llm.close()
    time.sleep(1)
    after, alive = memory_in_use(), worker.poll() is None
    print("MiB in use before and after:", before, after, flush=True)
    assert not alive and after[1] < before[1] + 600  # rank 0 itself may hold a context there
    return {"seconds": seconds, "message": message, "mib_before": before, "mib_after": after}


TORCHRUN = """
import faulthandler
import sys
faulthandler.dump_traceback_later(80, exit=True)  # a rank that hangs says where
sys.path[:0] = [{root!r}, {nbs!r}]
from nanovllm import LLM, SamplingParams
greedy = SamplingParams(temperature=0, max_tokens=16)
with LLM({folder!r}, tensor_parallel_size=2, num_kvcache_blocks=16, max_model_len=64,
         max_num_seqs=4) as llm:
    outs = llm.generate([[1, 2, 3], [7] * 20], greedy, use_tqdm=False)
    print("tokens", [o["token_ids"] for o in outs])
"""


def tp_torchrun(out: Path) -> dict:
    """The same script under torchrun, two ranks on this host."""
    from fixtures import hf_generate, make_checkpoint
    folder, model = make_checkpoint(num_attention_heads=4)
    want = [hf_generate(model, prompt, 16) for prompt in ([1, 2, 3], [7] * 20)]
    script = Path(tempfile.mkdtemp()) / "script.py"
    script.write_text(TORCHRUN.format(root=str(ROOT), nbs=str(ROOT / "nbs"), folder=str(folder)))
    # an address in place of --standalone, which asks for the host's name: not every machine has one
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr",
         "127.0.0.1", "--master-port", "29517", str(script)], capture_output=True, text=True,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"})
    print(done.stdout, done.stderr[-3000:])
    assert f"tokens {want}" in done.stdout
    return {"same tokens": True, "exit code": done.returncode}


STAGES = {  # GPUs -> stage -> (function, seconds that it may take, on a machine that starts cold)
    1: {"environment": (environment, 60), "tokens": (tokens, 90), "decode": (decode, 150),
        "sanitizer": (sanitizer, 60), "sizing": (sizing, 90), "soak": (soak, 100),
        "notebooks": (notebooks, 240), "graph_cells": (graph_cells, 120),
        "bench_small": (bench_small, 180),
        "bench_large": (bench_large, 160), "bench_without": (bench_without, 200)},
    2: {"environment": (environment, 60), "tp_tokens": (tp_tokens, 130),
        "tp_speed": (tp_speed, 220), "tp_torchrun": (tp_torchrun, 120),
        "tp_logprobs": (tp_logprobs, 150)}}
# They say what is right. Where cells among them print times, those are of a busy machine.
TOGETHER = ("tokens", "sanitizer", "soak", "notebooks")
RUNNING: list[subprocess.Popen] = []


def run_stage(out: Path, name: str, seconds: float) -> dict:
    """The stage in a process of its own; its result, or why there is none."""
    start = time.perf_counter()
    command = [sys.executable, __file__, str(out), "--stage", name]
    with open(out / f"{name}.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT,
                                   env={**os.environ, "PYTHONUNBUFFERED": "1"},
                                   start_new_session=True)
        RUNNING.append(process)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            status = f"cut after {seconds:.0f} s"
    file = out / f"{name}.result"
    result = {"status": status, "seconds": round(time.perf_counter() - start, 1)}
    if file.exists():
        result["result"] = json.loads(file.read_text())
        file.unlink()
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for results, logs and pictures")
    parser.add_argument("--gpus", type=int, default=1, choices=STAGES, help="default: 1")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="some of the stages")
    parser.add_argument("--limit", type=float, default=570, metavar="S", help="seconds in all")
    parser.add_argument("--dry-run", action="store_true", help="only list the stages")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    args = parser.parse_args()
    everything = {name: stage for stages in STAGES.values() for name, stage in stages.items()}
    if args.stage:
        result = everything[args.stage][0](args.out)
        (args.out / f"{args.stage}.result").write_text(json.dumps(result))
        return 0
    chosen = args.only or list(STAGES[args.gpus])
    if unknown := set(chosen) - set(everything):
        parser.error(f"no such stage: {', '.join(sorted(unknown))} "
                     f"(there are: {', '.join(everything)})")
    for name in chosen:
        function, seconds = everything[name]
        print(f"{name:12} up to {seconds:3} s: {function.__doc__.splitlines()[0]}")
    if args.dry_run:
        return 0
    import torch
    if torch.cuda.device_count() < args.gpus:
        parser.error(f"--gpus {args.gpus}: this machine has {torch.cuda.device_count()} GPU(s) "
                     "that PyTorch can use")
    args.out.mkdir(parents=True, exist_ok=True)
    deadline, results, lock = time.perf_counter() + args.limit, {}, threading.Lock()

    def run(name: str) -> None:
        left = deadline - time.perf_counter()
        result = {"status": "no time left"}
        if left > 15:
            result = run_stage(args.out, name, min(everything[name][1], left))
        with lock:
            results[name] = result
            (args.out / "results.json").write_text(json.dumps(results, indent=1))
            print(f"{name:12} {result['status']} {result.get('seconds', '')}", flush=True)
            if result["status"] and (log := args.out / f"{name}.log").exists():
                print(log.read_text()[-700:], flush=True)

    try:
        list(ThreadPoolExecutor().map(run, [name for name in chosen if name in TOGETHER]))
        for name in chosen:
            if name not in TOGETHER:
                run(name)
    finally:                                     # after Ctrl-C nothing stays on the GPU
        for process in RUNNING:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    failed = [name for name, result in results.items() if result["status"]]
    print(f"{len(results) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
