"""Wrong books are found: each fault is made on purpose."""

import pytest

from nanovllm import SamplingParams
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.invariants import find_faults
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence, SequenceStatus


@pytest.fixture
def books():
    """A scheduler with one that runs (with full blocks) and one that waits; their ids."""
    scheduler = Scheduler(BlockManager(8, 4), max_num_seqs=1)
    seqs = [Sequence(range(n, n + 9), SamplingParams(max_tokens=5)) for n in (0, 50)]
    for seq in seqs:
        scheduler.add_sequence(seq)
    for _ in range(2):
        scheduler.postprocess(scheduler.schedule(), [7])
    return scheduler, seqs, {seq.seq_id for seq in seqs}


def test_right_books(books):
    scheduler, _, ids = books
    assert find_faults(scheduler, ids) == []
    scheduler.rollback()
    assert find_faults(scheduler, ids) == []


@pytest.mark.parametrize("spoil, complaint", [
    (lambda s, m, a, b: s.waiting.clear(), "stands in 0 queues"),
    (lambda s, m, a, b: s.waiting.append(b), "stands in 2 queues"),
    (lambda s, m, a, b: s.running.clear(), "held by 0"),
    (lambda s, m, a, b: setattr(a, "status", SequenceStatus.WAITING), "runs"),
    (lambda s, m, a, b: setattr(a, "num_computed_tokens", 99), "runs"),
    (lambda s, m, a, b: setattr(b, "num_computed_tokens", 4), "waits"),
    (lambda s, m, a, b: a.block_table.pop(), "held by 0"),
    (lambda s, m, a, b: m.free_blocks.popitem(), "free: False"),
    (lambda s, m, a, b: m.cached_blocks.clear(), "its hash is not remembered"),
    (lambda s, m, a, b: m.cached_blocks.update(x=m.blocks[7]), "by another hash"),
    (lambda s, m, a, b: a.block_digests.reverse(), "that of other tokens"),
    (lambda s, m, a, b: m.pending_blocks.update(x=m.blocks[7]), "still pending")])
def test_wrong_books(spoil, complaint, books):
    scheduler, seqs, ids = books
    spoil(scheduler, scheduler.block_manager, *seqs)
    assert complaint in "; ".join(find_faults(scheduler, ids))
