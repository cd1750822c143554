"""The engines that can be measured: one file for each, imported only where it runs."""

from __future__ import annotations

import importlib

from bench.recorder import Recorder

_PLACES = {  # name on the command line -> module, class
    "nanovllm": ("ours", "NanoVLLMTaught"), "hf": ("transformers", "HuggingFace"),
    "hf-continuous": ("transformers", "HuggingFaceContinuous"), "vllm": ("vllm", "VLLM"),
    "llama-cpp": ("llama_cpp", "LlamaCpp"), "nano-vllm": ("nano_vllm", "NanoVLLM")}
ENGINES = tuple(_PLACES)


def engine_class(name: str) -> type:
    """The class that drives the engine of this name."""
    module, attribute = _PLACES[name]
    return getattr(importlib.import_module(f"bench.engines.{module}"), attribute)


class StepEngine:
    """An engine that is driven step by step: `run` is the same for all of them.

    A subclass has add(index, request, temperature), which queues a request; step(), which makes a
    step and returns (index, new token ids[, seconds since the start]) for each request with news;
    is_idle(), whether nothing is queued or running; and of the methods below those that it needs.
    """
    static_batch = None  # a number: so many requests at once, the next only when all are done

    def before_run(self) -> None:
        """Set counters back."""

    def counts(self) -> dict:
        """What the engine counted since before_run()."""
        return {}

    def drop_all(self) -> None:
        """The run is over; forget what is still queued or running."""

    def close(self) -> None:
        """Give everything back."""

    def run(self, requests: list[dict], temperature: float, limit: float, tell) -> dict:
        """Serve the requests, `limit` seconds at most; what came when."""
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
