"""One solution of each turn of appendix C."""

import json
import math


def read_events(chunks):
    waiting = b""
    for chunk in chunks:
        *whole, waiting = (waiting + chunk).split(b"\n\n")
        for event in whole:
            text = event.removeprefix(b"data: ")
            if text == b"[DONE]":
                return
            yield json.loads(text)


async def with_share(held, user, count, most, work):
    from nanovllm.serve import QueueFull
    if held.get(user, 0) + count > most:
        raise QueueFull(f"{user} has {held.get(user, 0)} unfinished requests, {most} at most")
    held[user] = held.get(user, 0) + count       # no await since the check: nobody came between
    try:
        return await work()
    finally:
        held[user] -= count
        if not held[user]:
            del held[user]                       # the books forget who has none


def percentile(before, after, share):
    came = {limit: after[limit] - before[limit] for limit in after}
    if not came[math.inf]:
        return None
    return min(limit for limit, count in came.items() if count >= share * came[math.inf])
