"""vLLM, in the Python of --vllm-python or in this one; its scheduler in the worker's process."""

from __future__ import annotations

import os

from bench.engines import StepEngine


class VLLM(StepEngine):
    """vllm.LLM's own engine, step by step."""

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
        self.engine = self.llm.llm_engine

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

    def counts(self):
        return {"cached_tokens": self.cached}

    def drop_all(self):
        if not self.is_idle():
            self.engine.abort_request([str(index) for index in self.seen])
