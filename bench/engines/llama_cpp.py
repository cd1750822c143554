"""llama.cpp in the Python of --llama-python, through llama-cpp-python's low-level functions."""

from __future__ import annotations

import os

from bench.engines import StepEngine


class LlamaCpp(StepEngine):
    """`llama_decode` with a batch: a token of each running row, and pieces of new prompts.

    The package's high-level class decodes one sequence only. No prefix cache: sharing is the
    business of llama.cpp's server. `model` is a GGUF file, made by
    to_gguf.py or the user's own.
    """
    most_tokens = 2048  # of a call, llama.cpp's own default; it computes them 512 at a time

    def __init__(self, model: str, device: str, dtype: str, **_):
        import llama_cpp
        if device != "cpu":
            raise ValueError("llama-cpp: only on a CPU here")
        self.lib, self.dtype, self.context = llama_cpp, dtype, None
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            model.encode(), llama_cpp.llama_model_default_params())
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
        rows = min(64, len(requests))
        self._make_context(rows, max(len(r["prompt"]) + r["max_tokens"] for r in requests))
        self.free, self.waiting, self.running = list(range(rows)), [], []
        return super().run(requests, temperature, limit, tell)

    def add(self, index, request, temperature):
        self.waiting.append(dict(index=index, tokens=list(request["prompt"]), done=0,
                                 end=len(request["prompt"]) + request["max_tokens"],
                                 temperature=temperature))

    def step(self):
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
        return [(row["index"], [self._next_token(row, place)]) for row, place in sampling]

    def _next_token(self, row: dict, place: int) -> int:
        """Sample a token for the row from the logits at `place`; a finished row gives its seat."""
        import numpy as np
        lib = self.lib
        logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(self.context, place), (self.vocab,))
        if row["temperature"]:
            logits = logits / row["temperature"] + np.random.gumbel(size=self.vocab)
        token = int(logits.argmax())
        row["tokens"].append(token)
        if len(row["tokens"]) == row["end"]:
            self.running.remove(row)
            self.free.append(row["seq"])
            lib.llama_memory_seq_rm(lib.llama_get_memory(self.context), row["seq"], -1, -1)
        return token

    def is_idle(self):
        return not (self.waiting or self.running)

    def counts(self):
        return {"cached_tokens": 0, "preemptions": 0}

    def drop_all(self):
        self.waiting, self.running = [], []

    def close(self):
        self._free_context()
        self.lib.llama_model_free(self.model)
