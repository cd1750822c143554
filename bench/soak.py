"""The leak hunt and the gate: whatever may happen to an engine happens, and nothing may be lost."""

from __future__ import annotations

import gc
import random
import signal
import threading
import time

from bench.machine import memory_now
from bench.models import Model
from bench.options import engine_list
from bench.process import Worker


class Struck(Exception):
    """What the signal handler raises, at any line."""


def strike(*args):
    """The handler of SIGALRM."""
    raise Struck


class Reader:
    """Holds a stream and knows itself, so that only the garbage collector ends it."""

    def __init__(self, stream):
        self.stream, self.me = stream, self


class Soak:
    """An engine with a pool too small for what is asked of it. Runs in a worker.

    It compares its books after every step. Some requests are known: in fp32 their tokens must be
    those that they got before anything else had happened (in less, a step of another size may
    round otherwise). strikes: the share of steps with a signal.
    """

    def __init__(self, model: str, device: str, dtype: str, is_dummy: bool, seed: int,
                 settings: dict, strikes: float = 0.1):
        from nanovllm import LLM
        from nanovllm.engine.model_runner import resolve_dtype
        small = {"check_books": True, "num_kvcache_blocks": 40, "max_num_seqs": 16,
                 "max_num_batched_tokens": 128}
        self.llm = LLM(model, device=device, dtype=dtype,
                       load_format="dummy" if is_dummy else "auto", **{**small, **settings})
        self.is_exact = resolve_dtype(dtype, self.llm.config.hf_config).itemsize == 4
        self.device, self.rng, self.pool = device, random.Random(seed), self.llm.block_manager
        self.strikes = strikes
        self.unit = max(1, self.pool.block_size // 16)  # lengths in proportion to the blocks
        self.prefixes = [self._tokens(n * self.unit) for n in (0, 20, 60, 110)]
        too_long = self.pool.num_blocks * self.pool.block_size + 1
        self.bad = [([], {}), ([10**9], {}), ([1] * too_long, {}), (3.5, {}), ([1, "two"], {}),
                    ([1, 2], {"max_tokens": 0}), ([1, 2], {"temperature": -1}),
                    ([1, 2], {"top_p": 2})]
        self.active, self.samples = {}, []   # request id -> its tokens, where they are known
        self.counts = dict.fromkeys(
            ("requests", "finished", "failed", "aborted", "refused", "streams", "forgotten",
             "hostile", "signals", "known", "tokens"), 0)
        self.known = [self._known(prompt) for prompt in self.prefixes]

    def _known(self, prefix: list[int]) -> tuple:
        """A prompt, greedy parameters, and the tokens that follow."""
        from nanovllm import SamplingParams
        prompt, params = prefix + self._tokens(9), SamplingParams(temperature=0, max_tokens=30)
        return prompt, params, self.llm.generate([prompt], params, use_tqdm=False)[0]["token_ids"]

    def _hostile(self) -> tuple:
        """A request that passes every check and makes each of its steps fail."""
        prompt, params = self._request()
        object.__setattr__(params, "temperature", "hot")
        self.counts["hostile"] += 1
        return prompt, params

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

    def _add(self, prompt, params, tokens: list[int] | None = None) -> None:
        self.active[self.llm.add_request(prompt, params)] = tokens
        self.counts["requests"] += 1

    def _abort(self) -> None:
        """A signal may come when it is done: then it is over all the same."""
        request_id = self.rng.choice(sorted(self.active))
        try:
            self.llm.abort(request_id)
        finally:
            if request_id not in self.llm.requests and self._is_unreported(request_id):
                del self.active[request_id]
                self.counts["aborted"] += 1

    def _is_unreported(self, request_id: int) -> bool:
        """Whether no step has its output, for the next step() to tell."""
        return not any(out.request_id == request_id and out.output for out in self.llm._unclaimed)

    def _stream(self) -> None:
        """A reader who goes away, and closes the stream or leaves it to the garbage collector."""
        stream = self.llm.stream(*self._request())
        next(stream, None)
        if self.rng.random() < 0.5:
            stream.close()
            self.counts["streams"] += 1
        else:
            Reader(stream)
            self.counts["forgotten"] += 1

    def _act(self) -> None:
        """A new request, an abort, a bad request, a stream that is broken off, or nothing."""
        llm, event = self.llm, self.rng.random()
        if event < 0.5 and len(self.active) < 24:
            if event < 0.1:
                self._add(*self.rng.choice(self.known))
            else:
                self._add(*(self._hostile() if event < 0.11 else self._request()))
        elif event < 0.53 and self.active:
            self._abort()
        elif event < 0.58:
            self._refuse()
        elif event < 0.59 and llm.tokenizer is not None:
            self._stream()

    def _step(self) -> None:
        for out in self.llm.step():
            self.counts["tokens"] += len(out.token_ids)
            if out.output is not None:
                self._end(out.output)

    def _end(self, output: dict) -> None:
        """Count a request that is over. RuntimeError for tokens that are wrong."""
        tokens = self.active.pop(output["request_id"])
        self.counts["failed" if output["finish_reason"] == "error" else "finished"] += 1
        if tokens is not None and self.is_exact:
            self.counts["known"] += 1
            if output["token_ids"] != tokens:
                raise RuntimeError(f"request {output['request_id']} got {output['token_ids']}, "
                                   f"and {tokens} is right")

    def _turn(self) -> None:
        """Something happens, and a step; in some of them a signal comes at a random time."""
        try:
            if self.rng.random() < self.strikes:
                signal.setitimer(signal.ITIMER_REAL, self.rng.uniform(1e-5, 5e-3))
            try:
                self._act()
                self._step()
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except Struck:
            self.counts["signals"] += 1
            self.llm.check_books()

    def _sample(self, now: float) -> None:
        """Write down what is held."""
        gc.collect()
        self.samples.append({
            "seconds": now, "objects": len(gc.get_objects()), "active": len(self.active),
            "used_blocks": self.pool.num_used_blocks, "preemptions": self.llm.stats.preemptions,
            **memory_now(self.device)})

    def run(self, seconds: float, tell) -> dict:
        """Samples of memory over time, and what happened.

        RuntimeError if the engine keeps a block or a request, loses one, gives wrong tokens, or
        accepts a request that cannot work.
        """
        signal.signal(signal.SIGALRM, strike)
        memory_now(self.device)  # what it imports is no leak
        gc.collect()
        gc.freeze()  # what is there now is not looked at again: only what comes from here on counts
        start, llm, pool = time.perf_counter(), self.llm, self.pool
        while (now := time.perf_counter() - start) < seconds:
            if not self.samples or now - self.samples[-1]["seconds"] > min(1.0, seconds / 20):
                self._sample(now)
                tell(progress=int(now))
            self._turn()
        while not llm.is_finished():
            self._step()
        self._sample(time.perf_counter() - start)
        if pool.num_free_blocks != pool.num_blocks or llm.requests:
            raise RuntimeError(f"{pool.num_used_blocks} blocks are still held, and "
                               f"{len(llm.requests)} requests still known")
        over = sum(self.counts[name] for name in ("finished", "failed", "aborted"))
        if self.active or over != self.counts["requests"]:
            raise RuntimeError(f"{len(self.active)} requests were lost; {self.counts}")
        stats = {name: getattr(llm.stats, name)
                 for name in ("steps", "preemptions", "peak_blocks", "cached_tokens")}
        llm.close()
        return {"samples": self.samples, "num_blocks": pool.num_blocks,
                "free_blocks": pool.num_free_blocks, **self.counts, **stats}


def kill_workers(model: str, times: int, seed: int, tell) -> float:
    """Kill a worker of an engine with two ranks, so often, at random times. Runs in a worker.

    Returns the longest time in seconds until it was an error. AssertionError if that is none
    within the time limit, or if a process is left.
    """
    import psutil
    from nanovllm import LLM, SamplingParams
    wish, rng, longest = SamplingParams(max_tokens=2000, ignore_eos=True), random.Random(seed), 0.0
    for number in range(times):
        before = {child.pid for child in psutil.Process().children(recursive=True)}
        with LLM(model, device="cpu", tensor_parallel_size=2, num_kvcache_blocks=200) as llm:
            workers = [child for child in psutil.Process().children(recursive=True)
                       if child.pid not in before]
            delay = rng.uniform(0, 0.1)
            killer, start = threading.Timer(delay, workers[0].kill), time.perf_counter()
            killer.start()
            try:
                while time.perf_counter() - start < 60:
                    if not llm.requests:
                        llm.add_request([1, 2, 3], wish)
                    llm.step()
                raise AssertionError("a worker was killed, and 60 s later steps go on")
            except RuntimeError:                    # which says that a worker has ended
                longest = max(longest, time.perf_counter() - start - delay)
            killer.join()
        if left := psutil.wait_procs(workers, timeout=10)[1]:
            raise AssertionError(f"{len(left)} workers outlive their engine")
        tell(progress=number + 1)
    return longest


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
                            settings=settings, strikes=args.strikes)
    result["settle"] = min(60.0, seconds / 4)  # memory may grow until then
    deaths = int(args.soak) if args.deaths is None else args.deaths
    result["worker_deaths"], result["longest_death"] = 0, 0.0
    if args.device == "cpu" and deaths:             # engines with several ranks take long to start
        with Worker(threads=1) as worker, \
                tqdm(total=deaths, desc="worker deaths", disable=args.quiet) as bar:
            result["longest_death"] = worker.ask(
                "kill_workers", lambda now: bar.update(now - bar.n), patience=120 * deaths,
                model=model.folder, times=deaths, seed=args.seed)
            result["worker_deaths"] = deaths
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
    print(f"{last['seconds']:.0f} s: {result['requests']:,} requests = {result['finished']:,} "
          f"finished + {result['aborted']:,} aborted + {result['failed']:,} ended by their own "
          f"error; {result['known']:,} with known tokens, all right; {result['refused']:,} bad "
          f"ones refused, {result['streams']:,} streams broken off, "
          f"{result['forgotten']:,} forgotten; "
          f"{result['signals']:,} signals, {result['worker_deaths']:,} worker deaths (an error "
          f"after {result['longest_death']:.1f} s at most); "
          f"{result['preemptions']:,} preemptions, {result['steps']:,} steps, "
          f"{result['tokens']:,} tokens")
    print(f"blocks: {result['free_blocks']} of {result['num_blocks']} free at the end, "
          f"{result['peak_blocks']} in use at the peak")
    for name in ("rss", "gpu_allocated", "gpu_reserved"):
        if name in last:
            print(f"{name}: {after[name] / 1e6:,.1f} MB after {settle:.0f} s, "
                  f"{last[name] / 1e6:,.1f} MB at the end, "
                  f"strays {drift(result, name):.2%} at most")
    print(f"Python objects since the start: {after['objects']:,} after {settle:.0f} s, with "
          f"{after['active']} requests under way, {last['objects']:,} at the end, with none")
