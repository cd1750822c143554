"""The reference, GeeeekExplorer/nano-vllm, from the folder --nano-vllm (a GPU, flash-attn)."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path

from bench.engines import StepEngine
from bench.models import ROOT


class NanoVLLM(StepEngine):
    """Its package has the same name as ours, so it has a process and a path of its own."""

    def __init__(self, model: str, max_model_len: int, is_dummy: bool, settings: dict, source: str,
                 **_):
        sys.path[:] = [source, *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
        if is_dummy:  # it wants a tokenizer in the folder, and loads what weights it finds: none
            config, model = Path(model) / "config.json", tempfile.mkdtemp(dir=model)
            for file in (config, *(ROOT / "nanovllm" / "demo_model").glob("tokenizer*.json")):
                shutil.copy(file, model)
        found = importlib.util.find_spec("nanovllm")
        if found is None or not Path(found.origin).resolve().is_relative_to(Path(source).resolve()):
            raise RuntimeError(f"--nano-vllm: {source!r} holds no package nanovllm")
        import nanovllm
        self.package = nanovllm
        self.llm = nanovllm.LLM(model, max_model_len=max_model_len, **settings)

    def before_run(self):
        self.seqs, self.seen = {}, {}

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
