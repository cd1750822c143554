"""Blocks: none is lost or given twice, and what is shared has the same tokens."""

import random
from collections import Counter

import pytest

from nanovllm import SamplingParams
from nanovllm.engine.block_manager import BlockManager, block_digest
from nanovllm.engine.sequence import Sequence


def run(manager, seq):
    """As a step does that computes all of a sequence."""
    manager.announce(seq, seq.num_uncomputed_tokens)
    manager.publish()
    seq.num_computed_tokens = len(seq)


def admitted(manager, tokens, **params):
    """A sequence with its block table, computed."""
    seq = Sequence(tokens, SamplingParams(**params))
    assert manager.allocate(seq) is None
    seq.cached = seq.num_computed_tokens
    run(manager, seq)
    return seq


def sound(manager, seqs):
    """Every count is that of the tables, every digest leads to its block."""
    held = Counter(block for seq in seqs for block in seq.block_table)
    for block in manager.blocks:
        assert block.ref_count == held[block.block_id]
        assert (block.ref_count == 0) == (block.block_id in manager.free_blocks)
        assert block.hash is None or manager.cached_blocks[block.hash] is block
    assert all(block.hash == digest for digest, block in manager.cached_blocks.items())


@pytest.mark.parametrize("num_blocks, block_size", [(0, 4), (4, 0)])
def test_nothing_to_manage(num_blocks, block_size):
    with pytest.raises(ValueError, match="at least 1"):
        BlockManager(num_blocks, block_size)


def test_blocks_for():
    manager = BlockManager(4, 4)
    assert [manager.blocks_for(n) for n in (1, 4, 5, 8)] == [1, 1, 2, 2]


def test_allocate_and_free():
    manager = BlockManager(4, 4)
    seq = admitted(manager, range(9))
    assert len(set(seq.block_table)) == 3
    assert (manager.num_used_blocks, manager.num_free_blocks) == (3, 1)
    manager.free(seq)
    assert seq.block_table == [] and seq.num_computed_tokens == 0 and manager.num_used_blocks == 0


def test_what_does_not_fit_changes_nothing():
    """It says how many blocks are wanted."""
    manager = BlockManager(4, 4)
    first = admitted(manager, range(9))
    seq = Sequence(range(100, 108))
    assert manager.allocate(seq) == 2 and seq.block_table == []
    sound(manager, [first])


def test_a_slot_for_the_next_token():
    manager = BlockManager(2, 2)
    seq = admitted(manager, [1, 2])
    assert manager.append_slot(seq) and len(seq.block_table) == 1      # the last token has one
    assert manager.append_slot(seq, ahead=1) and len(seq.block_table) == 2
    for token in (3, 4, 5):
        seq.append_token(token)
    assert not manager.append_slot(seq) and len(seq.block_table) == 2


def test_full_blocks_are_shared():
    """The last token is always computed, so its block is not."""
    manager = BlockManager(8, 4)
    first = admitted(manager, range(9))
    second = admitted(manager, range(8))
    assert second.cached == 4 and second.block_table[0] == first.block_table[0]
    assert second.block_table[1] != first.block_table[1]
    third = admitted(manager, range(9))
    assert third.cached == 8 and third.block_table[:2] == first.block_table[:2]
    sound(manager, [first, second, third])


def test_what_was_freed_is_found_again_until_it_is_taken():
    manager = BlockManager(3, 4)
    manager.free(admitted(manager, range(9)))
    again = admitted(manager, range(9))
    assert again.cached == 8
    manager.free(again)
    manager.free(admitted(manager, range(50, 62)))                      # takes all three blocks
    assert admitted(manager, range(9)).cached == 0


def test_a_prefix_outlives_what_follows_it():
    """Of one sequence the last block is used again first."""
    manager = BlockManager(3, 4)
    manager.free(admitted(manager, range(12)))
    manager.free(admitted(manager, [99]))                               # takes one block
    assert admitted(manager, range(12)).cached == 8


def test_the_same_tokens_after_others_are_another_block():
    manager = BlockManager(8, 4)
    admitted(manager, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert admitted(manager, [0, 0, 0, 0, 5, 6, 7, 8, 9]).cached == 0
    assert block_digest(b"a", [1]) != block_digest(b"b", [1])


def test_no_sharing_where_it_is_off_or_unwanted():
    manager = BlockManager(8, 4, enable_prefix_caching=False)
    admitted(manager, range(9))
    assert admitted(manager, range(9)).cached == 0 and not manager.cached_blocks
    manager = BlockManager(8, 4)
    admitted(manager, range(9))
    assert admitted(manager, range(9), prompt_logprobs=0).cached == 0   # it wants them all


def test_two_in_the_same_step():
    """The second shares what the first is about to write, and nothing if that step fails."""
    manager = BlockManager(8, 4)
    first, second, third = (Sequence(range(9)) for _ in range(3))
    manager.allocate(first)
    manager.announce(first, 9)
    manager.allocate(second)
    assert second.num_computed_tokens == 8 and second.block_table[:2] == first.block_table[:2]
    manager.free(second)
    manager.discard_pending()
    manager.allocate(third)
    assert third.num_computed_tokens == 0 and not manager.cached_blocks


def test_half_full_blocks_are_not_announced():
    manager = BlockManager(8, 4)
    seq = Sequence(range(11))
    manager.allocate(seq)
    manager.announce(seq, 7)
    assert len(manager.pending_blocks) == 1
    manager.publish()
    assert len(manager.cached_blocks) == 1 and not manager.pending_blocks


def test_blocks_of_who_was_freed_in_the_step_are_not_published():
    manager = BlockManager(8, 4)
    seq = Sequence(range(9))
    manager.allocate(seq)
    manager.announce(seq, 9)
    manager.free(seq)
    manager.publish()
    assert not manager.cached_blocks


@pytest.mark.parametrize("seed", range(20))
def test_the_books_after_anything(seed):
    rng = random.Random(seed)
    manager = BlockManager(rng.choice([6, 12]), rng.choice([1, 2, 4]), rng.random() < .8)
    alive = []
    for _ in range(200):
        if rng.random() < .5:
            seq = Sequence([rng.randrange(3) for _ in range(rng.randrange(1, 14))])
            wanted = manager.allocate(seq)
            if wanted is None:
                run(manager, seq)
                alive.append(seq)
            else:
                assert wanted > manager.num_free_blocks and not seq.block_table
        elif alive and rng.random() < .5:
            manager.free(alive.pop(rng.randrange(len(alive))))
        elif alive:
            seq = rng.choice(alive)
            seq.append_token(rng.randrange(3))
            if manager.append_slot(seq):
                run(manager, seq)
            else:
                seq.token_ids.pop()
        sound(manager, alive)
        owner = {}                      # a block that two tables hold has the same past in both
        for seq in alive:
            for i, block in enumerate(seq.block_table):
                past = seq.token_ids[:(i + 1) * manager.block_size]
                assert owner.setdefault(block, past) == past


def test_reset_believes_what_two_sides_say():
    """After an error between two lines: a block that was taken, one half published."""
    manager = BlockManager(6, 4)
    kept = admitted(manager, range(9))
    first, second = (manager.blocks[i] for i in kept.block_table[:2])
    taken = manager._take()                                 # in no table yet
    second.hash = None                                      # forgotten, but for the map's entry
    lost = manager.blocks[kept.block_table[2]]
    lost.hash = b"not in the map"
    manager.pending_blocks[b"pending"] = taken
    manager.reset()
    sound(manager, [])
    assert list(manager.cached_blocks.values()) == [first] and not manager.pending_blocks
    assert manager.num_free_blocks == 6 and next(reversed(manager.free_blocks)) == first.block_id
    assert admitted(manager, range(9)).cached == 4


def test_forget():
    manager = BlockManager(6, 4)
    bad, other = admitted(manager, range(9)), admitted(manager, range(4, 13))
    manager.forget(bad)
    manager.free(bad)
    sound(manager, [other])
    manager.free(other)
    assert admitted(manager, range(9)).cached == 0 and admitted(manager, range(4, 13)).cached == 8
