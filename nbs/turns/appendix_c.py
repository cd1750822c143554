"""Graders of appendix C: a client that reads a stream, a share for each user, a percentile."""

import asyncio
import json
import math
from concurrent.futures import ThreadPoolExecutor

from turns import Wrong, turn

EVENTS = [{"text": "One"}, {"text": "é 漢"}, {"text": ""}, {"text": "\n\n"}]
WAITED = 5                                    # seconds after which nothing is expected any more


def sent(events):
    """The bytes of a stream, as a server that does not write in ASCII sends them."""
    lines = [f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events]
    return "".join([*lines, "data: [DONE]\n\n"]).encode()


@turn
def read_events(written):
    """Chunks of 1, 2, 3, … bytes and whole; each event at once; nothing read behind [DONE]."""
    data = sent(EVENTS)
    for size in (len(data), 60, 7, 3, 1):
        pieces = [data[i:i + size] for i in range(0, len(data), size)]
        said = f"chunks of {size} bytes" if size < len(data) else "a whole stream in one chunk"
        given = 0

        def chunks():
            nonlocal given
            for piece in pieces:
                given += 1
                yield piece
            raise Wrong(f"{said}: another chunk was asked for behind [DONE]",
                        "return at [DONE]: a connection that stays open has no more to say")

        got = []
        try:
            for event in written(chunks()):
                if not got and size < 30 and given > len(pieces) // 2:
                    raise Wrong(f"{said}: the first event came after {given} of {len(pieces)}",
                                "yield each event as soon as its empty line is there")
                got.append(event)
        except json.JSONDecodeError as error:
            raise Wrong(f"{said}: json.loads was given {error.doc!r}",
                        "[DONE] is no JSON: it ends the stream" if "[DONE]" in error.doc else
                        "a chunk may end within an event: keep the rest for the next chunk"
                        ) from error
        except UnicodeDecodeError as error:
            raise Wrong(f"{said}: {error}",
                        "a chunk may end within a character: decode whole events") from error
        if got != EVENTS:
            raise Wrong(f"{said} gave {got} and not {EVENTS}",
                        "a chunk may hold no event, one, or several, and a part of the next")


def in_a_loop(scenario):
    """What the coroutine function `scenario` returns, in a loop and a thread of its own."""
    async def run():
        return await asyncio.wait_for(scenario(), WAITED)

    with ThreadPoolExecutor(1) as thread:     # the notebook's own loop is running already
        return thread.submit(asyncio.run, run()).result()


@turn
def with_share(written):
    """A result, an error, a hang-up, three at once, a refusal, and another user."""
    from nanovllm.serve import QueueFull

    async def answer():
        await asyncio.sleep(0.01)
        return "text"

    async def breaks():
        raise KeyError("of the work")

    def back(held, want, what, hint="give it back in `finally`, which runs however work ends"):
        if {user: n for user, n in held.items() if n} != want:
            raise Wrong(f"{what}: held is {held}, and it should say {want}", hint)

    async def one():
        held = {}
        try:
            got = await written(held, "ann", 2, 2, answer)
        except QueueFull:
            raise Wrong("ann has none, asks for two, and was refused, though two are allowed",
                        "QueueFull is for who would hold more than `most`") from None
        if got != "text":
            raise Wrong(f"the work returned 'text', and with_share {got!r}",
                        "return what the work returns")
        back(held, {}, "the work is over")
        try:
            await written(held, "ann", 1, 2, breaks)
        except KeyError:
            back(held, {}, "the work has raised an error")
        else:
            raise Wrong("the work has raised an error, and nobody saw it", "let it pass")
        task = asyncio.ensure_future(written(held, "ann", 1, 2, lambda: asyncio.sleep(WAITED)))
        await asyncio.sleep(0.01)
        back(held, {"ann": 1}, "one request is under way", "enter it before you await the work")
        task.cancel()
        await asyncio.wait([task])
        back(held, {}, "the client has hung up")

    async def several():
        held = {}
        ends = await asyncio.gather(*(written(held, "ann", 1, 2, answer) for _ in range(3)),
                                    written(held, "bob", 1, 2, answer), return_exceptions=True)
        if [end for end in ends if isinstance(end, Exception) and not isinstance(end, QueueFull)]:
            raise Wrong(f"three of ann's and one of bob's at once: {ends}", "the third of ann's "
                        "raises QueueFull; a user who is not in held has none")
        if ends[0] != "text" or ends[1] != "text" or ends[3] != "text":
            raise Wrong(f"ann may have two at once, and bob is another: {ends}",
                        "refuse where held + count is more than `most`, for this user alone")
        if not isinstance(ends[2], QueueFull):
            raise Wrong("ann had three at once, and at most two are allowed",
                        "between the check and the entry there must be no await")
        back(held, {}, "all are over", "who was refused had entered nothing: check before `try`")

    async def refused():
        held, begun = {"ann": 2}, []
        try:
            await written(held, "ann", 1, 2, lambda: begun.append(1) or answer())
        except QueueFull:
            pass
        else:
            raise Wrong("ann held two of two, and one more was let in", "raise QueueFull")
        if begun:
            raise Wrong("one was refused, and its work had begun", "check before you call work()")
        back(held, {"ann": 2}, "one was refused",
             "who was refused had entered nothing: check before `try`")

    for scenario in (one, several, refused):
        in_a_loop(scenario)


@turn
def percentile(written):
    """Nothing before, something before, a share that ends at a limit, nobody in between."""
    limits = (0.01, 0.1, 1.0, math.inf)
    for before, after, share, want, hint in (
            ((0, 0, 0, 0), (1, 3, 4, 4), .75, .1, "three of four is 0.75: `at least` this share"),
            ((0, 0, 0, 0), (2, 4, 9, 10), .5, 1.0, "the counts are sums already: of all values up "
             "to this limit"),
            ((90, 95, 99, 100), (90, 97, 102, 104), .5, .1, "what came in between is the "
             "difference of the two answers"),
            ((5, 5, 5, 5), (5, 5, 5, 6), .5, math.inf, "the last limit is inf"),
            ((3, 4, 5, 5), (3, 4, 5, 5), .99, None, "None where nothing came in between")):
        said = [dict(zip(limits, counts)) for counts in (before, after)]
        if (got := written(*said, share)) != want:
            raise Wrong(f"percentile({said[0]}, {said[1]}, {share}) gave {got} and not {want}",
                        hint)
