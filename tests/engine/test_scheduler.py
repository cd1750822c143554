"""Who runs next, with how many tokens, and what becomes of those who do not fit."""

import random

import pytest

from nanovllm import SamplingParams
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence, SequenceStatus


def make(num_blocks=32, block_size=4, **settings):
    return Scheduler(BlockManager(num_blocks, block_size), **settings)


def add(scheduler, length, max_tokens=16, first=0, **params):
    seq = Sequence(range(first, first + length), SamplingParams(max_tokens=max_tokens, **params))
    scheduler.add_sequence(seq)
    return seq


def step(scheduler, token=7):
    """One step; its rows as (sequence, tokens, whether it samples), and who is finished."""
    batch = scheduler.schedule()
    rows = [(row.seq, row.num_new_tokens, row.samples) for row in batch]
    return rows, scheduler.postprocess(batch, [token] * sum(row.samples for row in batch))


def test_nothing_to_do():
    scheduler = make()
    assert scheduler.is_finished() and scheduler.schedule() == []


def test_a_prompt_then_token_by_token():
    scheduler = make()
    seq = add(scheduler, 5, max_tokens=3)
    assert step(scheduler) == ([(seq, 5, True)], [])
    assert seq.status is SequenceStatus.RUNNING
    assert step(scheduler) == ([(seq, 1, True)], [])
    assert step(scheduler) == ([(seq, 1, True)], [seq])
    assert seq.completion_token_ids == [7, 7, 7] and seq.finish_reason == "length"
    assert scheduler.is_finished() and scheduler.block_manager.num_used_blocks == 0


def test_decode_rows_lead_and_prompts_take_what_is_left():
    scheduler = make(max_num_batched_tokens=6)
    first = add(scheduler, 4)
    step(scheduler)
    second = add(scheduler, 12, first=50)
    assert step(scheduler)[0] == [(first, 1, True), (second, 5, False)]
    assert step(scheduler)[0] == [(first, 1, True), (second, 5, False)]
    assert step(scheduler)[0] == [(first, 1, True), (second, 2, True)]
    assert second.num_completion_tokens == 1


def test_the_budget_is_never_exceeded():
    scheduler = make(max_num_batched_tokens=7)
    for i in range(4):
        add(scheduler, 9, max_tokens=4, first=20 * i)
    while not scheduler.is_finished():
        rows, _ = step(scheduler)
        assert 0 < sum(n for _, n, _ in rows) <= 7


def test_no_more_rows_than_max_num_seqs():
    scheduler = make(max_num_seqs=2)
    seqs = [add(scheduler, 3, max_tokens=2, first=10 * i) for i in range(3)]
    assert [row[0] for row in step(scheduler)[0]] == seqs[:2]
    assert step(scheduler)[1] == seqs[:2]
    assert [row[0] for row in step(scheduler)[0]] == seqs[2:]


def test_first_come_first_served():
    """A small request does not overtake one that waits for memory."""
    scheduler = make(num_blocks=4)
    add(scheduler, 9)
    step(scheduler)
    large, small = add(scheduler, 8, first=50), add(scheduler, 2, first=90)
    step(scheduler)
    assert list(scheduler.waiting) == [large, small]
    assert scheduler.blocks_wanted == 2


def test_the_youngest_makes_room():
    """It goes to the head of the queue, and is computed again, its answer so far included."""
    scheduler = make(num_blocks=4)
    old, young = add(scheduler, 8, max_tokens=9), add(scheduler, 7, max_tokens=9, first=50)
    late = add(scheduler, 1, first=90)
    step(scheduler)
    rows, _ = step(scheduler)
    assert rows == [(old, 1, True)] and young.num_preemptions == scheduler.num_preemptions == 1
    assert young.status is SequenceStatus.WAITING and list(scheduler.waiting) == [young, late]
    assert young.block_table == [] and young.completion_token_ids == [7]
    while old.finish_reason is None:
        step(scheduler)
    while not scheduler.is_finished():
        step(scheduler)
    assert young.num_completion_tokens == 9 and young.num_cached_tokens == 0


def test_a_sequence_alone_ends_when_memory_does():
    """All slots, and one token that needs no key."""
    scheduler = make(num_blocks=2)
    seq = add(scheduler, 5, max_tokens=100)
    while not scheduler.is_finished():
        step(scheduler)
    assert len(seq) == 9 and seq.finish_reason == "length" and scheduler.num_preemptions == 0


def test_the_end_of_sequence_and_who_ignores_it():
    scheduler = make(eos_token_ids=[7])
    one, other = add(scheduler, 3), add(scheduler, 3, max_tokens=2, ignore_eos=True, first=9)
    assert step(scheduler)[1] == [one] and one.finish_reason == "stop"
    assert step(scheduler)[1] == [other] and other.finish_reason == "length"


def test_max_model_len_ends_it():
    scheduler = make(max_model_len=6)
    seq = add(scheduler, 4)
    step(scheduler)
    assert step(scheduler)[1] == [seq] and len(seq) == 6


def test_the_prefix_cache_counts_once():
    """What a preempted sequence finds of its own is no hit."""
    scheduler = make()
    first = add(scheduler, 9, max_tokens=1)
    step(scheduler)
    second = add(scheduler, 9)
    assert step(scheduler)[0] == [(second, 1, True)]
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 8)
    scheduler.preempt(second)
    step(scheduler)
    assert second.num_cached_tokens == 8


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_finish_wherever_it_stands(steps):
    scheduler = make(max_num_batched_tokens=6)
    seqs = [add(scheduler, 5, first=20 * i) for i in range(2)]
    for _ in range(steps):
        step(scheduler)
    scheduler.finish(seqs[0], "abort")
    assert seqs[0].finish_reason == "abort" and seqs[0].block_table == []
    while not scheduler.is_finished():
        step(scheduler)
    assert seqs[1].num_completion_tokens == 16
    assert scheduler.block_manager.num_used_blocks == 0


def test_rollback_puts_all_back_in_their_order():
    scheduler = make(max_num_seqs=3)
    seqs = [add(scheduler, 5, first=20 * i) for i in range(4)]
    step(scheduler)
    scheduler.schedule()
    scheduler.rollback()
    manager = scheduler.block_manager
    assert list(scheduler.waiting) == seqs and not scheduler.running
    assert manager.num_used_blocks == 0 and not manager.pending_blocks
    assert [seq.num_completion_tokens for seq in seqs] == [1, 1, 1, 0]
    assert [row[0] for row in step(scheduler)[0]] == seqs[:3]


@pytest.mark.parametrize("seed", range(20))
def test_everybody_is_served(seed):
    """Whatever comes, goes and fails: all get their tokens, and each is computed in order."""
    rng = random.Random(seed)
    scheduler = make(rng.choice([8, 20]), rng.choice([1, 4]), max_num_seqs=rng.choice([1, 3, 9]),
                     max_num_batched_tokens=rng.choice([1, 5, 40]))
    seqs, pending = [], 20
    while pending or not scheduler.is_finished():
        if pending and rng.random() < .4:
            pending -= 1
            seqs.append(add(scheduler, rng.randrange(1, 7), rng.randrange(1, 9),
                            first=rng.randrange(3)))
        if not (batch := scheduler.schedule()):
            continue
        if rng.random() < .05:
            scheduler.rollback()
            continue
        for row in batch:
            seq, end = row.seq, row.seq.num_computed_tokens + row.num_new_tokens
            assert end <= len(seq.block_table) * scheduler.block_manager.block_size
            assert row.samples == (end == len(seq))
        scheduler.postprocess(batch, [7] * sum(row.samples for row in batch))
    for seq in seqs:
        assert seq.finish_reason == "length" and seq.status is SequenceStatus.FINISHED
        assert seq.num_completion_tokens == min(seq.sampling_params.max_tokens,
                                                scheduler.max_tokens - seq.num_prompt_tokens)
    assert scheduler.block_manager.num_used_blocks == 0


def test_rollback_writes_the_queues_anew():
    """From those that are not finished, whatever the queues say; who has its last token ends."""
    scheduler = make(max_num_seqs=3)
    seqs = [add(scheduler, 5, max_tokens=2, first=20 * i) for i in range(4)]
    step(scheduler)
    seqs[1].append_token(7)                             # booked, and then came the error
    scheduler.running.clear()
    scheduler.waiting.clear()
    seqs[2].block_table = []
    scheduler.rollback(seqs)
    assert list(scheduler.waiting) == [seqs[0], *seqs[2:]] and not scheduler.running
    assert seqs[1].finish_reason == "length" and scheduler.block_manager.num_used_blocks == 0
    assert all(seq.num_computed_tokens == 0 and not seq.block_table for seq in seqs)


def test_a_row_without_a_token():
    """Its logits were no numbers: it ends, and what it wrote is not found by another."""
    scheduler = make()
    bad, other = add(scheduler, 9), add(scheduler, 9, first=50)
    scheduler.postprocess(scheduler.schedule(), [-1, 7])
    assert bad.finish_reason == "nan" and bad.num_completion_tokens == 0
    assert other.completion_token_ids == [7]
    later = [add(scheduler, 9), add(scheduler, 9, first=50)]
    scheduler.schedule()
    assert [seq.num_cached_tokens for seq in later] == [0, 8]
