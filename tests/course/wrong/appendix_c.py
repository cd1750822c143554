"""Typical wrong answers: (name, what was written, a word of the verdict)."""

import asyncio
import json
import math


def each_chunk_alone(chunks):
    for chunk in chunks:
        for event in chunk.split(b"\n\n"):
            if event == b"data: [DONE]":
                return
            if event:
                yield json.loads(event.removeprefix(b"data: "))


def join_first(chunks):
    data = b""
    for chunk in chunks:
        data += chunk
        if data.endswith(b"[DONE]\n\n"):
            break
    return [json.loads(event[6:]) for event in data.split(b"\n\n")[:-2]]


def done_is_json(chunks):
    waiting = b""
    for chunk in chunks:
        *whole, waiting = (waiting + chunk).split(b"\n\n")
        yield from (json.loads(event[6:]) for event in whole)


def decodes_each_chunk(chunks):
    waiting = ""
    for chunk in chunks:
        *whole, waiting = (waiting + chunk.decode()).split("\n\n")
        for event in whole:
            if event == "data: [DONE]":
                return
            yield json.loads(event[6:])


def reads_on(chunks):
    waiting = b""
    for chunk in chunks:
        *whole, waiting = (waiting + chunk).split(b"\n\n")
        yield from (json.loads(event[6:]) for event in whole if event != b"data: [DONE]")


def full(held, user, count, most):
    from nanovllm.serve import QueueFull
    if held.get(user, 0) + count > most:
        raise QueueFull(user)


async def enters_after_await(held, user, count, most, work):
    full(held, user, count, most)
    await asyncio.sleep(0)
    held[user] = held.get(user, 0) + count
    try:
        return await work()
    finally:
        held[user] -= count


async def enters_when_it_is_over(held, user, count, most, work):
    full(held, user, count, most)
    result = await work()
    held[user] = held.get(user, 0) + count
    held[user] -= count
    return result


async def no_finally(held, user, count, most, work):
    full(held, user, count, most)
    held[user] = held.get(user, 0) + count
    result = await work()
    held[user] -= count
    return result


async def no_hang_up(held, user, count, most, work):
    full(held, user, count, most)
    held[user] = held.get(user, 0) + count
    try:
        result = await work()
    except Exception:
        held[user] -= count
        raise
    held[user] -= count
    return result


async def gives_back_what_it_never_had(held, user, count, most, work):
    held.setdefault(user, 0)
    try:
        full(held, user, count, most)
        held[user] += count
        return await work()
    finally:
        held[user] -= count


async def one_less(held, user, count, most, work):
    full(held, user, count + 1, most)
    held[user] = held.get(user, 0) + count
    try:
        return await work()
    finally:
        held[user] -= count


def after_alone(before, after, share):
    return min(limit for limit, n in after.items() if n >= share * after[math.inf])


def sums_again(before, after, share):
    came, total = {limit: after[limit] - before[limit] for limit in after}, 0
    for limit, count in came.items():
        total += count
        if total >= share * came[math.inf]:
            return limit


def more_than_the_share(before, after, share):
    came = {limit: after[limit] - before[limit] for limit in after}
    return min((limit for limit, n in came.items() if n > share * came[math.inf]), default=None)


WRONG = [
    ("read_events", each_chunk_alone, "keep the rest"),
    ("read_events", join_first, "as soon as"),
    ("read_events", done_is_json, "[DONE] is no JSON"),
    ("read_events", decodes_each_chunk, "within a character"),
    ("read_events", reads_on, "behind [DONE]"),
    ("with_share", enters_after_await, "no await"),
    ("with_share", enters_when_it_is_over, "before you await"),
    ("with_share", no_finally, "finally"),
    ("with_share", no_hang_up, "hung up"),
    ("with_share", gives_back_what_it_never_had, "entered nothing"),
    ("with_share", one_less, "more than `most`"),
    ("percentile", after_alone, "in between"),
    ("percentile", sums_again, "sums already"),
    ("percentile", more_than_the_share, "at least"),
]
