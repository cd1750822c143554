"""A machine that plays with a scheduler: random requests, steps, aborts and failures.

    check_machine(MyScheduler)      an error, with the rule that was broken; or nothing

After every move it checks what must always hold, and at the end that everybody is served, with the
very tokens of a run alone. hypothesis makes the moves up, the same ones each time; with
`shrink=True` it looks for the shortest way to the error, and prints it.
"""

from collections import Counter

from hypothesis import HealthCheck, Phase, Verbosity, settings
from hypothesis import strategies as st
from hypothesis.stateful import (RuleBasedStateMachine, initialize, invariant, rule,
                                 run_state_machine_as_test)

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.sampling_params import SamplingParams


def next_token(token_ids):
    """A stand-in for model and sampler: 0 or 1, by the tokens so far and by nothing else."""
    return (31 * sum(token_ids) + len(token_ids)) % 997 % 2


def need(holds, otherwise):
    """Raise AssertionError with what is wrong, unless it holds."""
    if not holds:
        raise AssertionError(otherwise)


class SchedulerMachine(RuleBasedStateMachine):
    """Random arrivals, steps, aborts and failures around a scheduler."""
    scheduler_class = Scheduler
    totals = Counter()

    @initialize(num_blocks=st.integers(3, 12), block_size=st.integers(1, 4),
                budget=st.integers(1, 20), max_num_seqs=st.integers(1, 5), caching=st.booleans())
    def start(self, num_blocks, block_size, budget, max_num_seqs, caching):
        self.manager = BlockManager(num_blocks, block_size, caching)
        self.scheduler = self.scheduler_class(self.manager, budget, max_num_seqs)
        self.seqs, self.written, self.samples = [], {}, Counter()

    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=12),
          max_tokens=st.integers(1, 10))
    def arrive(self, prompt, max_tokens):
        if self.manager.blocks_for(len(prompt)) <= self.manager.num_blocks:
            seq = Sequence(prompt, SamplingParams(max_tokens=max_tokens))
            self.seqs.append(seq)
            self.scheduler.add_sequence(seq)

    @rule(fails=st.sampled_from([False] * 5 + [True]))
    def step(self, fails=False):
        batch, budget = self.scheduler.schedule(), self.scheduler.max_num_batched_tokens
        need(batch or self.scheduler.is_finished(), "somebody waits and nobody runs")
        need(sum(row.num_new_tokens for row in batch) <= budget,
             "a step takes more than its budget")
        need(all(0 < row.num_new_tokens <= row.seq.num_uncomputed_tokens for row in batch),
             "a row has nothing to compute, or more than there is")
        if fails:
            self.scheduler.rollback()
            return
        self.write_and_read(batch)
        due = [row.seq for row in batch if row.samples]
        self.samples.update(seq.seq_id for seq in due)
        self.scheduler.postprocess(batch, [next_token(seq.token_ids) for seq in due])

    def write_and_read(self, batch):
        """What attention does: all rows write their new keys, then each reads all of its own."""
        size = self.manager.block_size
        ends = [(row.seq, row.seq.num_computed_tokens + row.num_new_tokens) for row in batch]
        for seq, end in ends:
            need(end <= len(seq.block_table) * size, "a row has no block for its new tokens")
            for p in range(seq.num_computed_tokens, end):
                self.written[seq.block_table[p // size], p % size] = tuple(seq.token_ids[:p + 1])
        for seq, end in ends:
            for p in range(end):
                need(self.written.get((seq.block_table[p // size], p % size))
                     == tuple(seq.token_ids[:p + 1]), "a row reads keys that are not its own")

    @rule(data=st.data())
    def abort(self, data):
        open_ = [seq for seq in self.seqs if seq.finish_reason is None]
        if open_:
            self.scheduler.finish(data.draw(st.sampled_from(open_)), "abort")

    @invariant()
    def books_agree(self):
        if not hasattr(self, "scheduler"):
            return
        manager, scheduler = self.manager, self.scheduler
        held = Counter(block_id for seq in self.seqs for block_id in seq.block_table)
        need(manager.num_free_blocks + manager.num_used_blocks == manager.num_blocks,
             "free and used blocks are not the pool")
        need(all(block.ref_count == held[block.block_id] for block in manager.blocks),
             "a block's ref_count is not the number of tables that hold it")
        need(all(len(set(seq.block_table)) == len(seq.block_table) for seq in self.seqs),
             "a table holds a block twice")
        need({b.block_id for b in manager.blocks if not b.ref_count} == set(manager.free_blocks),
             "the free list is not the blocks that nobody holds")
        need(all(block.hash == digest and (block.block_id, manager.block_size - 1) in self.written
                 for digest, block in manager.cached_blocks.items()),
             "a block is remembered that was never filled")
        for seq in self.seqs:
            runs = seq.status is SequenceStatus.RUNNING
            waits = seq.status is SequenceStatus.WAITING
            need((seq in scheduler.running) == runs, "status RUNNING and the queue do not agree")
            need((seq in scheduler.waiting) == waits, "status WAITING and the queue do not agree")
            need(runs or not seq.block_table, "a sequence that does not run holds blocks")
        need(len(scheduler.running) <= scheduler.max_num_seqs, "too many rows run")
        need(not manager.pending_blocks, "something is announced and no step is being made")

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        for _ in range(3000):
            if self.scheduler.is_finished():
                break
            self.step(fails=False)
        need(self.scheduler.is_finished(), "requests are left: the scheduler does not get on")
        self.books_agree()
        need(self.manager.num_free_blocks == self.manager.num_blocks, "blocks are lost")
        self.totals.update(requests=len(self.seqs), samples=sum(self.samples.values()),
                           preemptions=self.scheduler.num_preemptions)
        for seq in self.seqs:
            tokens = list(seq.prompt_token_ids)
            while len(tokens) < len(seq):
                tokens.append(next_token(tokens))
            need(tokens == seq.token_ids, "not the tokens of a run alone")
            need(self.samples[seq.seq_id] == seq.num_completion_tokens, "a token is drawn twice")


def check_machine(scheduler_class=Scheduler, examples=100, shrink=False):
    """Let hypothesis play with a scheduler class; returns what it made up, counted."""
    machine = type("Machine", (SchedulerMachine,), {"scheduler_class": scheduler_class,
                                                    "totals": Counter()})
    phases = [Phase.generate, Phase.shrink] if shrink else [Phase.generate]
    run_state_machine_as_test(machine, settings=settings(
        max_examples=examples, stateful_step_count=30, deadline=None, database=None,
        derandomize=True, phases=phases, report_multiple_bugs=False, print_blob=False,
        verbosity=Verbosity.normal if shrink else Verbosity.quiet,
        suppress_health_check=list(HealthCheck)))
    return machine.totals
