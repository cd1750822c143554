#!/usr/bin/env python3
"""One engine in a process of its own, at bench.py's command: requests in, token times out.

It needs the standard library and the engine, nothing else, so that it can run in another Python.
Commands come as JSON on standard input, one a line; answers leave the same way. Progress is
{"progress": n}, an answer {"done": ...}, a failure {"error": "..."}.
"""

from __future__ import annotations  # a worker may be an older Python than the one that asks

import contextlib
import gc
import inspect
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# -----------------------------------------------------------------------------------------------
# What came when
# -----------------------------------------------------------------------------------------------

class Recorder:
    """Hands requests out when they are due, and writes down when each token came."""

    def __init__(self, requests: list[dict], limit: float, tell=lambda **news: None):
        self.requests, self.limit, self.tell = requests, limit, tell
        self.pending = list(range(len(requests)))     # not handed out yet
        self.arrived = [None] * len(requests)
        self.times = [[] for _ in requests]
        self.tokens = [[] for _ in requests]
        self.count, self.told, self.was_cut = 0, 0.0, False
        self.start = time.perf_counter()

    def now(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start

    def is_late(self) -> bool:
        """Whether the time limit is over; the run then counts as cut."""
        self.was_cut = self.was_cut or bool(self.limit) and self.now() > self.limit
        return self.was_cut

    def _due(self, i: int) -> bool:
        request = self.requests[i]
        if "after" in request:
            return self.count >= request["after"]
        return self.now() >= request["at"]

    def take(self, most: int | None = None, is_idle: bool = False) -> list[int]:
        """Requests that are due now, at most so many; an idle engine gets at least the next one."""
        due = [i for i in self.pending if self._due(i)][:most]
        if not due and is_idle and self.pending:
            due = [self.pending[0]]
            time.sleep(max(0.0, self.requests[due[0]].get("at", 0.0) - self.now()))
        for i in due:
            self.pending.remove(i)
            request = self.requests[i]
            self.arrived[i] = self.now() if "after" in request else request["at"]
        return due

    def add(self, i: int, token_ids: list[int], at: float | None = None) -> None:
        """Tokens of request `i`, now or at a time; tokens beyond its max_tokens are no news."""
        wanted = self.requests[i]["max_tokens"] - len(self.times[i])
        token_ids = list(token_ids)[:max(0, wanted)]
        at = self.now() if at is None else at
        self.times[i] += [at] * len(token_ids)
        self.tokens[i] += token_ids
        self.count += len(token_ids)
        if at - self.told > 0.2:
            self.told = at
            self.tell(progress=self.count)

    def result(self, **more) -> dict:
        """All of it, ready for JSON."""
        last = max((t[-1] for t in self.times if t), default=self.now())
        if all(len(t) == r["max_tokens"] for t, r in zip(self.times, self.requests)):
            self.was_cut = False  # the limit passed when all was done
        return dict(arrived=[0.0 if a is None else a for a in self.arrived], times=self.times,
                    tokens=self.tokens, seconds=self.now() if self.was_cut else last,
                    was_cut=self.was_cut, **more)


# -----------------------------------------------------------------------------------------------
# Engines
# -----------------------------------------------------------------------------------------------

class StepEngine:
    """An engine that is driven step by step. Subclasses say how; `run` is the same for all."""
    static_batch = None  # a number: so many requests at once, the next only when all are done

    def add(self, index: int, request: dict, temperature: float) -> None:
        """Queue a request."""
        raise NotImplementedError

    def step(self) -> list[tuple]:
        """One step: (index of the request, its new token ids, time or None for now)."""
        raise NotImplementedError

    def is_idle(self) -> bool:
        """Whether nothing is queued or running."""
        raise NotImplementedError

    def drop_all(self) -> None:
        """The run is over; forget what is still queued or running."""

    def before_run(self) -> None:
        """Set counters back."""

    def counts(self) -> dict:
        """What the engine counted since before_run()."""
        return {}

    def close(self) -> None:
        """Give everything back."""

    def run(self, requests: list[dict], temperature: float, limit: float, tell) -> dict:
        """Serve the requests; what came when."""
        self.before_run()
        recorder = Recorder(requests, limit, tell)
        self.start = recorder.start
        while not recorder.is_late():
            if self.is_idle() or not self.static_batch:
                for i in recorder.take(self.static_batch, is_idle=self.is_idle()):
                    self.add(i, requests[i], temperature)
            if self.is_idle():
                break
            for news in self.step():
                recorder.add(*news)
        self.drop_all()
        return recorder.result(**self.counts())


class NanoVLLMTaught(StepEngine):
    """The engine of this repository, through its public interface."""

    def __init__(self, model: str, device: str, dtype: str, is_dummy: bool, max_model_len: int,
                 settings: dict, **_):
        from nanovllm import LLM
        settings = {"max_model_len": max_model_len, **settings}
        self.static_batch = settings.pop("static_batch", None)
        self.llm = LLM(model, device=device, dtype=dtype,
                       load_format="dummy" if is_dummy else "auto", **settings)
        self.index = {}

    def add(self, index, request, temperature):
        from nanovllm import SamplingParams
        params = SamplingParams(temperature=temperature, max_tokens=request["max_tokens"],
                                ignore_eos=True)
        self.index[self.llm.add_request(request["prompt"], params)] = index

    def step(self):
        llm, before = self.llm, self.llm.stats.computed_tokens
        outputs = llm.step()
        ended = sum(out.output is not None for out in outputs)
        self.peak_running = max(self.peak_running, len(llm.scheduler.running) + ended)
        self.largest_step = max(self.largest_step, llm.stats.computed_tokens - before)
        return [(self.index[out.request_id], out.token_ids) for out in outputs]

    def is_idle(self):
        return self.llm.is_finished()

    def drop_all(self):
        for request_id in self.index:
            self.llm.abort(request_id)

    def before_run(self):
        self.index, self.peak_running, self.largest_step = {}, 0, 0
        self.llm.stats.peak_blocks = 0
        self.before = dict(vars(self.llm.stats))

    def counts(self):
        stats, manager = self.llm.stats, self.llm.block_manager
        names = ("steps", "computed_tokens", "cached_tokens", "preemptions")
        return {"peak_blocks": stats.peak_blocks, "num_blocks": manager.num_blocks,
                "block_size": manager.block_size, "peak_running": self.peak_running,
                "largest_step_tokens": self.largest_step,
                **{name: getattr(stats, name) - self.before[name] for name in names}}

    def close(self):
        self.llm.close()


def load_hf_model(model: str, device: str, dtype: str, is_dummy: bool):
    """The transformers model on the device, in its dtype from the start."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging
    logging.set_verbosity_error()
    config = AutoConfig.from_pretrained(model)
    dtype = config.dtype if dtype == "auto" else getattr(torch, dtype)
    if is_dummy:
        with torch.device(device):
            hf = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        hf = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    hf = hf.to(device).eval()
    hf.generation_config.eos_token_id = None     # every request has its full length
    hf.generation_config.pad_token_id = 0
    return hf


class HuggingFace:
    """transformers' generate() with static batches: a batch runs until its longest is done.

    A batch is what is due, in order of arrival, at most --hf-batch; prompts are padded on the left.
    """

    def __init__(self, model: str, device: str, dtype: str, is_dummy: bool, hf_batch: int, **_):
        self.model, self.batch = load_hf_model(model, device, dtype, is_dummy), hf_batch

    def run(self, requests, temperature, limit, tell):
        """Serve the requests; what came when."""
        recorder = Recorder(requests, limit, tell)
        while recorder.pending and not recorder.is_late():
            batch = recorder.take(self.batch, is_idle=True)
            self._generate(recorder, batch, [requests[i] for i in batch], temperature)
        return recorder.result(preemptions=0, cached_tokens=0)

    def _generate(self, recorder, batch, requests, temperature):
        import torch
        from transformers import StoppingCriteria, StoppingCriteriaList

        class Late(StoppingCriteria):
            """Ends the batch at the time limit."""

            def __call__(self, input_ids, scores, **kwargs):
                return torch.full(input_ids.shape[:1], recorder.is_late(), device=input_ids.device)

        class Clock:
            """Called by generate() with the prompts first, then with every row's next token."""
            seen = 0

            def put(self, value):
                self.seen += 1
                if self.seen > 1:
                    for i, token in zip(batch, value.tolist()):
                        recorder.add(i, [token])

            def end(self):
                pass

        width = max(len(r["prompt"]) for r in requests)
        pads = [width - len(r["prompt"]) for r in requests]
        device = self.model.device
        ids = torch.tensor([[0] * p + r["prompt"] for p, r in zip(pads, requests)], device=device)
        mask = torch.tensor([[0] * p + [1] * (width - p) for p in pads], device=device)
        sampling = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
        with torch.inference_mode():
            self.model.generate(
                ids, attention_mask=mask, max_new_tokens=max(r["max_tokens"] for r in requests),
                streamer=Clock(), stopping_criteria=StoppingCriteriaList([Late()]),
                **(sampling if temperature else dict(do_sample=False)))

    def close(self):
        """Nothing to give back but the process."""


class HuggingFaceContinuous(StepEngine):
    """transformers' continuous batching: its own thread steps, and its clock stamps the tokens."""

    def __init__(self, model: str, device: str, dtype: str, is_dummy: bool, **_):
        self.model, self.device = load_hf_model(model, device, dtype, is_dummy), device
        self.manager = None

    def run(self, requests, temperature, limit, tell):
        from transformers import ContinuousBatchingConfig, GenerationConfig
        page = 256  # its tokens per block
        blocks = sum(-(-(len(r["prompt"]) + r["max_tokens"]) // page) for r in requests) + 1
        sizes = {} if self.device.startswith("cuda") else dict(
            num_blocks=blocks, max_batch_tokens=1024)  # a CPU has no size of its own to go by
        sampling = dict(do_sample=temperature > 0, eos_token_id=-1)
        if temperature:
            sampling.update(temperature=temperature, top_k=0, top_p=1.0)
        self.manager = self.model.init_continuous_batching(
            generation_config=GenerationConfig(**sampling),
            continuous_batching_config=ContinuousBatchingConfig(**sizes))
        if self.device.startswith("cuda") and hasattr(self.manager, "warmup"):
            self.manager.warmup()
        self.manager.start()
        self.open = {}
        return super().run(requests, temperature, limit, tell)

    def add(self, index, request, temperature):
        name = self.manager.add_request(
            request["prompt"], request_id=str(index), max_new_tokens=request["max_tokens"],
            streaming=True, record_timestamps=True)
        self.open[name] = [index, 0]  # and how many tokens were seen

    def step(self):
        out = self.manager.get_result(timeout=0.01)
        if out is None:
            if not self.manager.is_running():
                raise RuntimeError("transformers' continuous batching has stopped")
            return []
        if out.error:
            raise RuntimeError(out.error)
        if out.request_id not in self.open:
            return []
        entry = self.open[out.request_id]
        index, seen = entry
        entry[1] = len(out.generated_tokens)
        if out.is_finished():
            del self.open[out.request_id]
        new = out.generated_tokens[seen:]
        stamps = [stamp - self.start for stamp in out.timestamps[seen:]]
        return [(index, [token], stamp) for token, stamp in zip(new, stamps)]

    def is_idle(self):
        return not self.open

    def drop_all(self):
        can_drop = "hard_stop" in inspect.signature(self.manager.stop).parameters  # newer ones
        drop = {"hard_stop": True} if self.open and can_drop else {}
        self.manager.stop(block=True, timeout=30, **drop)
        if hasattr(self.manager, "destroy"):
            self.manager.destroy()


class VLLM(StepEngine):
    """vLLM, in the Python of --vllm-python or in this one; its scheduler in this process."""

    def __init__(self, model: str, device: str, dtype: str, is_dummy: bool, max_model_len: int,
                 settings: dict, **_):
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
        from vllm import LLM
        # compiling takes a minute on a CPU; --vllm-set enforce_eager=False has it
        defaults = {} if device.startswith("cuda") else {"enforce_eager": True}
        self.llm = LLM(model, dtype=dtype, load_format="dummy" if is_dummy else "auto",
                       skip_tokenizer_init=True, max_model_len=max_model_len,
                       **{**defaults, **settings})
        self.engine, self.seen = self.llm.llm_engine, {}

    def before_run(self):
        self.seen, self.cached = {}, 0

    def add(self, index, request, temperature):
        from vllm import SamplingParams
        params = SamplingParams(temperature=temperature, max_tokens=request["max_tokens"],
                                ignore_eos=True, detokenize=False)
        self.engine.add_request(str(index), {"prompt_token_ids": request["prompt"]}, params)
        self.seen[index] = 0

    def step(self):
        news = []
        for out in self.engine.step():
            index, tokens = int(out.request_id.split("-")[0]), list(out.outputs[0].token_ids)
            news.append((index, tokens[self.seen[index]:]))
            self.seen[index] = len(tokens)
            if out.finished:
                self.cached += out.num_cached_tokens or 0
        return news

    def is_idle(self):
        return not self.engine.has_unfinished_requests()

    def drop_all(self):
        if not self.is_idle():
            self.engine.abort_request([str(index) for index in self.seen])

    def counts(self):
        return {"cached_tokens": self.cached}


class LlamaCpp(StepEngine):
    """llama.cpp in the Python of --llama-python, through llama-cpp-python's low-level functions.

    Its high-level class decodes one sequence; `llama_decode` takes a batch: a token of each, and
    pieces of new prompts. No prefix cache: sharing is the business of llama.cpp's server.
    """
    most_tokens = 2048  # of a call, llama.cpp's own default; it computes them 512 at a time

    def __init__(self, model: str, device: str, dtype: str, is_dummy: bool, **_):
        import llama_cpp
        from to_gguf import write_gguf
        if device != "cpu":
            raise ValueError("llama-cpp: only on a CPU here")
        self.lib, self.dtype, self.context = llama_cpp, dtype, None
        self.folder = tempfile.TemporaryDirectory()
        file = Path(self.folder.name) / "model.gguf"
        write_gguf(Path(model), file, dtype, is_dummy)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            str(file).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError("llama.cpp cannot load the model")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def _make_context(self, rows: int, length: int) -> None:
        """A context with a cache for `rows` sequences of `length` tokens: it is taken at once."""
        lib = self.lib
        self._free_context()
        params = lib.llama_context_default_params()
        params.n_seq_max, params.n_ctx = rows, rows * (-(-length // 256) * 256)
        params.n_batch = self.most_tokens
        params.n_threads = params.n_threads_batch = int(os.environ.get("OMP_NUM_THREADS")
                                                        or os.cpu_count())
        if self.dtype == "float32":  # as exact as the weights; else its defaults, a cache in fp16
            params.type_k = params.type_v = lib.GGML_TYPE_F32
            params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp gives no context of this size")
        self.batch = lib.llama_batch_init(self.most_tokens, 0, 1)

    def _free_context(self) -> None:
        if self.context:
            self.lib.llama_batch_free(self.batch)
            self.lib.llama_free(self.context)
            self.context = None

    def run(self, requests, temperature, limit, tell):
        """Serve the requests; what came when."""
        rows = min(64, len(requests))
        self._make_context(rows, max(len(r["prompt"]) + r["max_tokens"] for r in requests))
        self.free, self.waiting, self.running = list(range(rows)), [], []
        return super().run(requests, temperature, limit, tell)

    def add(self, index, request, temperature):
        self.waiting.append(dict(index=index, tokens=list(request["prompt"]), done=0,
                                 end=len(request["prompt"]) + request["max_tokens"],
                                 temperature=temperature))

    def step(self):
        """A token for every running row, and tokens of prompts, as many as there is room for."""
        lib, batch = self.lib, self.batch
        while self.waiting and self.free:
            self.running.append({**self.waiting.pop(0), "seq": self.free.pop()})
        batch.n_tokens, sampling = 0, []
        for row in sorted(self.running, key=lambda row: len(row["tokens"]) - row["done"] > 1):
            tokens = row["tokens"][row["done"]:][:self.most_tokens - batch.n_tokens]
            for token in tokens:
                i = batch.n_tokens
                batch.token[i], batch.pos[i], batch.logits[i] = token, row["done"], False
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, row["seq"]
                row["done"] += 1
                batch.n_tokens += 1
            if tokens and row["done"] == len(row["tokens"]):
                batch.logits[batch.n_tokens - 1] = True
                sampling.append((row, batch.n_tokens - 1))
        if status := lib.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode: status {status}")
        news = []
        for row, place in sampling:
            token = self._sample(lib.llama_get_logits_ith(self.context, place), row["temperature"])
            row["tokens"].append(token)
            news.append((row["index"], [token]))
            if len(row["tokens"]) == row["end"]:
                self.running.remove(row)
                self.free.append(row["seq"])
                lib.llama_memory_seq_rm(lib.llama_get_memory(self.context), row["seq"], -1, -1)
        return news

    def _sample(self, pointer, temperature: float) -> int:
        import numpy as np
        logits = np.ctypeslib.as_array(pointer, (self.vocab,))
        if temperature:
            logits = logits / temperature + np.random.gumbel(size=self.vocab)
        return int(logits.argmax())

    def is_idle(self):
        return not (self.waiting or self.running)

    def drop_all(self):
        self.waiting, self.running = [], []

    def counts(self):
        return {"cached_tokens": 0, "preemptions": 0}

    def close(self):
        self._free_context()
        self.lib.llama_model_free(self.model)
        self.folder.cleanup()


class NanoVLLM(StepEngine):
    """The reference, GeeeekExplorer/nano-vllm, from the folder --nano-vllm (a GPU, flash-attn).

    Its package bears the same name as ours, so it has a process and a path of its own.
    """

    def __init__(self, model: str, device: str, dtype: str, is_dummy: bool, max_model_len: int,
                 settings: dict, source: str, **_):
        sys.path[:] = [source, *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
        if is_dummy:  # it wants a tokenizer in the folder, and loads what weights it finds: none
            config = (Path(model) / "config.json").read_bytes()
            model = tempfile.mkdtemp(dir=model)
            for file in (ROOT / "nanovllm" / "demo_model").glob("tokenizer*.json"):
                (Path(model) / file.name).write_bytes(file.read_bytes())
            (Path(model) / "config.json").write_bytes(config)
        import nanovllm
        if Path(nanovllm.__file__).resolve().is_relative_to(ROOT):
            raise RuntimeError(f"--nano-vllm: {source!r} holds no package nanovllm")
        self.package = nanovllm
        self.llm = nanovllm.LLM(model, max_model_len=max_model_len, **settings)

    def before_run(self):
        self.seqs, self.seen, self.preemptions = {}, {}, 0

    def add(self, index, request, temperature):
        params = self.package.SamplingParams(  # it refuses 0; this is as good as the likeliest
            temperature=max(temperature, 1e-4), max_tokens=request["max_tokens"], ignore_eos=True)
        self.llm.add_request(request["prompt"], params)
        self.seqs[index], self.seen[index] = self.llm.scheduler.waiting[-1], 0

    def step(self):
        self.llm.step()
        news = []
        for index, seq in list(self.seqs.items()):
            tokens = list(seq.completion_token_ids)
            if new := tokens[self.seen[index]:]:
                news.append((index, new))
                self.seen[index] = len(tokens)
            if seq.is_finished:
                del self.seqs[index]
        return news

    def is_idle(self):
        return self.llm.is_finished()

    def drop_all(self):
        if self.seqs:
            raise RuntimeError("it cannot abort; give it more time with --limit")


ENGINE_CLASSES = {"nanovllm": NanoVLLMTaught, "hf": HuggingFace,
                  "hf-continuous": HuggingFaceContinuous, "vllm": VLLM, "llama-cpp": LlamaCpp,
                  "nano-vllm": NanoVLLM}


# -----------------------------------------------------------------------------------------------
# The machine: memory held, bandwidth, sizes
# -----------------------------------------------------------------------------------------------

class Memory:
    """The most memory that this process and its children held since `restart`."""

    def __init__(self, device: str):
        self.on_gpu = device.startswith("cuda")

    def restart(self) -> None:
        """Begin to count."""
        if self.on_gpu:
            import torch
            torch.cuda.reset_peak_memory_stats()
            return
        for pid in self._family():
            with contextlib.suppress(OSError):  # 5: set the high-water mark to what is held now
                Path(f"/proc/{pid}/clear_refs").write_text("5")

    def peak(self) -> int:
        """Bytes: allocated on the GPU, or resident in memory."""
        if self.on_gpu:
            import torch
            return torch.cuda.max_memory_allocated()
        if sum(marks := [_status_bytes(pid, "VmHWM") for pid in self._family()]):
            return sum(marks)
        import resource  # no /proc: since the start of the process, in KiB or bytes
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    @staticmethod
    def _family() -> list[int]:
        family = [os.getpid()]
        for pid in family:
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    family += map(int, (task / "children").read_text().split())
        return family


def _status_bytes(pid: int, field: str) -> int:
    """A field of /proc/PID/status, in bytes; 0 where there is none."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return 0


def probe(model: str, device: str, dtype: str) -> dict:
    """What this machine and this model can do at best: bandwidth in bytes a second, sizes in bytes.

    weight_bytes: what a decode step reads of the weights (not the input table, unless it is the
    head too); kv_bytes_per_token: one token's keys and values in all layers.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    config = AutoConfig.from_pretrained(model)
    dtype = config.dtype if dtype == "auto" else getattr(torch, dtype)
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(config, dtype=dtype)
    weights = sum(p.numel() for p in hf.parameters())
    if not config.tie_word_embeddings:
        weights -= hf.get_input_embeddings().weight.numel()
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    is_sparse = any(getattr(config, name, None) for name in ("num_experts", "num_local_experts"))
    on_gpu = device.startswith("cuda")
    return {
        "device_name": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "threads": None if on_gpu else torch.get_num_threads(), "torch": torch.__version__,
        "transformers": __import__("transformers").__version__, "python": sys.version.split()[0],
        "dtype": str(dtype).replace("torch.", ""), "vocab": config.vocab_size,
        "max_model_len": config.max_position_embeddings, "bandwidth": measure_bandwidth(device),
        # a mixture of experts reads some of its weights only: no simple ceiling
        "weight_bytes": None if is_sparse else weights * dtype.itemsize,
        "kv_bytes_per_token": kv * dtype.itemsize}


def cpu_name() -> str:
    """The processor, as the machine calls it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    import platform
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
    best, until = float("inf"), time.perf_counter() + 1.5
    while time.perf_counter() < until:
        if on_gpu:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        if on_gpu:
            target.copy_(source)
            torch.cuda.synchronize(device)
        else:
            source.sum()
        best = min(best, time.perf_counter() - start)
    return size * (2 if on_gpu else 1) / best


# -----------------------------------------------------------------------------------------------
# Leak hunt: here, so that the memory it watches is the engine's alone
# -----------------------------------------------------------------------------------------------

def soak(model: str, device: str, dtype: str, is_dummy: bool, seconds: float, seed: int,
         settings: dict, tell=lambda **news: None) -> dict:
    """Random requests, aborts, broken-off streams and bad requests in a pool too small for them.

    Samples of memory over time, and what happened. RuntimeError if the engine keeps a block, keeps
    a request, or accepts one that cannot work.
    """
    from nanovllm import LLM, SamplingParams
    settings = {"num_kvcache_blocks": 40, "max_num_seqs": 16, "max_num_batched_tokens": 128,
                **settings}
    llm = LLM(model, device=device, dtype=dtype, load_format="dummy" if is_dummy else "auto",
              **settings)
    rng, manager = random.Random(seed), llm.block_manager
    unit = max(1, manager.block_size // 16)  # lengths in proportion to the blocks
    vocab = min(1000, llm.config.hf_config.vocab_size)
    prefixes = [[rng.randrange(vocab) for _ in range(n * unit)] for n in (0, 20, 60, 110)]
    too_long = manager.num_blocks * manager.block_size + 1
    bad = [([], {}), ([10**9], {}), ([1] * too_long, {}), (3.5, {}), ([1, "two"], {}),
           ([1, 2], {"max_tokens": 0}), ([1, 2], {"temperature": -1}), ([1, 2], {"top_p": 2})]
    active, counts = set(), dict.fromkeys(
        ("requests", "finished", "aborted", "refused", "streams", "tokens"), 0)
    samples, start = [], time.perf_counter()
    gc.collect()
    gc.freeze()  # what is there now is not looked at again: only what comes from here on counts

    def params() -> SamplingParams:
        return SamplingParams(
            temperature=rng.choice([0, 0.7, 1.3]), top_k=rng.choice([0, 5]),
            top_p=rng.choice([1.0, 0.9]), max_tokens=rng.randint(1, 80) * unit,
            ignore_eos=rng.random() < 0.8, seed=rng.choice([None, rng.randrange(99)]),
            stop=rng.choice([(), ("zz", "the end")]))

    def prompt() -> list[int]:
        return rng.choice(prefixes) + [rng.randrange(vocab) for _ in range(rng.randint(1, 60))]

    def refuse() -> None:
        bad_prompt, bad_params = rng.choice(bad)
        try:
            llm.add_request(bad_prompt, SamplingParams(**bad_params))
        except (TypeError, ValueError):
            counts["refused"] += 1
        else:
            raise RuntimeError(f"accepted {str(bad_prompt)[:30]} with {bad_params}")

    def book(outputs) -> None:
        for out in outputs:
            counts["tokens"] += len(out.token_ids)
            if out.output is not None:
                active.discard(out.request_id)
                counts["finished"] += 1

    def sample(now: float) -> None:
        gc.collect()
        samples.append({"seconds": now, "objects": len(gc.get_objects()),
                        "used_blocks": manager.num_used_blocks, "active": len(active),
                        "preemptions": llm.stats.preemptions, **memory_now(device)})
        tell(progress=int(now))

    while (now := time.perf_counter() - start) < seconds:
        if not samples or now - samples[-1]["seconds"] > min(1.0, seconds / 20):
            sample(now)
        event = rng.random()
        if event < 0.5 and len(active) < 24:
            active.add(llm.add_request(prompt(), params()))
            counts["requests"] += 1
        elif event < 0.53 and active:
            request_id = rng.choice(sorted(active))
            if llm.abort(request_id) is not None:
                active.remove(request_id)
                counts["aborted"] += 1
        elif event < 0.58:
            refuse()
        elif event < 0.59 and llm.tokenizer is not None:
            stream = llm.stream(prompt(), params())
            next(stream, None)
            stream.close()  # the reader has gone away
            counts["streams"] += 1
        book(llm.step())
    while not llm.is_finished():
        book(llm.step())
    sample(time.perf_counter() - start)
    if manager.num_free_blocks != manager.num_blocks or llm.requests:
        raise RuntimeError(f"{manager.num_used_blocks} blocks are still held, and "
                           f"{len(llm.requests)} requests still known")
    result = {"samples": samples, "num_blocks": manager.num_blocks,
              "free_blocks": manager.num_free_blocks, **counts, "steps": llm.stats.steps,
              "preemptions": llm.stats.preemptions, "peak_blocks": llm.stats.peak_blocks,
              "cached_tokens": llm.stats.cached_tokens}
    llm.close()
    return result


def memory_now(device: str) -> dict:
    """Bytes that this process holds now: resident, and on the GPU as PyTorch counts them."""
    now = {"rss": _status_bytes(os.getpid(), "VmRSS")}
    if device.startswith("cuda"):
        import torch
        stats = torch.cuda.memory_stats()
        now.update(gpu_allocated=stats["allocated_bytes.all.current"],
                   gpu_reserved=stats["reserved_bytes.all.current"],
                   gpu_allocations=stats["allocation.all.current"])
    return now


# -----------------------------------------------------------------------------------------------
# The line to bench.py
# -----------------------------------------------------------------------------------------------

def main() -> None:
    """Obey commands from standard input, one JSON object a line, until it closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    engine = memory = None

    def tell(**news):
        print(json.dumps(news), file=answers, flush=True)

    for line in sys.stdin:
        job = json.loads(line)
        try:
            if (do := job.pop("do")) == "probe":
                tell(done=probe(**job))
            elif do == "open":
                start = time.perf_counter()
                memory = Memory(job["device"])
                engine = ENGINE_CLASSES[job.pop("engine")](**job)
                tell(done={"load_seconds": time.perf_counter() - start})
            elif do == "soak":
                tell(done=soak(tell=tell, **job))
            elif do == "run":
                memory.restart()
                result = engine.run(tell=tell, **job)
                tell(done={**result, "peak_memory_bytes": memory.peak()})
            elif do == "close":
                engine.close()
                tell(done=True)
        except Exception as error:
            import traceback
            traceback.print_exc()
            tell(error=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
