"""The machine: how fast its memory is, how much of it a process holds, and what a model needs."""

from __future__ import annotations

import contextlib
import platform
import sys
import time
from pathlib import Path


class PeakMemory:
    """The most memory that a process and its children held since `restart`.

    Linux keeps a high-water mark for every process. Elsewhere it is what they hold when asked.
    """

    def __init__(self, pid: int):
        import psutil  # not in every Python that a worker runs in
        self.process = psutil.Process(pid)

    def _family(self) -> list:
        return [self.process, *self.process.children(recursive=True)]

    def restart(self) -> None:
        """Set the marks to what is held now."""
        for process in self._family():
            with contextlib.suppress(OSError):
                Path(f"/proc/{process.pid}/clear_refs").write_text("5")

    def peak(self) -> int:
        """Bytes that were resident, all processes together."""
        return sum(map(_high_water, self._family()))


def _high_water(process) -> int:
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except OSError:     # no Linux
        return process.memory_info().rss
    except IndexError:  # it has just ended
        return 0


def memory_now(device: str) -> dict:
    """Bytes that this process holds now: resident, and on the GPU as PyTorch counts them."""
    import psutil
    now = {"rss": psutil.Process().memory_info().rss}
    if device.startswith("cuda"):
        import torch
        stats = torch.cuda.memory_stats()
        now.update(gpu_allocated=stats["allocated_bytes.all.current"],
                   gpu_reserved=stats["reserved_bytes.all.current"],
                   gpu_allocations=stats["allocation.all.current"])
    return now


def probe(model: str, device: str, dtype: str) -> dict:
    """What this machine and this model can do at best: bandwidth in bytes a second, sizes in bytes.

    weight_bytes: what a decode step reads of the weights (not the input table, unless it is the
    head too); kv_bytes_per_token: one token's keys and values in all layers.
    """
    import torch
    import transformers

    from bench.models import GIVEN
    on_gpu = device.startswith("cuda")
    machine = {
        "device_name": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "threads": None if on_gpu else torch.get_num_threads(), "torch": torch.__version__,
        "transformers": transformers.__version__, "python": sys.version.split()[0],
        "bandwidth": measure_bandwidth(device)}
    if (file := Path(model) / GIVEN).exists() and not (Path(model) / "config.json").exists():
        from bench.to_gguf import gguf_limits
        return {**machine, **gguf_limits(str(file))}
    config = transformers.AutoConfig.from_pretrained(model)
    dtype = config.dtype if dtype == "auto" else getattr(torch, dtype)
    with torch.device("meta"):
        hf = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    weights = sum(p.numel() for p in hf.parameters())
    if not config.tie_word_embeddings:
        weights -= hf.get_input_embeddings().weight.numel()
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    is_sparse = any(getattr(config, name, None) for name in ("num_experts", "num_local_experts"))
    return {
        **machine, "dtype": str(dtype).replace("torch.", ""), "vocab": config.vocab_size,
        "max_model_len": config.max_position_embeddings,
        # a mixture of experts reads some of its weights only: no simple ceiling
        "weight_bytes": None if is_sparse else weights * dtype.itemsize,
        "kv_bytes_per_token": kv * dtype.itemsize}


def cpu_name() -> str:
    """The processor, as the machine calls it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def measure_bandwidth(device: str) -> float:
    """Bytes a second between memory and the device's cores, the best of several passes.

    A CPU reads a buffer far larger than its caches; a GPU copies one, which moves it twice.
    """
    import torch
    on_gpu = device.startswith("cuda")
    size = 2**30 if on_gpu else 2**28
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source) if on_gpu else None
    move = (lambda: target.copy_(source)) if on_gpu else source.sum
    wait = (lambda: torch.cuda.synchronize(device)) if on_gpu else (lambda: None)
    best, until = float("inf"), time.perf_counter() + 1.5
    while time.perf_counter() < until:
        wait()
        start = time.perf_counter()
        move()
        wait()
        best = min(best, time.perf_counter() - start)
    return size * (2 if on_gpu else 1) / best
