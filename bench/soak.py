"""The leak hunt: random requests, aborts and bad requests, while memory and blocks are watched."""

from __future__ import annotations

import gc
import random
import time

from bench.machine import memory_now
from bench.models import Model
from bench.options import engine_list
from bench.process import Worker


class Soak:
    """An engine with a pool too small for what is asked of it. Runs in a worker."""

    def __init__(self, model: str, device: str, dtype: str, is_dummy: bool, seed: int,
                 settings: dict):
        from nanovllm import LLM
        small = {"num_kvcache_blocks": 40, "max_num_seqs": 16, "max_num_batched_tokens": 128}
        self.llm = LLM(model, device=device, dtype=dtype,
                       load_format="dummy" if is_dummy else "auto", **{**small, **settings})
        self.device, self.rng, self.pool = device, random.Random(seed), self.llm.block_manager
        self.unit = max(1, self.pool.block_size // 16)  # lengths in proportion to the blocks
        self.prefixes = [self._tokens(n * self.unit) for n in (0, 20, 60, 110)]
        too_long = self.pool.num_blocks * self.pool.block_size + 1
        self.bad = [([], {}), ([10**9], {}), ([1] * too_long, {}), (3.5, {}), ([1, "two"], {}),
                    ([1, 2], {"max_tokens": 0}), ([1, 2], {"temperature": -1}),
                    ([1, 2], {"top_p": 2})]
        self.active, self.samples = set(), []
        self.counts = dict.fromkeys(
            ("requests", "finished", "aborted", "refused", "streams", "tokens"), 0)

    def _tokens(self, n: int) -> list[int]:
        vocab = min(1000, self.llm.config.hf_config.vocab_size)
        return [self.rng.randrange(vocab) for _ in range(n)]

    def _request(self) -> tuple:
        """One of four beginnings and an end of its own; sampling parameters at random."""
        from nanovllm import SamplingParams
        rng = self.rng
        return rng.choice(self.prefixes) + self._tokens(rng.randint(1, 60)), SamplingParams(
            temperature=rng.choice([0, 0.7, 1.3]), top_k=rng.choice([0, 5]),
            top_p=rng.choice([1.0, 0.9]), max_tokens=rng.randint(1, 80) * self.unit,
            ignore_eos=rng.random() < 0.8, seed=rng.choice([None, rng.randrange(99)]),
            stop=rng.choice([(), ("zz", "the end")]))

    def _refuse(self) -> None:
        """A request that cannot work; RuntimeError if it is accepted."""
        from nanovllm import SamplingParams
        prompt, params = self.rng.choice(self.bad)
        try:
            self.llm.add_request(prompt, SamplingParams(**params))
        except (TypeError, ValueError):
            self.counts["refused"] += 1
        else:
            raise RuntimeError(f"accepted {str(prompt)[:30]} with {params}")

    def _act(self) -> None:
        """A new request, an abort, a bad request, a stream that is broken off, or nothing."""
        llm, counts, event = self.llm, self.counts, self.rng.random()
        if event < 0.5 and len(self.active) < 24:
            self.active.add(llm.add_request(*self._request()))
            counts["requests"] += 1
        elif event < 0.53 and self.active:
            request_id = self.rng.choice(sorted(self.active))
            if llm.abort(request_id) is not None:
                self.active.remove(request_id)
                counts["aborted"] += 1
        elif event < 0.58:
            self._refuse()
        elif event < 0.59 and llm.tokenizer is not None:
            stream = llm.stream(*self._request())
            next(stream, None)
            stream.close()  # the reader has gone away
            counts["streams"] += 1

    def _step(self) -> None:
        for out in self.llm.step():
            self.counts["tokens"] += len(out.token_ids)
            if out.output is not None:
                self.active.discard(out.request_id)
                self.counts["finished"] += 1

    def _sample(self, now: float) -> None:
        """Write down what is held."""
        gc.collect()
        self.samples.append({
            "seconds": now, "objects": len(gc.get_objects()), "active": len(self.active),
            "used_blocks": self.pool.num_used_blocks, "preemptions": self.llm.stats.preemptions,
            **memory_now(self.device)})

    def run(self, seconds: float, tell) -> dict:
        """Samples of memory over time, and what happened.

        RuntimeError if the engine keeps a block or a request, or accepts one that cannot work.
        """
        memory_now(self.device)  # what it imports is no leak
        gc.collect()
        gc.freeze()  # what is there now is not looked at again: only what comes from here on counts
        start, llm, pool = time.perf_counter(), self.llm, self.pool
        while (now := time.perf_counter() - start) < seconds:
            if not self.samples or now - self.samples[-1]["seconds"] > min(1.0, seconds / 20):
                self._sample(now)
                tell(progress=int(now))
            self._act()
            self._step()
        while not llm.is_finished():
            self._step()
        self._sample(time.perf_counter() - start)
        if pool.num_free_blocks != pool.num_blocks or llm.requests:
            raise RuntimeError(f"{pool.num_used_blocks} blocks are still held, and "
                               f"{len(llm.requests)} requests still known")
        stats = {name: getattr(llm.stats, name)
                 for name in ("steps", "preemptions", "peak_blocks", "cached_tokens")}
        llm.close()
        return {"samples": self.samples, "num_blocks": pool.num_blocks,
                "free_blocks": pool.num_free_blocks, **self.counts, **stats}


def run_soak(args, model: Model) -> dict:
    """--soak: a worker does it, with a progress bar; printed, and ready for JSON."""
    from tqdm import tqdm
    seconds = args.soak * 60
    _, settings = engine_list(args).get("nanovllm", ("", {}))
    with Worker(threads=args.threads or 1) as worker, \
            tqdm(total=round(seconds), desc="soak", unit="s", disable=args.quiet) as bar:
        result = worker.ask("soak", lambda now: bar.update(now - bar.n), patience=seconds + 300,
                            model=model.folder, device=args.device, dtype=model.dtype,
                            is_dummy=model.is_dummy, seconds=seconds, seed=args.seed,
                            settings=settings)
    result["settle"] = min(60.0, seconds / 4)  # memory may grow until then
    print_soak(result)
    return result


def settled(result: dict) -> list[dict]:
    """The samples from the time on when memory should have stopped to grow."""
    after = [s for s in result["samples"] if s["seconds"] >= result["settle"]]
    return after or result["samples"][-1:]


def drift(result: dict, name: str) -> float:
    """The farthest that a figure strays after settling, as a share of its value then."""
    first, *_ = after = [s[name] for s in settled(result)]
    return max(abs(value - first) for value in after) / max(1, first)


def print_soak(result: dict) -> None:
    """What happened, and whether memory stayed where it was."""
    after, last, settle = settled(result)[0], result["samples"][-1], result["settle"]
    print(f"{last['seconds']:.0f} s: {result['requests']:,} requests, {result['finished']:,} "
          f"finished, {result['aborted']:,} aborted, {result['refused']:,} bad ones refused, "
          f"{result['streams']:,} streams broken off, {result['preemptions']:,} preemptions, "
          f"{result['steps']:,} steps, {result['tokens']:,} tokens")
    print(f"blocks: {result['free_blocks']} of {result['num_blocks']} free at the end, "
          f"{result['peak_blocks']} in use at the peak")
    for name in ("rss", "gpu_allocated", "gpu_reserved"):
        if name in last:
            print(f"{name}: {after[name] / 1e6:,.1f} MB after {settle:.0f} s, "
                  f"{last[name] / 1e6:,.1f} MB at the end, "
                  f"strays {drift(result, name):.2%} at most")
    print(f"Python objects since the start: {after['objects']:,} after {settle:.0f} s, with "
          f"{after['active']} requests under way, {last['objects']:,} at the end, with none")
