"""Graders of day 7: latencies, the limit of a step, and a leak."""

import random

from turns import Wrong, turn


def close(a, b):
    return a is not None and abs(a - b) <= 1e-9 * max(1.0, abs(b))


def same(found, wanted):
    """Whether two lists (or tuples, or arrays) hold the same numbers."""
    return len(found) == len(wanted) and all(map(close, found, wanted))


@turn
def waits_of_a_queue(written):
    """Waits counted from when a request was due, for a server that takes one at a time."""
    got = written([0.0, 1.0, 2.0], 1.0)
    if not same(got, [1.0, 1.0, 1.0]):
        raise Wrong(f"due at 0, 1, 2 and 1 s each: {got} and not [1, 1, 1]",
                    "the server is free at each arrival: a wait is the service alone")
    got = written([0.0, 0.0, 0.0], 2.0)
    if not same(got, [2.0, 4.0, 6.0]):
        raise Wrong(f"three due at 0 and 2 s each: {got} and not [2, 4, 6]",
                    "count from when a request was due, not from when its turn came")
    got = written([0.0, 10.0], 2.0)
    if not same(got, [2.0, 2.0]):
        raise Wrong(f"due at 0 and 10: {got} and not [2, 2]",
                    "the server is idle from 2 to 10: it begins at the later of free and due")
    rng = random.Random(0)
    for _ in range(50):
        due = sorted(rng.uniform(0, 20) for _ in range(rng.randint(1, 15)))
        each, free, want = rng.uniform(.1, 3), 0.0, []
        for t in due:
            free = max(free, t) + each
            want.append(free - t)
        got = written(due, each)
        if not same(got, want):
            raise Wrong(f"due at {due[:3]}…, {each:.2f} s each: {got[:3]}… and not {want[:3]}…")


@turn
def goodput(written):
    """Requests a second that kept both promises."""
    arrived, seconds = [0.0, 0.0, 1.0], 4.0
    times = [[.5, .6], [.5, 1.9], [3.0, 3.1]]      # kept; a gap too long; a first token too late
    got = written(arrived, times, seconds, 1.0, .5)
    if not close(got, .25):
        raise Wrong(f"one of three requests kept the promise, in 4 s: {got} and not 0.25",
                    "the first token counts from `arrived`; and every gap must be short enough")
    got = written([0.0], [[.1, .2, 5.0, 5.1]], 10.0, 1.0, 2.0)
    if got != 0:
        raise Wrong(f"one gap of 4.8 s and 2 s are allowed: {got} and not 0",
                    "the mean of the gaps hides the one that the user noticed")
    got = written([0.0, 0.0], [[], [.5]], 2.0, 1.0, 1.0)
    if not close(got, .5):
        raise Wrong(f"one request was never served, the other has one token: {got} and not 0.5",
                    "a request without tokens kept nothing; one token has no gap")
    got = written([0.0, 5.0], [[.5], [5.5, 5.6]], 2.0, 1.0, .25)
    if not close(got, 1.0):
        raise Wrong(f"the second is due at 5, its first token comes at 5.5, and 1 s is allowed; "
                    f"both kept it, in 2 s: {got} and not 1",
                    "the wait for the first token is counted from when its request was due, and "
                    "is no gap between two tokens")
    got = written([0.0], [[.5, .75, 1.0]], 1.0, .5, .25)
    if not close(got, 1.0):
        raise Wrong(f"first token after exactly 0.5 s, gaps of exactly 0.25 s, and so much is "
                    f"allowed: {got} and not 1", "a limit that is just met is kept")


@turn
def step_limit(written):
    """The least seconds of a decode step: weights and cache over the bandwidth, or arithmetic."""
    known = dict(weight_bytes=1e9, kv_bytes_per_token=1e5, bandwidth=1e11, flops=1e13)
    cases = [((1, 0), "the weights are read once"), ((8, 0), "all rows share one read of the "
             "weights"), ((8, 1000), "every row reads its own keys and values"),
             ((4096, 0), "with so many rows the arithmetic takes longer than the reading: two "
              "operations a weight and row, two bytes a weight"),
             ((4096, 20), "the arithmetic of the weights takes longest; attention's operations "
              "are left out")]
    for (rows, context), hint in cases:
        moved = known["weight_bytes"] + rows * context * known["kv_bytes_per_token"]
        want = max(moved / known["bandwidth"], rows * known["weight_bytes"] / known["flops"])
        got = written(rows, context, **known)
        if not close(got, want):
            raise Wrong(f"{rows} rows of {context} tokens: {got} s and not {want} s", hint)


@turn
def abort_request(written):
    """An abort that leaves no block, no row and no record behind, wherever the request stands."""
    from pathlib import Path

    import nanovllm
    from nanovllm import LLM, SamplingParams
    demo = Path(nanovllm.__file__).parent / "demo_model"
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    with LLM(demo, device="cpu", num_kvcache_blocks=40, max_num_seqs=2, kernels="plain",
             enable_prefix_caching=False) as llm:
        for late in (False, True):
            ids = [llm.add_request([2 + i] * 40, params) for i in range(4)]
            if late:
                llm.step()                        # two run now, and two wait
            written(llm, ids[0]), written(llm, ids[3])
            if len(llm.scheduler.running) + len(llm.scheduler.waiting) != 2:
                raise Wrong("an aborted request still stands in a queue"
                            + (" (one ran and one waited)" if late else " (all waited)"),
                            "Scheduler.finish ends a sequence wherever it stands")
            if set(llm.requests) != set(ids[1:3]):
                raise Wrong("llm.requests still knows the aborted request", "pop it")
            while not llm.is_finished():
                llm.step()
            if held := llm.block_manager.num_used_blocks:
                raise Wrong(f"{held} blocks are held although nobody is served",
                            "its blocks must go back: Scheduler.finish frees them")
        written(llm, ids[0])                      # a request that is gone is no error
        first, long, short = (llm.add_request([2] * n, params) for n in (300, 400, 40))
        llm.step()                                # 19 of 40 blocks taken; the next asks for 25
        written(llm, long)
        llm.step()
        if len(llm.scheduler.running) != 2:
            raise Wrong("the first in the queue was aborted; the next would fit, and is not let in",
                        "the scheduler remembers how many blocks the first in line needs; "
                        "Scheduler.finish forgets it")
