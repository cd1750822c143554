"""Hugging Face transformers: generate() with static batches, and its continuous batching."""

from __future__ import annotations

import inspect

from bench.engines import StepEngine
from bench.recorder import Recorder


def load_model(folder: str, device: str, dtype: str, is_dummy: bool):
    """The transformers model on the device, in its dtype from the start; "auto": its own."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging
    logging.set_verbosity_error()
    config = AutoConfig.from_pretrained(folder)
    dtype = config.dtype if dtype == "auto" else getattr(torch, dtype)
    if is_dummy:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model = model.to(device).eval()
    model.generation_config.eos_token_id = None  # every request has its full length
    model.generation_config.pad_token_id = 0
    return model


def sampling(temperature: float) -> dict:
    """generate()'s settings for a temperature; 0 takes the likeliest token."""
    if temperature:
        return dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
    return dict(do_sample=False)


class HuggingFace:
    """Static batches: a batch runs until its longest is done.

    A batch is what is due, in order of arrival, at most --hf-batch; prompts are padded on the left.
    """

    def __init__(self, model: str, device: str, dtype: str, is_dummy: bool, hf_batch: int, **_):
        self.model, self.batch = load_model(model, device, dtype, is_dummy), hf_batch

    def run(self, requests, temperature, limit, tell):
        """Serve the requests, `limit` seconds at most; what came when."""
        recorder = Recorder(requests, limit, tell)
        while recorder.pending and not recorder.is_late():
            batch = recorder.take(self.batch, is_idle=True)
            self._generate(recorder, batch, [requests[i] for i in batch], temperature)
        return recorder.result(preemptions=0, cached_tokens=0)

    def _generate(self, recorder, batch, requests, temperature):
        import torch

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
        with torch.inference_mode():
            self.model.generate(
                ids, attention_mask=mask, max_new_tokens=max(r["max_tokens"] for r in requests),
                max_time=max(0.0, recorder.limit - recorder.now()), streamer=Clock(),
                **sampling(temperature))

    def close(self):
        """Nothing to give back but the process."""


class HuggingFaceContinuous(StepEngine):
    """Continuous batching: a thread of its own steps, and its clock stamps the tokens."""

    def __init__(self, model: str, device: str, dtype: str, is_dummy: bool, **_):
        self.model, self.on_gpu = load_model(model, device, dtype, is_dummy), device != "cpu"

    def run(self, requests, temperature, limit, tell):
        from transformers import ContinuousBatchingConfig, GenerationConfig
        page = 256  # its tokens per block
        blocks = sum(-(-(len(r["prompt"]) + r["max_tokens"]) // page) for r in requests) + 1
        # a CPU has no size of its own to go by
        sizes = {} if self.on_gpu else dict(num_blocks=blocks, max_batch_tokens=1024)
        self.manager = self.model.init_continuous_batching(
            generation_config=GenerationConfig(eos_token_id=-1, **sampling(temperature)),
            continuous_batching_config=ContinuousBatchingConfig(**sizes))
        if self.on_gpu and hasattr(self.manager, "warmup"):
            self.manager.warmup()
        self.manager.start()
        self.open = {}  # name of a request -> its index, and how many tokens were seen
        return super().run(requests, temperature, limit, tell)

    def add(self, index, request, temperature):
        name = self.manager.add_request(
            request["prompt"], request_id=str(index), max_new_tokens=request["max_tokens"],
            streaming=True, record_timestamps=True)
        self.open[name] = [index, 0]

    def step(self):
        out = self.manager.get_result(timeout=0.01)
        if out is None and not self.manager.is_running():
            raise RuntimeError("transformers' continuous batching has stopped")
        if out is not None and out.error:
            raise RuntimeError(out.error)
        if out is None or out.request_id not in self.open:
            return []
        entry = self.open[out.request_id]
        index, seen = entry
        entry[1] = len(out.generated_tokens)
        if out.is_finished():
            del self.open[out.request_id]
        return [(index, [token], stamp - self.start) for token, stamp
                in zip(out.generated_tokens[seen:], out.timestamps[seen:])]

    def is_idle(self):
        return not self.open

    def drop_all(self):
        can_drop = "hard_stop" in inspect.signature(self.manager.stop).parameters  # newer ones
        drop = {"hard_stop": True} if self.open and can_drop else {}
        self.manager.stop(block=True, timeout=30, **drop)
        if hasattr(self.manager, "destroy"):
            self.manager.destroy()
