"""One step as the model sees it, and that each thread sees its own."""

import threading

import pytest
import torch

from nanovllm.utils.context import (
    Context, get_context, packed_context, reset_context, set_context, use_context,
)


def step(n=1):
    """A decode row and a prompt of n + 1 tokens."""
    return Context.pack([5, *range(6, 7 + n)], [8, *range(n + 1)], [3, *range(n + 1)],
                        [0, 1, 2 + n], [9, n + 1], [[0, 2], [1]], [0, 1 + n])


def test_layout():
    """The tensors are views of one, in this order."""
    context = step(2)
    assert context.ints.dtype is torch.int32
    assert context.ints.tolist() == [5, 6, 7, 8, 8, 0, 1, 2, 3, 0, 1, 2, 0, 1, 4, 9, 3, 0, 2, 1, 0]
    context.ints.fill_(77)
    for name in ("input_ids", "positions", "slot_mapping", "cu_seqlens_q", "context_lens",
                 "block_tables"):
        assert (getattr(context, name) == 77).all(), name


def test_what_pack_counts():
    context = step(2)
    assert (context.num_decode_rows, context.max_seqlen_q, context.max_context_len) == (1, 3, 9)
    assert context.shape == (4, 2, 2, 1, 3, 9) and context.samples == [0, 3]
    assert context.block_tables.tolist() == [[0, 2], [1, 0]]
    decode = Context.pack([5, 6], [3, 4], [0, 1], [0, 1, 2], [4, 5], [[0], [1]])
    assert (decode.num_decode_rows, decode.max_seqlen_q) == (2, 1)


def test_from_ints_is_the_other_way():
    context = step(2)
    again = Context.from_ints(context.ints, *context.shape, context.samples)
    for name in ("input_ids", "positions", "slot_mapping", "cu_seqlens_q", "context_lens",
                 "block_tables"):
        assert torch.equal(getattr(again, name), getattr(context, name)), name
    assert again.shape == context.shape and again.samples == context.samples


def test_on_its_device_it_stays_itself():
    context = step()
    assert context.to("cpu") is context
    there = context.to("meta")
    assert there.input_ids.device.type == "meta" and there.shape == context.shape


def test_whole_sequences_without_a_cache():
    context = packed_context([3, 1, 2])
    assert context.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert context.cu_seqlens_q.tolist() == [0, 3, 4, 6] and context.max_seqlen_q == 3
    assert not context.input_ids.any() and context.block_tables.shape == (3, 0)


def test_outside_of_a_step_there_is_none():
    with pytest.raises(RuntimeError, match="no step in flight.*use_context"):
        get_context()


def test_one_step_inside_another():
    outer, inner = step(1), step(2)
    with use_context(outer):
        with pytest.raises(ZeroDivisionError), use_context(inner) as given:
            assert get_context() is given is inner
            1 / 0
        assert get_context() is outer
    with pytest.raises(RuntimeError):
        get_context()


def test_set_and_reset():
    context = step()
    set_context(context)
    assert get_context() is context
    reset_context()
    with pytest.raises(RuntimeError):
        get_context()


def test_each_thread_sees_its_own():
    both, seen, problems = threading.Barrier(2), {}, []

    def work(name, context):
        try:
            with pytest.raises(RuntimeError):
                get_context()                     # that of the main thread is not its own
            with use_context(context):
                both.wait(10)
                seen[name] = get_context()
                both.wait(10)
        except BaseException as error:
            problems.append(error)

    steps = {"one": step(1), "two": step(2)}
    with use_context(step(3)) as mine:
        threads = [threading.Thread(target=work, args=item) for item in steps.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert get_context() is mine
    assert not problems and all(seen[name] is context for name, context in steps.items())
