"""Block managers with a known mistake: each is caught, and ours passes. (Day 3 shows some.)"""

from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from nanovllm.engine import block_manager
from nanovllm.engine.block_manager import BlockManager, block_digest
from nanovllm.engine.sequence import Sequence


class ToyEngine:
    """Runs steps over a block manager; a slot's "key" is the tuple of all tokens up to it."""

    def __init__(self, manager):
        self.manager, self.running, self.slots = manager, [], {}
        self.computed = self.wrong_reads = 0

    def slot(self, seq, position):
        size = self.manager.block_size
        return seq.block_table[position // size] * size + position % size

    def drop(self, seq):
        self.running.remove(seq)
        self.manager.free(seq)

    def plan(self, seq, chunk):
        n = min(chunk, seq.num_uncomputed_tokens)
        self.manager.announce(seq, n)
        return seq, seq.num_computed_tokens + n

    def compute(self, rows):
        """All rows write, then all rows read: the order within a layer."""
        for seq, end in rows:
            assert end > seq.num_computed_tokens, "nothing to compute: no logits"
            for p in range(seq.num_computed_tokens, end):
                self.slots[self.slot(seq, p)] = tuple(seq.token_ids[:p + 1])
                self.computed += 1
        for seq, end in rows:
            for p in range(end):
                read = self.slots.get(self.slot(seq, p))
                self.wrong_reads += read != tuple(seq.token_ids[:p + 1])

    def step(self, arrivals=(), chunk=10**9, fails=False):
        """Slots for the running, blocks for arrivals, compute. Returns who got no blocks."""
        manager, rows, left_out = self.manager, [], []
        for seq in list(self.running):
            if manager.append_slot(seq):
                rows.append(self.plan(seq, chunk))
            else:
                self.drop(seq)
                left_out.append(seq)
        for seq in arrivals:
            if manager.allocate(seq) is None:
                self.running.append(seq)
                rows.append(self.plan(seq, chunk))
            else:
                left_out.append(seq)
        if fails:
            manager.discard_pending()
            for seq, _ in rows:
                self.drop(seq)
            return left_out + [seq for seq, _ in rows]
        self.compute(rows)
        manager.publish()
        for seq, end in rows:
            seq.num_computed_tokens = end
            if end == len(seq):
                seq.append_token(sum(seq.token_ids) % 3)
        return left_out


class StaleHash(BlockManager):
    def _take(self):
        _, block = self.free_blocks.popitem(last=False)
        block.ref_count, block.hash = 1, None        # and cached_blocks keeps its entry
        return block


class LastWins(BlockManager):
    def publish(self):
        for digest, block in self.pending_blocks.items():
            self.cached_blocks[digest] = block       # replaces the twin, which keeps its hash
            block.hash = digest
        self.pending_blocks.clear()


class CountsNewOnly(BlockManager):
    def allocate(self, seq):
        hits = self.match_prefix(seq)
        num_new = self.blocks_for(len(seq)) - len(hits)
        if num_new > self.num_free_blocks:           # revived blocks are not counted
            return num_new
        for block in hits:
            self._share(block)
        new = [self._take().block_id for _ in range(num_new)]
        seq.block_table = [block.block_id for block in hits] + new
        seq.num_computed_tokens = len(hits) * self.block_size


class StaysFree(BlockManager):
    def _share(self, block):
        block.ref_count += 1                         # and it stays in the free list


class NoCap(BlockManager):
    def match_prefix(self, seq):
        hits = []
        for index in range(len(seq) // self.block_size):        # the last token too
            block = self.cached_blocks.get(self._digest(seq, index))
            if block is None:
                break
            hits.append(block)
        return hits


class PublishesEarly(BlockManager):
    def announce(self, seq, num_new_tokens):
        super().announce(seq, num_new_tokens)
        self.publish()                                          # before anything is written


class PartialBlocks(BlockManager):
    def announce(self, seq, num_new_tokens):
        last = self.blocks_for(seq.num_computed_tokens + num_new_tokens)    # rounds up
        for index in range(seq.num_computed_tokens // self.block_size, last):
            self.pending_blocks.setdefault(self._digest(seq, index),
                                           self.blocks[seq.block_table[index]])


class NoPending(BlockManager):
    def match_prefix(self, seq):
        pending, self.pending_blocks = self.pending_blocks, {}
        hits = super().match_prefix(seq)
        self.pending_blocks = pending
        return hits


class ToyHash(BlockManager):
    def _digest(self, seq, index):
        return bytes([sum(seq.token_ids[:(index + 1) * self.block_size]) % 256])


class NoParent(BlockManager):
    def _digest(self, seq, index):
        start = index * self.block_size
        return block_digest(b"", seq.token_ids[start:start + self.block_size])


class Rehash(BlockManager):
    def _digest(self, seq, index):
        seq.block_digests.clear()
        return super()._digest(seq, index)


class KeepsTable(BlockManager):
    def free(self, seq):
        for block_id in seq.block_table:             # and the table keeps its entries
            self._release(self.blocks[block_id])


class SizeOfTheClass(BlockManager):
    def __init__(self, num_blocks, block_size):
        BlockManager.__init__(self, num_blocks, block_size)
        type(self).block_size = block_size           # shared by all objects of the class
        del self.block_size                          # so that the class attribute is seen


def evicted_is_forgotten(manager):
    engine = ToyEngine(manager(3, 4))
    for first in (1, 2, 1):
        engine.step([Sequence([first] * 9)])
        engine.drop(engine.running[0])
    assert (engine.computed, engine.wrong_reads) == (27, 0)


def the_first_of_duplicates_stays(manager):
    engine = ToyEngine(manager(4, 4))
    for _ in range(2):
        engine.step([Sequence([1] * 4)])             # a full block each; the cap forbids sharing it
    first, second = engine.running
    kept = first.block_table[0]
    engine.drop(second)
    engine.drop(first)
    while engine.manager.num_free_blocks > 1:        # evict until one free block is left
        engine.manager._take()
    assert [b.block_id for b in engine.manager.match_prefix(Sequence([1] * 5))] == [kept]
    engine.manager._take()
    assert engine.manager.match_prefix(Sequence([1] * 5)) == []


def a_hit_on_a_free_block_costs_one(manager):
    engine = ToyEngine(manager(4, 4))
    engine.step([Sequence([1] * 9)])
    engine.drop(engine.running[0])                   # two free blocks are remembered, two are empty
    assert engine.manager.allocate(Sequence([1] * 17)) == 5              # 2 revived + 3 new, 4 free
    assert [b.ref_count for b in engine.manager.blocks] == [0] * 4
    engine.step([Sequence([1] * 9)])                 # revives two, takes one
    assert engine.manager.num_free_blocks == 1
    engine.step([Sequence([1] * 9)])                 # shares two used ones, takes one
    assert (engine.manager.num_free_blocks, engine.wrong_reads) == (0, 0)


def one_token_is_left_to_compute(manager, bs=4):
    for length, expected in ((bs - 1, bs - 1), (bs, bs), (bs + 1, 1), (2 * bs, bs)):
        engine = ToyEngine(manager(8, bs))
        engine.step([Sequence([1] * length)])
        before = engine.computed
        engine.step([Sequence([1] * length)])        # asked again, while the first goes on
        assert (engine.computed - before - 1, engine.wrong_reads) == (expected, 0)
        a, b = engine.running
        assert a.block_table[-1] != b.block_table[-1], "writes into a block that others share"


def a_failed_step_leaves_nothing(manager):
    engine = ToyEngine(manager(8, 4))
    engine.step([Sequence([1] * 9)], fails=True)
    engine.step([Sequence([1] * 9)])
    assert (engine.computed, engine.wrong_reads) == (9, 0)


def only_full_blocks_are_found(manager):
    engine = ToyEngine(manager(8, 4))
    engine.step([Sequence([1] * 6)])
    assert len(engine.manager.cached_blocks) == 1
    engine.step([Sequence([1] * 12)], chunk=6)       # a chunk that ends inside a block
    assert engine.wrong_reads == 0


def equal_prompts_of_a_step_share(manager):
    engine = ToyEngine(manager(64, 4))
    engine.step([Sequence([1] * 22) for _ in range(8)])
    assert engine.computed == 22 + 7 * 2             # 20 tokens are shared, two are each one's own
    assert (engine.manager.num_used_blocks, engine.wrong_reads) == (5 + 8, 0)


def no_other_text_is_read(manager):
    engine = ToyEngine(manager(16, 4))
    engine.step([Sequence([1, 2, 3, 4, 7, 7, 7, 7, 5])])
    engine.step([Sequence([4, 3, 2, 1, 7, 7, 7, 7, 5])])         # the same sums
    engine.step([Sequence([7, 7, 7, 7, 5])])                     # the tokens of a second block
    assert engine.wrong_reads == 0


def a_waiting_prompt_is_hashed_once(manager, steps=50):
    calls, original = [], block_manager.block_digest

    def counting(parent, token_ids):
        calls.append(parent)
        return original(parent, token_ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_manager, "block_digest", counting)
        pool = manager(260, 16)
        head, seq = Sequence(list(range(200))), Sequence(list(range(4000)))
        pool.allocate(head)
        pool.announce(head, 200)
        pool.publish()
        pool.free_blocks.clear()                     # as if the rest were in use
        calls.clear()
        for _ in range(steps):
            assert pool.allocate(seq) is not None
    assert len(calls) <= 250


def nothing_is_freed_twice(manager):
    pool, seq = manager(4, 4), Sequence([1] * 8)
    pool.allocate(seq)
    pool.free(seq)
    pool.free(seq)                                   # an abort that crosses a finish
    assert [b.ref_count for b in pool.blocks] == [0] * 4 and pool.num_free_blocks == 4


def two_managers_have_two_sizes(manager):
    small, large = manager(8, 4), manager(8, 16)
    assert (small.blocks_for(16), large.blocks_for(16)) == (4, 1)


TRAPS = [
    (evicted_is_forgotten, StaleHash), (the_first_of_duplicates_stays, LastWins),
    (a_hit_on_a_free_block_costs_one, CountsNewOnly), (a_hit_on_a_free_block_costs_one, StaysFree),
    (one_token_is_left_to_compute, NoCap), (a_failed_step_leaves_nothing, PublishesEarly),
    (only_full_blocks_are_found, PartialBlocks), (equal_prompts_of_a_step_share, NoPending),
    (no_other_text_is_read, ToyHash), (no_other_text_is_read, NoParent),
    (a_waiting_prompt_is_hashed_once, Rehash), (nothing_is_freed_twice, KeepsTable),
    (two_managers_have_two_sizes, SizeOfTheClass),
]


@pytest.mark.parametrize("check, broken", TRAPS, ids=[broken.__name__ for _, broken in TRAPS])
def test_a_mistake_is_caught(check, broken):
    with pytest.raises(Exception):
        check(broken)
    check(BlockManager)


def make_machine(manager):
    class Machine(RuleBasedStateMachine):
        def __init__(self):
            super().__init__()
            self.engine, self.waiting = ToyEngine(manager(7, 2)), []

        @rule(prompts=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=7), max_size=3),
              chunk=st.sampled_from((1, 2, 3, 99)))
        def step(self, prompts, chunk):
            self.waiting += [Sequence(p) for p in prompts]
            self.waiting = [s for s in self.engine.step(self.waiting, chunk) if len(s) < 10]

        @rule()
        def failing_step(self):
            self.waiting = self.engine.step(self.waiting, fails=True)

        @precondition(lambda self: self.engine.running)
        @rule(pick=st.integers(0, 9), again=st.booleans())
        def finish(self, pick, again):
            seq = self.engine.running[pick % len(self.engine.running)]
            self.engine.drop(seq)
            if again:
                self.engine.manager.free(seq)        # an abort after the end: nothing may happen

        @invariant()
        def books_agree(self):
            pool = self.engine.manager
            held = Counter(i for s in self.engine.running for i in s.block_table)
            assert all(len(set(s.block_table)) == len(s.block_table) for s in self.engine.running)
            assert all(b.ref_count == held[b.block_id] for b in pool.blocks)
            assert set(pool.free_blocks) == {b.block_id for b in pool.blocks if b.ref_count == 0}
            assert pool.num_free_blocks + pool.num_used_blocks == pool.num_blocks

        @invariant()
        def map_tells_the_truth(self):
            pool = self.engine.manager
            bs = pool.block_size
            for digest, block in pool.cached_blocks.items():
                last = self.engine.slots.get(block.block_id * bs + bs - 1)
                assert last is not None and len(last) % bs == 0, "not written, or not full"
                truth = BlockManager(1, bs)._digest(Sequence(last), len(last) // bs - 1)
                assert block.hash == digest == truth
            assert not pool.pending_blocks and self.engine.wrong_reads == 0
    return Machine


MODEST = settings(max_examples=60, stateful_step_count=15, deadline=None, derandomize=True,
                  database=None, report_multiple_bugs=False,
                  suppress_health_check=list(HealthCheck))


def test_any_order_of_operations():
    run_state_machine_as_test(make_machine(BlockManager), settings=MODEST)


@pytest.mark.parametrize("broken", [StaleHash, NoCap, PublishesEarly])
def test_the_machine_finds_mistakes(broken):
    quick = settings(MODEST, phases=[Phase.generate])    # the shortest history is not needed
    with pytest.raises(Exception):
        run_state_machine_as_test(make_machine(broken), settings=quick)


def test_a_prefix_freed_forwards_costs_more():
    """Day 3's exercise: `turns.answers.day3.frees_forwards` measures it on any workload."""
    from random import Random

    from turns.answers.day3 import frees_forwards

    def run_workload(manager, seed, steps):
        rng, engine, waiting = Random(seed), ToyEngine(manager), []
        for step in range(steps):
            if step % 3 == 0:
                question = [rng.randrange(3, 9) for _ in range(rng.randrange(2, 9))]
                waiting.append(Sequence(rng.choice(([1] * 9, [2] * 8)) + question))
                waiting[-1].ends_at = len(waiting[-1]) + rng.randrange(3, 10)
            waiting = engine.step(waiting)
            for seq in [s for s in engine.running if len(s) > s.ends_at]:
                engine.drop(seq)
        return engine

    computed = frees_forwards(run_workload)
    assert computed["FreesForwards"] > computed["BlockManager"]
