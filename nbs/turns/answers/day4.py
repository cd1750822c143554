"""One solution of each turn and exercise of day 4."""

import json
from collections import deque

import clock
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import ScheduledRow, Scheduler
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.sampling_params import SamplingParams


def take_from_budget(num_uncomputed: int, budget: int) -> tuple[int, bool, int]:
    n = min(num_uncomputed, budget)
    return n, n == num_uncomputed, budget - n


def _schedule_waiting(self: Scheduler) -> None:
    while self.waiting and self.budget and len(self.running) < self.max_num_seqs:
        seq = self.waiting[0]
        if self.block_manager.allocate(seq) is not None:     # no room: nobody overtakes
            return
        self.waiting.popleft()
        self.running[seq] = ScheduledRow(seq, 1, samples=True)
        seq.status = SequenceStatus.RUNNING
        if not seq.was_admitted:
            seq.num_cached_tokens, seq.was_admitted = seq.num_computed_tokens, True
        self._add_row(seq)


def _make_room(self: Scheduler, seq: Sequence) -> bool:
    while not self.block_manager.append_slot(seq):
        youngest = list(self.running)[-1]
        self.preempt(youngest)
        if youngest is seq:
            return False
    return True


def blocks_that_fit(total: int, free: int, peak: int, share: float, block_bytes: int,
                    useful: int) -> int:
    left = min(share * total, free) - peak
    return max(0, min(useful, int(left // block_bytes)))


def pack_row(token_ids: list[int], block_table: list[int], num_computed: int, num_new: int,
             block_size: int) -> tuple[list[int], list[int], list[int]]:
    positions = list(range(num_computed, num_computed + num_new))
    ids = [token_ids[p] for p in positions]
    slots = [block_table[p // block_size] * block_size + p % block_size for p in positions]
    return ids, positions, slots


def exercise_4_1():
    """Two blocks each: all three run in step 0, and the pool of 6 is full.

    After the prefill each has 8 tokens, and these fit. The ninth token (its key is written in step
    2) needs a third block: the oldest takes those of the youngest, which frees two, so the second
    finds one as well. There is one preemption, in step 2.
    """
    scheduler, log = play(Scheduler, 6, [(0, 7, 6)] * 3)
    assert [len(rows) for rows in log][:3] == [3, 3, 2] and scheduler.num_preemptions == 1


def exercise_4_2():
    """Fewer preemptions, and more work.

    The oldest has generated most and has most to compute again. It was also nearest to its end,
    when its blocks would have come back by themselves. If its row is left in the batch, the step
    has a row without blocks: simulate does not see it, the machine does.
    """
    class PreemptsOldest(Scheduler):
        def _make_room(self, seq):
            while not self.block_manager.append_slot(seq):
                victim = next(iter(self.running))
                self.budget += sum(row.num_new_tokens for row in self.batch if row.seq is victim)
                self.batch = [row for row in self.batch if row.seq is not victim]
                self.preempt(victim)
                if victim is seq:
                    return False
            return True

    class ForgetsTheRow(Scheduler):
        def _make_room(self, seq):
            while not self.block_manager.append_slot(seq):
                victim = next(iter(self.running))
                self.preempt(victim)
                if victim is seq:
                    return False
            return True

    seen = {}
    for cls in (Scheduler, PreemptsOldest, ForgetsTheRow):
        scheduler, log = play(cls, 14, [(3 * i, 8, 15) for i in range(8)])
        computed = sum(n for rows in log for n in rows.values())
        seen[cls.__name__] = scheduler.num_preemptions, computed
    print("(preemptions, tokens computed):", seen)
    (few, least), (_, most) = seen["Scheduler"], seen["PreemptsOldest"]
    assert few >= seen["PreemptsOldest"][0] and most > least
    from machine import check_machine
    check_machine(PreemptsOldest)
    try:
        check_machine(ForgetsTheRow)
    except AssertionError as error:
        print("the machine finds:", error)
    else:
        raise AssertionError("it was not found")


def exercise_4_3():
    """The longest prompts pay: while shorter ones keep coming, they wait for ever.

    `blocks_wanted` is what the scheduler remembers about the first in line. When another is first,
    it must be forgotten; else the new first one is kept out by what the old one needs.
    """
    class ShortestFirst(Scheduler):
        def add_sequence(self, seq):
            self.waiting = deque(sorted([*self.waiting, seq], key=len))
            self.blocks_wanted = 0            # the head of the queue may be another now

    class ForgetsWhatItWasTold(Scheduler):
        def add_sequence(self, seq):
            self.waiting = deque(sorted([*self.waiting, seq], key=len))

    first = {}
    for cls in (Scheduler, ShortestFirst):
        _, log = play(cls, 64, [(0, n, 3) for n in (100, 8, 60, 5, 12, 7)], budget=16)
        done = {}
        for step, rows in enumerate(log):
            for i, n in rows.items():
                done[i] = done.get(i, 0) + n
                if done[i] >= (100, 8, 60, 5, 12, 7)[i]:
                    first[cls.__name__, i] = first.get((cls.__name__, i), step)
    fcfs, shortest = ([first[name, i] for i in range(6)] for name in ("Scheduler", "ShortestFirst"))
    print("step of the first token, prompts of 100, 8, 60, 5, 12, 7:", fcfs, shortest)
    assert sum(shortest) < sum(fcfs) and shortest[0] > fcfs[0]
    for cls, runs_at_once in ((ShortestFirst, True), (ForgetsWhatItWasTold, False)):
        _, log = play(cls, 12, [(0, 20, 12), (1, 40, 2), (2, 4, 2)])
        assert (2 in log[2]) == runs_at_once


def exercise_4_4():
    """Blocks of a request that ends in its first step are never remembered.

    `publish` skips blocks that nobody holds, because a free block may belong to somebody else by
    then. No token is wrong; the work is done again. So no check of tokens or of books finds it, and
    the machine does not either. It takes a check that counts the work.
    """
    class PublishesLast(Scheduler):
        def postprocess(self, batch, token_ids):
            manager = self.block_manager
            publish, manager.publish = manager.publish, lambda: None
            finished = super().postprocess(batch, token_ids)
            del manager.publish
            publish()
            return finished

    from machine import check_machine
    check_machine(PublishesLast)
    found = {}
    for cls in (Scheduler, PublishesLast):
        scheduler = cls(BlockManager(64, 4))
        for _ in range(2):
            seq = Sequence(list(range(13)), SamplingParams(max_tokens=1))
            scheduler.add_sequence(seq)
            scheduler.postprocess(scheduler.schedule(), [7])
        found[cls.__name__] = seq.num_cached_tokens
    assert found == {"Scheduler": 12, "PublishesLast": 0}


def exercise_4_5():
    """One line more in `schedule`, and the twins no longer push each other out at once."""
    class WaitsAStep(Scheduler):
        def schedule(self):
            before = self.num_preemptions
            self.batch, self.budget = [], self.max_num_batched_tokens
            self._schedule_decodes()
            self._schedule_chunks()
            if self.num_preemptions == before:
                self._schedule_waiting()
            return self.batch

    scheduler = WaitsAStep(BlockManager(7, 2))
    for _ in range(2):
        scheduler.add_sequence(Sequence([1, 2, 3, 4, 5, 6], SamplingParams(max_tokens=8)))
    while not scheduler.is_finished():
        before = scheduler.num_preemptions
        batch = scheduler.schedule()
        assert scheduler.num_preemptions == before or scheduler.waiting
        scheduler.postprocess(batch, [7 for row in batch if row.samples])


def exercise_4_6():
    """The lighter the load, the smaller the budget that will do: few prompts meet in a step."""
    cost = clock.Cost.fit(json.loads(clock.MEASURED.read_text())["steps"])
    smallest = {}
    for rate in (7, 2):
        for budget in (64, 128, 256, 512, 1024, 2048):
            scheduler = Scheduler(BlockManager(16_000, 16, False), budget, 64, 10**5)
            seen = clock.figures(clock.serve(scheduler, clock.workload(rate), cost))
            if seen["ttft_p95"] < 400:
                smallest[rate] = budget, round(seen["longest"])
                break
    print("requests a second: (budget, longest gap in ms):", smallest)
    assert smallest[2][0] <= smallest[7][0]


def play(cls, num_blocks, wishes, budget=16384):
    """Run requests (arrival step, prompt, max_tokens): the scheduler, {request: tokens} a step."""
    scheduler, log = cls(BlockManager(num_blocks, 4, False), budget), []
    seqs = [Sequence([100 * i + p for p in range(n)], SamplingParams(max_tokens=most))
            for i, (_, n, most) in enumerate(wishes)]
    while len(log) <= max(at for at, *_ in wishes) or not scheduler.is_finished():
        for seq, (at, *_) in zip(seqs, wishes):
            if at == len(log):
                scheduler.add_sequence(seq)
        batch = scheduler.schedule()
        log.append({seqs.index(row.seq): row.num_new_tokens for row in batch})
        scheduler.postprocess(batch, [7] * sum(row.samples for row in batch))
    return scheduler, log
