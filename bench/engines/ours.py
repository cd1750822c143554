"""The engine of this repository, through its public interface."""

from __future__ import annotations

from bench.engines import StepEngine


class NanoVLLMTaught(StepEngine):
    """nanovllm.LLM, step by step. The setting static_batch=8 serves eight at a time, to the end."""

    def __init__(self, model: str, device: str, dtype: str, is_dummy: bool, max_model_len: int,
                 settings: dict, **_):
        from nanovllm import LLM
        settings = {"max_model_len": max_model_len, **settings}
        self.static_batch = settings.pop("static_batch", None)
        self.llm = LLM(model, device=device, dtype=dtype,
                       load_format="dummy" if is_dummy else "auto", **settings)
        self.index = {}  # the engine's id of a request -> ours

    def before_run(self):
        self.index, self.peak_running, self.largest_step = {}, 0, 0
        self.llm.stats.peak_blocks = 0
        self.before = dict(vars(self.llm.stats))

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

    def counts(self):
        stats, manager = self.llm.stats, self.llm.block_manager
        names = ("steps", "computed_tokens", "cached_tokens", "preemptions")
        return {"peak_blocks": stats.peak_blocks, "num_blocks": manager.num_blocks,
                "block_size": manager.block_size, "peak_running": self.peak_running,
                "largest_step_tokens": self.largest_step,
                **{name: getattr(stats, name) - self.before[name] for name in names}}

    def drop_all(self):
        for request_id in self.index:
            self.llm.abort(request_id)

    def close(self):
        self.llm.close()
