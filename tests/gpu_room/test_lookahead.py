"""The step ahead: what is foreseen, and that the tokens are the same with it."""

import random
from contextlib import nullcontext

import pytest
import torch

from nanovllm import SamplingParams
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.gpu.lookahead import Lookahead, foresee

VOCAB = 97


def foreseen(news, waiting=0, **settings):
    """(places foreseen, free blocks taken) after a first step with these max_tokens."""
    manager = BlockManager(12, 4)
    scheduler = Scheduler(manager, **{"max_num_seqs": 4, **settings})
    for n in news:
        scheduler.add_sequence(Sequence([1, 2, 3, 4], SamplingParams(max_tokens=n)))
    for _ in range(waiting):
        scheduler.add_sequence(Sequence([5, 6, 7], SamplingParams(max_tokens=5)))
    batch, free = scheduler.schedule(), manager.num_free_blocks
    return foresee(scheduler, batch), free - manager.num_free_blocks


@pytest.mark.parametrize("what, found, expected", [
    ("three rows go on", lambda: foreseen([5, 5, 5]), ([0, 1, 2], 3)),
    ("the second ends by its length", lambda: foreseen([5, 1, 5]), ([0, 2], 2)),
    ("it ends, and another waits", lambda: foreseen([5, 1, 5, 5], waiting=1), ([], 0)),
    ("all rows taken, one waits", lambda: foreseen([5] * 4, waiting=1), ([0, 1, 2, 3], 4)),
    ("a prompt in two chunks", lambda: foreseen([5, 5], max_num_batched_tokens=6), ([], 0)),
    ("max_model_len is reached", lambda: foreseen([9, 9], max_model_len=5), ([], 0))])
def test_foresee(what, found, expected):
    assert found() == expected, what


class PagedToy:
    """A runner whose model has a cache of token ids, and says a number made of all it can see.

    A wrong slot, block table or token changes what comes out.
    """

    def __init__(self, num_blocks, block_size):
        self.block_size = block_size
        self.cache = torch.full((num_blocks * block_size,), -1)  # slot -> 1000 * position + token

    def on_device(self):
        return nullcontext()

    def wait_for(self, event):
        assert event is None

    def run(self, batch):
        rows = [(row.seq, row.seq.num_computed_tokens, row.num_new_tokens) for row in batch]
        tokens = torch.tensor([token for seq, start, n in rows for token in
                               seq.token_ids[start:start + n]])
        return self._step(rows, tokens, [row.samples for row in batch])

    def run_ahead(self, batch, tokens):
        rows = [(row.seq, len(row.seq), 1) for row in batch]
        return self._step(rows, tokens, [True] * len(rows))

    def _step(self, rows, tokens, samples):
        slots = lambda seq, positions: torch.tensor(
            [seq.block_table[p // self.block_size] * self.block_size + p % self.block_size
             for p in positions])
        logits, first = [], 0
        for (seq, start, n), does in zip(rows, samples):
            here = torch.arange(start, start + n)
            self.cache[slots(seq, here.tolist())] = 1000 * here + tokens[first:first + n]
            first += n
            seen = self.cache[slots(seq, range(start + n))]
            if does:
                logits.append(torch.arange(VOCAB) * int((seen * (1 + 7 * seen % 11)).sum()) % VOCAB)
        return torch.stack(logits) if logits else torch.empty(0, VOCAB)


def serve(looks_ahead, seed):
    """(tokens and reason of each request, wrong and right guesses) of a random run."""
    rng = random.Random(seed)
    num_blocks, block_size = rng.choice([14, 22]), rng.choice([1, 4])
    manager = BlockManager(num_blocks, block_size, enable_prefix_caching=rng.random() < .7)
    scheduler = Scheduler(manager, max_num_batched_tokens=rng.choice([6, 64]),
                          max_num_seqs=rng.choice([2, 5]), max_model_len=rng.choice([24, 64]),
                          eos_token_ids=range(3))
    runner = PagedToy(num_blocks, block_size)
    stepper = Lookahead(runner, scheduler) if looks_ahead else runner
    seqs, left = [], 25
    while left or not scheduler.is_finished():
        if left and rng.random() < .3:                              # one comes
            left -= 1
            prompt = [rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, 12))]
            seqs.append(Sequence(prompt, SamplingParams(max_tokens=rng.randrange(1, 20))))
            scheduler.add_sequence(seqs[-1])
        alive = [seq for seq in seqs if seq.finish_reason is None]
        if alive and rng.random() < .05:                            # one leaves
            scheduler.finish(rng.choice(alive), "abort")
        if alive and rng.random() < .03:                            # a step fails
            scheduler.rollback()
        if not (batch := scheduler.schedule()):
            continue
        tokens = stepper.run(batch).argmax(-1)
        said = stepper.collect(tokens, batch) if looks_ahead else tokens.tolist()
        scheduler.postprocess(batch, said)
    assert manager.num_free_blocks == num_blocks
    outs = [(seq.token_ids, seq.finish_reason) for seq in seqs]
    return outs, (stepper.wrong, stepper.right) if looks_ahead else (0, 0)


def test_the_tokens_are_the_same():
    """Requests come, leave, are preempted and rolled back: the same tokens with a step ahead."""
    wrong = right = 0
    reasons = set()
    for seed in range(60):
        plain, _ = serve(False, seed)
        ahead, guesses = serve(True, seed)
        assert ahead == plain, seed
        wrong, right = wrong + guesses[0], right + guesses[1]
        reasons.update(reason for _, reason in ahead)
    assert right > 300 and wrong > 20 and {"stop", "length", "abort"} <= reasons, (right, wrong)


def test_a_row_that_is_gone_is_not_mistaken_for_another():
    """The row of a guess is kept, so that a later one cannot have its id."""
    scheduler = Scheduler(BlockManager(8, 4))
    ahead = Lookahead(PagedToy(8, 4), scheduler)
    scheduler.add_sequence(Sequence([5, 6], SamplingParams(max_tokens=9)))
    batch = scheduler.schedule()
    ahead.collect(ahead.run(batch).argmax(-1), batch)
    row = next(iter(scheduler.running.values()))
    scheduler.finish(row.seq, "abort")
    assert any(kept is row for _, kept in ahead.guess[0].values())
