"""A million random requests: scheduler and block manager, with a model of a few integers.

    python -m bench.toy --requests 1000000 --seed 1

Everything but the model is the engine's own. The toy's key of a token follows from the key before
it, which it reads by the block table, and from the token: whoever reads a wrong block, an old one
or one that was never written gets other tokens than those that follow from the prompt alone. One
token of the vocabulary is the toy's NaN. The same seed does the same again.
"""

from __future__ import annotations

import argparse
import random
import sys
import time

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.invariants import find_faults
from nanovllm.engine.scheduler import ScheduledRow, Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams

VOCAB, EOS, BAD = 50, 7, 50        # BAD stands in prompts only, and makes what follows no number
NAN = -1                           # as a key, and as the token that the sampler gives for it


def next_key(key: int, token: int) -> int:
    """The key of a token behind one with this key; NAN stays NAN."""
    if key == NAN or token == BAD:
        return NAN
    return (key * 6364136223846793005 + token + 1442695040888963407) % 2**61


def sampled(key: int) -> int:
    """The token that follows a token with this key."""
    return NAN if key == NAN else (key >> 29) % VOCAB


def right_answer(prompt: list[int], params: SamplingParams, limit: int) -> tuple[list[int], str]:
    """What follows a prompt, and why it ends; limit: tokens of prompt and answer together."""
    key, tokens = 0, []
    for token in prompt:
        key = next_key(key, token)
    while True:
        token = sampled(key)
        if token == NAN:
            return tokens, "nan"
        tokens.append(token)
        if token == EOS and not params.ignore_eos:
            return tokens, "stop"
        if len(tokens) >= params.max_tokens or len(prompt) + len(tokens) >= limit:
            return tokens, "length"
        key = next_key(key, token)


class World:
    """A scheduler over a small pool, of settings that come by chance, and what is asked of it."""

    def __init__(self, rng: random.Random, counts: dict[str, int]):
        self.rng, self.counts, self.active = rng, counts, {}
        self.manager = BlockManager(rng.randint(2, 12), rng.choice([1, 2, 3, 4, 8]),
                                    enable_prefix_caching=rng.random() < 0.9)
        self.scheduler = Scheduler(
            self.manager, max_num_batched_tokens=rng.choice([1, 5, 16, 64]),
            max_num_seqs=rng.randint(1, 8), max_model_len=rng.choice([12, 40, 1000]),
            eos_token_ids=[EOS])
        self.cache = [None] * (self.manager.num_blocks * self.manager.block_size)
        self.prefixes = [self._tokens(rng.randint(1, 20)) for _ in range(3)]

    def _tokens(self, n: int) -> list[int]:
        return [BAD if self.rng.random() < 0.005 else self.rng.randrange(VOCAB) for _ in range(n)]

    def _add(self) -> None:
        """A request that begins as others do, or not; its right answer is known."""
        rng, scheduler = self.rng, self.scheduler
        prompt = rng.choice([[], *self.prefixes]) + self._tokens(rng.randint(1, 6))
        prompt = prompt[:scheduler.max_tokens - 1]
        params = SamplingParams(temperature=0, max_tokens=rng.randint(1, 12),
                                ignore_eos=rng.random() < 0.5,
                                prompt_logprobs=0 if rng.random() < 0.05 else None)
        seq = Sequence(prompt, params)
        self.active[seq.seq_id] = seq, right_answer(prompt, params, scheduler.max_tokens)
        scheduler.add_sequence(seq)
        self.counts["requests"] += 1

    def _abort(self) -> None:
        seq, _ = self.active.pop(self.rng.choice(list(self.active)))
        self.scheduler.finish(seq, "abort")
        self.counts["aborted"] += 1

    def _slot(self, seq: Sequence, position: int) -> int:
        size = self.manager.block_size
        return seq.block_table[position // size] * size + position % size

    def _compute(self, row: ScheduledRow) -> int:
        """Write the keys of a row's new tokens; the key of its last one."""
        seq, key = row.seq, 0
        for position in range(seq.num_computed_tokens, seq.num_computed_tokens
                              + row.num_new_tokens):
            before = self.cache[self._slot(seq, position - 1)] if position else 0
            key = next_key(before, seq.token_ids[position])
            self.cache[self._slot(seq, position)] = key
        return key

    def _compare_keys(self, seq: Sequence) -> None:
        """All keys that a sequence is to have; RuntimeError if one is not what it should be."""
        key = 0
        for position in range(seq.num_computed_tokens):
            key = next_key(key, seq.token_ids[position])
            if self.cache[self._slot(seq, position)] != key:
                raise RuntimeError(f"{seq}: the key of token {position} is that of another")

    def step(self) -> None:
        """A step, which may fail in its middle. RuntimeError for a fault."""
        rng, scheduler = self.rng, self.scheduler
        batch = scheduler.schedule()
        if not batch or sum(row.num_new_tokens for row in batch) > scheduler.max_num_batched_tokens:
            raise RuntimeError(f"a step of {batch}, with {len(self.active)} requests under way")
        fails = rng.randrange(len(batch)) if rng.random() < 0.02 else None
        keys = [self._compute(row) for row in batch[:fails]]
        self.counts["steps"] += 1
        if fails is not None:
            scheduler.rollback()
            self.counts["failed steps"] += 1
        else:
            if rng.random() < 0.05:
                self._compare_keys(rng.choice(batch).seq)
            tokens = [sampled(key) for key, row in zip(keys, batch) if row.samples]
            self.counts["tokens"] += len(tokens)
            for seq in scheduler.postprocess(batch, tokens):
                self._end(seq)

    def _end(self, seq: Sequence) -> None:
        """Compare an answer. RuntimeError if it is not the right one."""
        _, right = self.active.pop(seq.seq_id)
        if (seq.completion_token_ids, seq.finish_reason) != right:
            raise RuntimeError(f"{seq} of {seq.prompt_token_ids} got {seq.completion_token_ids}, "
                               f"{seq.finish_reason!r}, and {right} is right")
        self.counts[seq.finish_reason] += 1
        self.counts["cached tokens"] += seq.num_cached_tokens

    def check(self) -> None:
        """RuntimeError if blocks, queues and requests disagree."""
        if faults := find_faults(self.scheduler, self.active):
            raise RuntimeError("; ".join(faults))

    def run(self, requests: int) -> None:
        """So many requests, and all to their end. RuntimeError for a fault."""
        rng, left = self.rng, requests
        while left or self.active:
            event = rng.random()
            while left and (event < 0.6 or not self.active):
                self._add()
                left, event = left - 1, rng.random() * 1.5
            if self.active and rng.random() < 0.03:
                self._abort()
            if self.active:
                self.step()
            self.check()
        self.counts["preemptions"] += self.scheduler.num_preemptions
        if self.manager.num_free_blocks != self.manager.num_blocks:
            raise RuntimeError(f"{self.manager.num_used_blocks} blocks are still held")


def run_toy(requests: int, seed: int, tell=None) -> dict[str, int]:
    """What happened to so many random requests, in worlds of 100 each. RuntimeError for a fault."""
    counts = dict.fromkeys(("requests", "length", "stop", "nan", "aborted", "steps",
                            "failed steps", "preemptions", "tokens", "cached tokens"), 0)
    rng = random.Random(seed)
    while counts["requests"] < requests:
        World(rng, counts).run(min(100, requests - counts["requests"]))
        if tell is not None:
            tell(counts["requests"])
    if sum(counts[name] for name in ("length", "stop", "nan", "aborted")) != counts["requests"]:
        raise RuntimeError(f"requests were lost: {counts}")
    return counts


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser("bench.toy", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args, start = parser.parse_args(), time.perf_counter()
    counts = run_toy(args.requests, args.seed)
    print(f"seed {args.seed}, {time.perf_counter() - start:.0f} s, all right:",
          ", ".join(f"{number:,} {name}" for name, number in counts.items()))


if __name__ == "__main__":
    sys.exit(main())
