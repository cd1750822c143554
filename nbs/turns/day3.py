"""The graders of day 3: blocks, slots, prefixes, and attention over them."""

import random

import torch
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams

from turns import Wrong, turn


@turn
def append_slot(written):
    """After each call: what it returned, the table, and the free list."""
    def ask(num_tokens, table, free, bs):
        table, free = list(table), list(free)
        return bool(written(table, num_tokens, free, bs)), table, free

    cases = [(3, [7], [4, 5], 4, "the last block has room: nothing to take"),
             (4, [7], [4, 5], 4, "4 tokens fill a block of 4; is a second one due already?"),
             (5, [7], [4, 5], 4, "token 5 is the first that lies beyond the block"),
             (5, [7], [], 4, "no block is free: say False and leave the table as it is"),
             (4, [7], [], 4, "a token that has a slot needs no free block")]
    rng = random.Random(0)
    for _ in range(200):
        bs = rng.randrange(1, 9)
        n = rng.randrange(1, 40)
        held = -(-n // bs) - (n % bs == 1 or bs == 1) * rng.randrange(2)
        table, free = rng.sample(range(50), held), rng.sample(range(50, 90), rng.randrange(3))
        cases.append((n, table, free, bs,
                      "a new block is due when num_tokens > len(block_table) * block_size"))
    for n, table, free, bs, hint in cases:
        due = n > len(table) * bs
        want = (True, table + free[:1], free[1:]) if due and free else (not due, table, free)
        got = ask(n, table, free, bs)
        if got != want:
            raise Wrong(f"{n} tokens, block_size {bs}, block_table {table}, free_blocks {free}: "
                        f"(returned, table, free) is {got}, right is {want}", hint)


@turn
def slot_mapping(written):
    """Slots of a run of positions, against BlockManager's tables in a shuffled pool."""
    cases = [([4, 6], 0, 3, 4, "slot = block_table[p // block_size] * block_size + p % block_size"),
             ([4, 6], 3, 6, 4, "look the block up for each position: a run may cross two blocks"),
             ([4, 6], 5, 6, 4, "start may lie in the middle: the offset is p % block_size")]
    rng = random.Random(0)
    for _ in range(100):
        bs, n = rng.randrange(1, 9), rng.randrange(1, 50)
        table, start = rng.sample(range(60), -(-n // bs)), rng.randrange(n)
        cases.append((table, start, rng.randrange(start + 1, n + 1), bs, cases[0][-1]))
    for table, start, end, bs, hint in cases:
        want = [table[p // bs] * bs + p % bs for p in range(start, end)]
        got = [int(slot) for slot in written(list(table), start, end, bs)]
        if got != want:
            raise Wrong(f"positions {start} to {end - 1}, block_table {table}, block_size {bs}: "
                        f"{got}, right is {want}", hint)


def cache_of(prompts, bs):
    """(manager, digest → block id) after these prompts have been computed."""
    manager = BlockManager(200, bs)
    for prompt in prompts:
        seq = Sequence(prompt)
        manager.allocate(seq)
        manager.announce(seq, seq.num_uncomputed_tokens)
        manager.publish()
    return manager, {digest: block.block_id for digest, block in manager.cached_blocks.items()}


@turn
def match_prefix(written):
    """The blocks that are found, against BlockManager.match_prefix."""
    first = list(range(12))
    cases = [([first], [*first[:8], 50, 51], 4, "walk the blocks from 0 on, each digest made from "
              "the parent's digest and the block's tokens"),
             ([first], first, 4, "the last token must be left to compute, so it is never matched: "
              "(len(token_ids) - 1) // block_size blocks at most"),
             ([first], [*first[:4], 9, 9, 9, 9, *first[8:], 1], 4, "stop at the first miss"),
             ([[0, 0, 0, 0, 5, 6, 7, 8, 1], [1, 1, 1, 1, 2]], [1, 1, 1, 1, 5, 6, 7, 8, 1], 4,
              "the digest of a block covers what came before it: pass the parent's digest on"),
             ([first], [7, 7], 4, "a prompt shorter than a block has no full block")]
    rng = random.Random(0)
    for _ in range(100):
        bs = rng.randrange(1, 5)
        make = lambda: [rng.randrange(2) for _ in range(rng.randrange(1, 14))]
        cases.append(([make() for _ in range(3)], make(), bs, cases[0][-1]))
    for prompts, ids, bs, hint in cases:
        manager, cached = cache_of(prompts, bs)
        want = [block.block_id for block in manager.match_prefix(Sequence(ids))]
        got = list(written(list(ids), dict(cached), bs))
        if got != want:
            raise Wrong(f"computed before: {prompts}; asked: {ids}, block_size {bs}: "
                        f"blocks {got}, right is {want}", hint)


@turn
def tokens_to_compute(written):
    """A prediction, against what BlockManager leaves to compute."""
    prompt = list(range(33))
    other = lambda at: [*prompt[:at], 99, *prompt[at + 1:]]
    cases = [(prompt, other(20), 8, "count the full blocks before the first difference"),
             (prompt, other(0), 8, "where token 0 differs, nothing is shared"),
             (prompt, list(prompt), 8, "what is shared are whole blocks"),
             (prompt[:32], prompt[:32], 8, "equal prompts whose last block is full: the last token "
              "is computed all the same, and with it its whole block")]
    rng = random.Random(0)
    for _ in range(100):
        make = lambda: [rng.randrange(2) for _ in range(rng.randrange(1, 14))]
        cases.append((make(), make(), rng.randrange(1, 5), cases[0][-1]))
    for first, second, bs, hint in cases:
        manager, _ = cache_of([first], bs)
        seq = Sequence(second)
        manager.allocate(seq)
        want, got = seq.num_uncomputed_tokens, written(list(first), list(second), bs)
        if got != want:
            raise Wrong(f"first {first}, second {second}, block_size {bs}: {got}, right is {want}",
                        hint)


def exact(scores, values):
    """softmax(scores) @ values, in float64."""
    return scores.double().softmax(0) @ values.double()


@turn
def online_softmax(written):
    """o / l after all tiles, in several tile sizes, against the softmax of the whole row."""
    g = torch.Generator().manual_seed(0)
    row, values = torch.tensor([1., 3., 2., 5., 0., 4.]), torch.tensor([[10.], [20.], [30.], [40.],
                                                                         [50.], [60.]])
    cases = [(row[:2], values[:2], 2, "one tile: m = max, l = Σ exp(s − m), o = Σ exp(s − m) · v"),
             (row[:4], values[:4], 2, "where the maximum grows, scale the old l and o by "
              "exp(m_old − m_new), both of them"),
             (row, values, 2, "where the maximum stays, the correction is 1: "
              "m_new = max(m, max of the tile)"),
             (100 * row, values, 2, "subtract the maximum before exp, or large scores overflow")]
    for n, tile in ((12, 1), (12, 5), (64, 8), (7, 7)):
        cases.append((3 * torch.randn(n, generator=g), torch.randn(n, 4, generator=g), tile,
                      cases[1][-1]))
    for scores, v, tile, hint in cases:
        m, l, o = torch.tensor(float("-inf")), torch.tensor(0.0), torch.zeros(v.shape[1])
        for start in range(0, len(scores), tile):
            m, l, o = written(m, l, o, scores[start:start + tile], v[start:start + tile])
        got, want = torch.as_tensor(o / l).double(), exact(scores, v)
        if got.shape != want.shape or not torch.allclose(got, want, atol=1e-4):
            shown = [round(s, 2) for s in scores.tolist()]
            raise Wrong(f"scores {shown} in tiles of {tile}: o / l is "
                        f"{[round(x, 4) for x in got.flatten().tolist()]}, right is "
                        f"{[round(x, 4) for x in want.tolist()]}", hint)
    got = written(torch.tensor(3.), torch.tensor(1.1353), torch.tensor([21.353]), row[2:4],
                  values[2:4])
    got = [round(float(x), 3) for x in got]
    if any(abs(x - y) > 2e-3 for x, y in zip(got, (5, 1.2034, 44.383), strict=True)):
        raise Wrong(f"m 3, l 1.1353, o [21.353], scores [2, 5], values [[30], [40]]: (m, l, o) "
                    f"is {got}, right is [5, 1.203, 44.383]; o / l alone is right",
                    "m is the maximum so far; l and o are the sums over exp(s − m)")


@turn
def paged_attention(written):
    """One row over scattered blocks; slots that were never written hold NaN."""
    g = torch.Generator().manual_seed(0)
    cases = [(4, 4, "one full block: s = k @ q * scale, then the softmax over its keys"),
             (4, 8, "two blocks: logical block i lies in physical block block_table[i], and the "
              "second is merged with the first by the online softmax"),
             (4, 6, "6 keys in blocks of 4: of the last block read only the first "
              "context_len − i · bs keys; behind them lies what was never written")]
    cases += [(bs, n, "walk the blocks in the order of the table, and merge each by the online "
               "softmax") for bs, n in ((1, 5), (3, 10), (8, 3), (4, 13))]
    for bs, n, hint in cases:
        k, v = torch.randn(2, n, 8, generator=g)
        q, k = 4 * torch.randn(8, generator=g), 4 * k
        caches = torch.full((2, 16, bs, 8), float("nan"))
        table = torch.randperm(16, generator=g)[:-(-n // bs)].tolist() if n > bs else [0]
        table += [int(b) for b in torch.arange(16) if int(b) not in table][:2]   # not used yet
        for p in range(n):
            caches[0, table[p // bs], p % bs], caches[1, table[p // bs], p % bs] = k[p], v[p]
        got, want = written(q, *caches, table, n, 0.35), exact(k @ q * 0.35, v)
        if got.shape != want.shape or not torch.allclose(got.double(), want, atol=1e-4):
            said = "NaN" if torch.as_tensor(got).isnan().any() else \
                "not what the softmax over all the keys gives"
            raise Wrong(f"{n} keys in blocks of {bs}, block_table {table}: {said}", hint)


@turn
def fork(written):
    """Counts, tables and the copy, in the middle of an answer, of a prompt, and in a full pool."""
    def parent(pool, tokens, computed, bs=4):
        manager, seq = BlockManager(pool, bs), Sequence(tokens)
        manager.allocate(seq)
        seq.num_computed_tokens = computed
        return manager, seq

    manager, seq = parent(8, [1] * 6, 6)
    seq.sampling_params = SamplingParams(max_tokens=5)
    seq.append_token(9)
    child, copy = written(manager, seq)
    full, last = seq.block_table
    if child.block_table[:1] != [full] or manager.blocks[full].ref_count != 2:
        raise Wrong(f"6 tokens computed, blocks of 4: tables {seq.block_table} and "
                    f"{child.block_table}, count of block {full} is "
                    f"{manager.blocks[full].ref_count}", "share the full block with manager._share")
    if len(child.block_table) != 2 or child.block_table[1] == last:
        raise Wrong(f"tables {seq.block_table} and {child.block_table}",
                    "the block that is part full needs a private block: manager._take()")
    if copy != (last, child.block_table[1]):
        raise Wrong(f"the copy is {copy}, right is {(last, child.block_table[1])}",
                    "(from_block, to_block) of the block that is part full")
    if child.completion_token_ids != [9] or child.num_computed_tokens != 6:
        raise Wrong(f"the child's answer is {child.completion_token_ids}, computed "
                    f"{child.num_computed_tokens}; right is [9] and 6",
                    "make it from prompt_token_ids, then set token_ids and num_computed_tokens")
    if child.sampling_params != seq.sampling_params:
        raise Wrong("the child has other sampling parameters", "Sequence takes them as well")
    child.append_token(8)
    if seq.completion_token_ids != [9]:
        raise Wrong("a token of the child's stands in the parent's answer too",
                    "copy the list of tokens: two sequences must not share one")
    manager, seq = parent(8, [1] * 8, 8)
    if written(manager, seq)[1] is not None:
        raise Wrong("8 tokens computed, blocks of 4: no copy is due",
                    "None where no block is part full")
    manager, seq = parent(8, [1] * 12, 4)
    child, copy = written(manager, seq)
    if copy is not None:
        raise Wrong(f"4 of 12 tokens computed, blocks of 4: the copy is {copy}, right is None",
                    "None where no block is part full")
    if len(child.block_table) != 3 or set(child.block_table) & set(seq.block_table[1:]):
        raise Wrong(f"4 of 12 tokens computed: tables {seq.block_table} and {child.block_table}",
                    "blocks that are not computed yet must be private, and there must be as many")
    manager, seq = parent(3, [1] * 6, 6)
    if written(manager, seq) is None:
        raise Wrong("one block is due and one is free: None, right is a child",
                    "None only where more blocks are due than are free")
    manager, seq = parent(2, [1] * 6, 6)
    if written(manager, seq) is not None or [b.ref_count for b in manager.blocks] != [1, 1]:
        raise Wrong(f"a full pool: counts are {[b.ref_count for b in manager.blocks]}",
                    "look at num_free_blocks before anything changes, and return None")
