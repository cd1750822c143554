"""Graders of day 4: what the scheduler decides, how many blocks there are, and a row of the batch.

The scheduler's methods are judged in three rounds: small cases by hand, random requests beside the
package's own scheduler, and the machine of nbs/machine.py, which checks every invariant.
"""

import random

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.sampling_params import SamplingParams
from turns import Wrong, turn


@turn
def take_from_budget(written):
    """A row's share of the budget: small cases, then all of them up to 12."""
    for uncomputed, budget, hint in (
            (1, 8, "a decode row takes one token, and it samples"),
            (7, 5, "a prompt of 7 with 5 left: a chunk of 5. Its last token is not among them"),
            (5, 5, "the chunk reaches the last token, so it samples"),
            *((n, b, "the smaller of the two; it samples when nothing stays uncomputed")
              for n in range(1, 13) for b in range(13))):
        want = (min(uncomputed, budget), uncomputed <= budget, max(0, budget - uncomputed))
        got = written(uncomputed, budget)
        if isinstance(got, list):
            got = tuple(got)
        if got != want or type(got[1]) is not bool:
            raise Wrong(f"take_from_budget({uncomputed}, {budget}) gives {got} and not {want}",
                        hint)


@turn
def blocks_that_fit(written):
    """Bytes into blocks: what others hold, the peak, and what could be used at all."""
    gb, block = 10**9, 10**6
    plain = dict(total=24 * gb, free=24 * gb, peak=4 * gb, share=0.75, block_bytes=block,
                 useful=10**9)
    cases = [
        ({}, 14_000, "0.75 of 24 GB may be held, 4 GB of it at the peak of a step"),
        (dict(free=10 * gb), 6_000, "others hold 14 GB: only 10 GB are there, less the peak"),
        (dict(useful=500), 500, "more blocks than all rows can fill would be a waste"),
        (dict(block_bytes=3 * gb), 4, "a part of a block is no block: 14 GB hold four of 3 GB"),
        (dict(peak=20 * gb), 0, "the peak alone is too large: no block, and no negative number")]
    rng = random.Random(0)
    for _ in range(200):
        total = rng.randrange(1, 10**6)
        cases.append((dict(total=total, free=rng.randrange(total + 1), peak=rng.randrange(10**6),
                           share=rng.random(), block_bytes=rng.randrange(1, 10**5),
                           useful=rng.randrange(1, 100)), None, "look at each limit by itself"))
    for changes, want, hint in cases:
        case = {**plain, **changes}
        if want is None:
            left = min(case["share"] * case["total"], case["free"]) - case["peak"]
            want = max(0, min(case["useful"], int(left // case["block_bytes"])))
        got = written(**case)
        if got == want and not isinstance(got, int):
            hint = "the number is right, but blocks are counted: an int"
        if got != want or not isinstance(got, int):
            said = ", ".join(f"{k}={v}" for k, v in (changes or plain).items())
            raise Wrong(f"with {said} it gives {got!r} and not {want}", hint)


@turn
def pack_row(written):
    """Ids, positions and slots of one row: the rows of the day's table, then random ones."""
    table_c = [5, 6, 7]
    cases = [
        ((list(range(100, 107)), [0, 1], 6, 1, 4), ([106], [6], [6]),
         "a decode row: token 6 lies in the second block, at place 2"),
        ((list(range(200, 211)), table_c, 0, 7, 4),
         (list(range(200, 207)), [*range(7)], [*range(20, 27)]), "a first chunk starts at 0"),
        ((list(range(200, 211)), [9, 2, 4], 7, 4, 4),
         ([207, 208, 209, 210], [7, 8, 9, 10], [11, 16, 17, 18]),
         "positions go on where the last chunk ended; each slot is asked from the table")]
    rng = random.Random(0)
    for _ in range(100):
        size, length = rng.randint(1, 5), rng.randint(1, 30)
        table, ids = rng.sample(range(99), -(-length // size)), rng.sample(range(1000), length)
        start = rng.randrange(length)
        n = rng.randint(1, length - start)
        places = range(start, start + n)
        cases.append(((ids, table, start, n, size),
                      (ids[start:start + n], list(places),
                       [table[p // size] * size + p % size for p in places]),
                      "place p: block p // block_size of the table, slot p % block_size in it"))
    for (ids, table, start, n, size), want, hint in cases:
        got = written(list(ids), list(table), start, n, size)
        if not isinstance(got, (tuple, list)):
            raise Wrong(f"it gives {got!r} and not three lists", "return ids, positions, slots")
        got = tuple(map(list, got))
        for name, mine, right in zip(("ids", "positions", "slots"), got, want):
            if mine != right:
                raise Wrong(f"{n} new tokens after {start}, table {table}, blocks of {size}: "
                            f"{name} are {mine} and not {right}", hint)
        if len(got) != 3:
            raise Wrong(f"it gives {len(got)} lists and not 3", "ids, positions, slots")


def with_method(name, written):
    """A scheduler that has the learner's function in the place of the package's method."""
    return type("Learner", (Scheduler,), {name: written})


def request(i, length, max_tokens=4, shared=0):
    """Request `i`: `length` tokens of its own, after `shared` that all have."""
    return Sequence([*range(shared), *(1000 * (i + 1) + p for p in range(length))],
                    SamplingParams(max_tokens=max_tokens))


def state(scheduler, names):
    """What can be seen of a scheduler from outside, with names instead of sequences."""
    rows = [(names[row.seq], row.num_new_tokens, row.samples) for row in scheduler.batch]
    return dict(running=[names[seq] for seq in scheduler.running],
                waiting=[names[seq] for seq in scheduler.waiting], rows=rows,
                budget=scheduler.budget,
                free_blocks=scheduler.block_manager.num_free_blocks)


def compare(got, want, case, hints):
    """Raise Wrong at the first part in which two states differ."""
    for part, right in want.items():
        if got[part] != right:
            raise Wrong(f"{case}: {part.replace('_', ' ')} {got[part]} and not {right}",
                        hints.get(part, "go through the rules of section 2 one by one"))


def against_the_package(name, written, **hints):
    """Random requests, in the learner's scheduler and in the package's; then the machine."""
    hints["cached"] = "num_cached_tokens is written once, when was_admitted is False"
    for seed in range(30):
        rng = random.Random(seed)
        pool, size, budget, rows = (rng.randint(6, 16), rng.randint(1, 4), rng.randint(1, 20),
                                    rng.randint(1, 5))
        wishes = [(rng.randrange(12), rng.randint(1, 6), rng.randint(1, 8), rng.choice((0, 4)))
                  for _ in range(7)]
        sides = []
        for cls in (Scheduler, with_method(name, written)):
            scheduler = cls(BlockManager(pool, size), budget, rows)
            seqs = [request(i, n, m, s) for i, (_, n, m, s) in enumerate(wishes)]
            sides.append((scheduler, seqs, {seq: f"r{i}" for i, seq in enumerate(seqs)}))
        for step in range(200):
            seen = []
            for scheduler, seqs, names in sides:
                for seq, (at, *_) in zip(seqs, wishes):
                    fits = scheduler.block_manager.blocks_for(len(seq)) <= pool
                    if at == step and fits:
                        scheduler.add_sequence(seq)
                batch = scheduler.schedule()
                seen.append(state(scheduler, names) | {"cached": [
                    seq.num_cached_tokens for seq in seqs]})
                scheduler.postprocess(batch, [7] * sum(row.samples for row in batch))
            compare(seen[1], seen[0],
                    f"{pool} blocks of {size}, budget {budget}, {rows} rows, step {step}",
                    hints)
            if step > 12 and all(scheduler.is_finished() for scheduler, *_ in sides):
                break
    try:
        from machine import check_machine
    except ImportError as error:             # hypothesis is not installed
        if not (error.name or "").startswith("hypothesis"):
            raise
        return
    try:
        check_machine(with_method(name, written))
    except AssertionError as error:
        raise Wrong(f"random requests break a rule: {error}",
                    "check_machine(cls, shrink=True) of nbs/machine.py finds a short example"
                    ) from None


@turn
def _schedule_waiting(written):
    """Admission: each limit alone, who gets in, what is written down; then everything at once."""
    hints = {"rows": "one row for each sequence that gets in, by self._add_row(seq)",
             "running": "stop when budget, rows or blocks are used up; nobody overtakes",
             "waiting": "who gets in leaves the queue; who does not stays at its head",
             "budget": "self._add_row(seq) takes from it; do not take twice",
             "free_blocks": "self.block_manager.allocate(seq) gives blocks for the whole prompt"}
    for case, lengths, settings in (
            ("prompts of 5, 9 and 6, room for all", (5, 9, 6), {}),
            ("prompts of 5, 9 and 6, two rows", (5, 9, 6), dict(rows=2)),
            ("prompts of 5, 9 and 6, budget 8", (5, 9, 6), dict(budget=8)),
            ("prompts of 5, 3 and 6, budget 8", (5, 3, 6), dict(budget=8)),
            ("prompts of 5, 9 and 1, 4 blocks of 4", (5, 9, 1), dict(blocks=4)),
            ("nobody waits", (), {})):
        seen = []
        for cls in (Scheduler, with_method("_schedule_waiting", written)):
            scheduler = cls(BlockManager(settings.get("blocks", 64), 4), 100,
                            settings.get("rows", 8))
            scheduler.budget = settings.get("budget", 100)
            seqs = [request(i, n) for i, n in enumerate(lengths)]
            for seq in seqs:
                scheduler.add_sequence(seq)
            scheduler._schedule_waiting()
            seen.append(state(scheduler, {seq: f"r{i}" for i, seq in enumerate(seqs)}))
        compare(seen[1], seen[0], case, hints)
        if wrong := [seq for seq in scheduler.running if seq.status is not SequenceStatus.RUNNING]:
            raise Wrong(f"{case}: a sequence that got in has the status {wrong[0].status.name}",
                        "seq.status = SequenceStatus.RUNNING")
    against_the_package(
        "_schedule_waiting", written,
        rows="self.running[seq] is a decode row of its own, with 1 new token, not this step's",
        running="whether blocks suffice, allocate says: what is shared need not be free")


@turn
def _make_room(written):
    """Preemption: no need, the youngest, several of them, the asker itself; then all at once."""
    for case, lengths, blocks, asker in (
            ("a block is free", (4, 4), 3, 0),
            ("full pool, the oldest of three asks", (4, 6, 4), 4, 0),
            ("full pool, the middle one asks", (6, 4, 7), 5, 1),
            ("full pool, the youngest asks", (6, 4), 3, 1),
            ("one alone in a pool that is full", (4,), 1, 0)):
        seen = []
        for cls in (Scheduler, with_method("_make_room", written)):
            scheduler = cls(BlockManager(blocks, 4), 100)
            seqs = [request(i, n) for i, n in enumerate(lengths)]
            for seq in seqs:
                scheduler.add_sequence(seq)
            batch = scheduler.schedule()
            scheduler.postprocess(batch, [7] * len(batch))
            scheduler.batch = []
            answer = scheduler._make_room(seqs[asker])
            seen.append({"preempted": [
                f"r{i}" for i, seq in enumerate(seqs) if seq.num_preemptions], "returned": answer}
                | state(scheduler, {seq: f"r{i}" for i, seq in enumerate(seqs)}))
        compare(seen[1], seen[0], f"{case} (r{asker} of {len(lengths)}, r0 the oldest)", {
            "returned": "True: it has a slot. False: it was preempted itself",
            "preempted": "the youngest: the last that came into self.running",
            "running": "self.preempt(seq) takes a sequence out of self.running"})
    scheduler, needs_two = shared_blocks(with_method("_make_room", written))
    got = scheduler._make_room(needs_two)
    if got is not True or len(scheduler.waiting) != 2:
        raise Wrong("the youngest shares all its blocks with another, so its going frees none: "
                    f"after one call {len(scheduler.waiting)} sequences were preempted, and not 2",
                    "go on until append_slot says True: one victim may not be enough")
    against_the_package("_make_room", written,
                        running="the youngest is the last in self.running, whenever it arrived")


def shared_blocks(cls):
    """A full pool in which the two youngest hold the same blocks; and the oldest, which asks."""
    scheduler = cls(BlockManager(2, 4), 100)
    seqs = [Sequence([1, 2, 3, 4]), Sequence([5, 6, 7, 8]), Sequence([5, 6, 7, 8])]
    for seq in seqs[:2]:
        scheduler.block_manager.allocate(seq)
    table = seqs[1].block_table
    scheduler.block_manager.blocks[table[0]].ref_count += 1      # the third shares it
    seqs[2].block_table = list(table)
    from nanovllm.engine.scheduler import ScheduledRow
    for seq in seqs:
        seq.status, seq.num_computed_tokens = SequenceStatus.RUNNING, 4
        scheduler.running[seq] = ScheduledRow(seq, 1, samples=True)
    seqs[0].append_token(9)
    return scheduler, seqs[0]
