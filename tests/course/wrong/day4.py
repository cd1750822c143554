"""Typical wrong answers to the turns of day 4, and a word that the message must contain."""

from nanovllm.engine.scheduler import ScheduledRow
from nanovllm.engine.sequence import SequenceStatus


def more_than_is_left(num_uncomputed, budget):
    return num_uncomputed, True, budget - num_uncomputed


def always_samples(num_uncomputed, budget):
    n = min(num_uncomputed, budget)
    return n, True, budget - n


def samples_if_budget_is_left(num_uncomputed, budget):
    n = min(num_uncomputed, budget)
    return n, n < budget, budget - n


def let_in(self, seq):
    self.running[seq] = ScheduledRow(seq, 1, samples=True)
    seq.status = SequenceStatus.RUNNING
    if not seq.was_admitted:
        seq.num_cached_tokens, seq.was_admitted = seq.num_computed_tokens, True
    self._add_row(seq)


def forgets_the_budget(self):
    while self.waiting and len(self.running) < self.max_num_seqs:
        if self.block_manager.allocate(self.waiting[0]) is not None:
            return
        let_in(self, self.waiting.popleft())


def overtakes(self):
    for seq in list(self.waiting):
        if not self.budget or len(self.running) >= self.max_num_seqs:
            return
        if self.block_manager.allocate(seq) is None:
            self.waiting.remove(seq)
            let_in(self, seq)


def keeps_the_old_status(self):
    while self.waiting and self.budget and len(self.running) < self.max_num_seqs:
        if self.block_manager.allocate(self.waiting[0]) is not None:
            return
        seq = self.waiting.popleft()
        self.running[seq] = ScheduledRow(seq, 1, samples=True)
        self._add_row(seq)


def counts_the_cache_again(self):
    while self.waiting and self.budget and len(self.running) < self.max_num_seqs:
        if self.block_manager.allocate(self.waiting[0]) is not None:
            return
        seq = self.waiting.popleft()
        seq.was_admitted = False
        let_in(self, seq)


def keeps_the_row_of_the_step(self):
    while self.waiting and self.budget and len(self.running) < self.max_num_seqs:
        if self.block_manager.allocate(self.waiting[0]) is not None:
            return
        seq = self.waiting.popleft()
        let_in(self, seq)
        self.running[seq] = self.batch[-1]


def counts_blocks_without_the_cache(self):
    while self.waiting and self.budget and len(self.running) < self.max_num_seqs:
        seq, manager = self.waiting[0], self.block_manager
        if manager.num_free_blocks < manager.blocks_for(len(seq)):
            return
        manager.allocate(seq)
        let_in(self, self.waiting.popleft())


def remembers_too_long(self):
    """A number of blocks that is kept when the head of the queue has changed."""
    while self.waiting and self.budget and len(self.running) < self.max_num_seqs:
        if self.block_manager.num_free_blocks < getattr(self, "mine", 0):
            return
        self.mine = self.block_manager.allocate(self.waiting[0]) or getattr(self, "mine", 0)
        if not self.waiting[0].block_table:
            return
        let_in(self, self.waiting.popleft())


def one_victim(self, seq):
    if not self.block_manager.append_slot(seq):
        youngest = list(self.running)[-1]
        self.preempt(youngest)
        return youngest is not seq and self.block_manager.append_slot(seq)
    return True


def the_oldest(self, seq):
    while not self.block_manager.append_slot(seq):
        victim = next(iter(self.running))
        self.preempt(victim)
        if victim is seq:
            return False
    return True


def never_itself(self, seq):
    while not self.block_manager.append_slot(seq):
        others = [other for other in self.running if other is not seq]
        if not others:
            self.preempt(seq)
            return False
        self.preempt(others[-1])
    return True


def only_says_no(self, seq):
    return self.block_manager.append_slot(seq)


def of_the_whole_gpu(total, free, peak, share, block_bytes, useful):
    return max(0, min(useful, int((share * total - peak) // block_bytes)))


def forgets_the_peak(total, free, peak, share, block_bytes, useful):
    return max(0, min(useful, int(min(share * total, free) // block_bytes)))


def forgets_what_can_be_used(total, free, peak, share, block_bytes, useful):
    return max(0, int((min(share * total, free) - peak) // block_bytes))


def rounds_up(total, free, peak, share, block_bytes, useful):
    left = min(share * total, free) - peak
    return max(0, min(useful, int(-(-left // block_bytes))))


def a_float(total, free, peak, share, block_bytes, useful):
    return max(0, min(useful, (min(share * total, free) - peak) // block_bytes))


def gives_nothing(token_ids, block_table, num_computed, num_new, block_size):
    pass


def positions_from_zero(token_ids, block_table, num_computed, num_new, block_size):
    places = range(num_computed, num_computed + num_new)
    return ([token_ids[p] for p in places], list(range(num_new)),
            [block_table[p // block_size] * block_size + p % block_size for p in places])


def without_the_table(token_ids, block_table, num_computed, num_new, block_size):
    places = list(range(num_computed, num_computed + num_new))
    first = block_table[0] * block_size
    return [token_ids[p] for p in places], places, [first + p for p in places]


def one_too_far(token_ids, block_table, num_computed, num_new, block_size):
    places = list(range(num_computed + 1, num_computed + num_new + 1))
    return ([token_ids[p - 1] for p in places], places,
            [block_table[(p - 1) // block_size] * block_size + (p - 1) % block_size
             for p in places])


WRONG = [
    ("take_from_budget", more_than_is_left, "chunk of 5"),
    ("take_from_budget", always_samples, "(7, 5)"),
    ("take_from_budget", samples_if_budget_is_left, "(5, 5)"),
    ("_schedule_waiting", forgets_the_budget, "budget 8"),
    ("_schedule_waiting", overtakes, "overtakes"),
    ("_schedule_waiting", keeps_the_old_status, "status WAITING"),
    ("_schedule_waiting", counts_the_cache_again, "num_cached_tokens"),
    ("_schedule_waiting", keeps_the_row_of_the_step, "decode row"),
    ("_schedule_waiting", counts_blocks_without_the_cache, "shared"),
    ("_schedule_waiting", remembers_too_long, "not"),
    ("_make_room", one_victim, "one victim"),
    ("_make_room", the_oldest, "youngest"),
    ("_make_room", never_itself, "youngest"),
    ("_make_room", only_says_no, "preempted"),
    ("blocks_that_fit", of_the_whole_gpu, "others hold"),
    ("blocks_that_fit", forgets_the_peak, "peak"),
    ("blocks_that_fit", forgets_what_can_be_used, "waste"),
    ("blocks_that_fit", rounds_up, "part of a block"),
    ("blocks_that_fit", a_float, "an int"),
    ("pack_row", gives_nothing, "three lists"),
    ("pack_row", positions_from_zero, "positions"),
    ("pack_row", without_the_table, "slots"),
    ("pack_row", one_too_far, "positions"),
]
