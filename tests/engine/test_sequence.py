"""A request: what it counts, and how it ends."""

import pytest

from nanovllm import SamplingParams
from nanovllm.engine.sequence import Sequence, SequenceStatus


def test_prompt_and_completion():
    seq = Sequence([5, 6, 7])
    for token in (8, 9):
        seq.append_token(token)
    assert seq.prompt_token_ids == [5, 6, 7] and seq.completion_token_ids == [8, 9]
    assert (len(seq), seq.num_prompt_tokens, seq.num_completion_tokens) == (5, 3, 2)


def test_what_is_left_to_compute():
    seq = Sequence([5, 6, 7])
    assert seq.num_uncomputed_tokens == 3
    seq.num_computed_tokens = 3
    assert seq.num_uncomputed_tokens == 0
    seq.append_token(8)                      # its key and value do not exist yet
    assert seq.num_uncomputed_tokens == 1


def test_the_prompt_is_a_copy():
    prompt = [1, 2]
    Sequence(prompt).append_token(3)
    assert prompt == [1, 2]


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="prompt is empty"):
        Sequence([])


def test_ids_are_new_unless_given():
    first, second = Sequence([1]), Sequence([1])
    assert second.seq_id > first.seq_id and Sequence([1], seq_id=first.seq_id).seq_id == (
        first.seq_id)


@pytest.mark.parametrize("reason", ["stop", "length", "abort"])
def test_the_end(reason):
    seq = Sequence([1], SamplingParams(max_tokens=3))
    assert seq.status is SequenceStatus.WAITING and seq.finish_reason is None
    seq.finish(reason)
    assert seq.status is SequenceStatus.FINISHED and seq.finish_reason == reason
    assert f"id={seq.seq_id}, FINISHED, tokens=1" in repr(seq)
