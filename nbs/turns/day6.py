"""Graders of day 6: padded rows of a recording, layers in slices, a ring."""

import torch
import torch.nn.functional as F

from turns import Wrong, turn


def differs(got, want, eps=1e-5):
    return not torch.is_tensor(got) or got.shape != want.shape or (got - want).abs().max() > eps


def check_padded(written, size, width, ids, positions, slots, lens, tables):
    """Raises Wrong unless the batch is filled up to `size` rows that do nothing."""
    n, real = len(ids), [table + [0] * (width - len(table)) for table in tables]
    try:
        got = written(list(ids), list(positions), list(slots), list(lens), [[*t] for t in tables],
                      size=size, width=width)
        names = ("ids", "positions", "slots", "lens", "tables")
        got = dict(zip(names, got, strict=True))
    except (TypeError, ValueError) as error:
        raise Wrong(f"5 lists were expected ({error})", "return ids, positions, slots, lens, "
                    "tables") from None
    for name, given in zip(names, (ids, positions, slots, lens)):
        if len(got[name]) != size:
            raise Wrong(f"a batch of {n} for {size} rows: {name} has {len(got[name])} entries",
                        "the recording has all its rows, always")
        if list(got[name][:n]) != given:
            raise Wrong(f"the real rows of {name} are {got[name][:n]} and not {given}")
    if list(got["slots"][n:]) != [-1] * (size - n):
        raise Wrong(f"the padded rows write into the slots {got['slots'][n:]}",
                    "slot 0 is a place in block 0, which is somebody's; -1 means nowhere")
    if list(got["lens"][n:]) != [0] * (size - n):
        raise Wrong(f"the padded rows read {got['lens'][n:]} keys", "they have none: 0")
    if [list(row) for row in got["tables"][:n]] != real:
        raise Wrong(f"the tables are {got['tables'][:n]} and not {real}",
                    "each is filled with zeros up to `width`; nobody reads beyond lens")
    if [len(row) for row in got["tables"]] != [width] * size:
        raise Wrong("there is not a table of `width` entries for every row",
                    "also the padded rows have one")
    for name, padding in (("ids", got["ids"][n:]), ("positions", got["positions"][n:]),
                          ("tables", [block for row in got["tables"][n:] for block in row])):
        if any(number < 0 for number in padding):
            raise Wrong(f"the padded rows of {name} hold {list(padding)}",
                        "the model looks these up, as for a real row: any valid number will do, 0")


@turn
def padded_rows(written):
    """The inputs of a recording that is larger than the batch: rows beyond it do nothing."""
    check_padded(written, 5, 3, [7, 8, 9], [4, 0, 17], [4, 32, 1], [5, 1, 18], [[0], [2], [5, 0]])
    check_padded(written, 4, 2, [7], [4], [4], [5], [[0]])
    check_padded(written, 2, 2, [7, 8], [4, 17], [4, 33], [5, 18], [[0], [1, 2]])


@turn
def qkv_rows(written):
    """Which rows of the packed qkv matrix a rank holds: a piece of each of the three."""
    got = list(written(0, 2, 4, 2, 2))
    want = [0, 1, 2, 3, 8, 9, 12, 13]
    if got == list(range(8)):
        raise Wrong("rank 0 of 2 takes the first half of the packed matrix: all queries, no keys",
                    "q, k and v lie behind one another: take the rank's heads of each")
    if got != want:
        raise Wrong(f"rank 0 of 2, 4 query heads and 2 kv heads of 2 rows: {got} and not {want}",
                    "q has the rows 0-7, k 8-11, v 12-15; rank 0 has the first half of each")
    got = list(written(1, 4, 4, 2, 1))
    if got != [1, 4, 6]:
        raise Wrong(f"rank 1 of 4, 4 query heads and 2 kv heads of 1 row: {got} and not [1, 4, 6]",
                    "with fewer kv heads than ranks, ranks 0 and 1 both hold kv head 0")
    for n, heads, kv, d in ((1, 8, 2, 4), (2, 8, 2, 4), (4, 8, 2, 4), (8, 8, 2, 4), (4, 8, 4, 3)):
        for rank in range(n):
            kv_each = max(1, kv // n)
            first = rank * kv // n
            want = [*range(rank * heads // n * d, (rank + 1) * heads // n * d)]
            for start in (heads * d, (heads + kv) * d):
                want += range(start + first * d, start + (first + kv_each) * d)
            if list(written(rank, n, heads, kv, d)) != want:
                raise Wrong(f"rank {rank} of {n}, {heads} query heads, {kv} kv heads of {d} rows: "
                            f"{list(written(rank, n, heads, kv, d))[:8]}… and not {want[:8]}…")


@turn
def mlp_summands(written):
    """What each rank contributes to a gated MLP: columns of gate and up, rows of down."""
    torch.manual_seed(0)
    x, gate, up, down = (torch.randn(shape) for shape in ((3, 6), (6, 8), (6, 8), (8, 6)))
    whole = (F.silu(x @ gate) * (x @ up)) @ down
    for n in (1, 2, 4):
        got = written(x, gate, up, down, n)
        if len(got) != n:
            raise Wrong(f"{len(got)} summands for {n} ranks", "one for each rank")
        if any(not torch.is_tensor(part) or part.shape != whole.shape for part in got):
            raise Wrong(f"{n} ranks: a summand has not the shape of the result, [3, 6]",
                        "gate and up by columns (the same columns of both), down by rows")
        if differs(sum(got), whole):
            raise Wrong(f"{n} ranks: the sum of the summands is off by "
                        f"{(sum(got) - whole).abs().max():.2f}",
                        "gate and up by columns (the same columns of both), down by rows")
        for rank, part in enumerate(got):
            cols = slice(rank * 8 // n, (rank + 1) * 8 // n)
            want = (F.silu(x @ gate[:, cols]) * (x @ up[:, cols])) @ down[cols]
            if differs(part, want):
                raise Wrong(f"the sum is right, and rank {rank} of {n} has another summand",
                            "rank r has the r-th piece, of neighbouring columns, and computes "
                            "alone: it may not divide the whole result")


@turn
def ring_all_reduce(written):
    """A ring: each rank only ever gets one piece at a time from its neighbour."""
    got = written([[1.0, 2.0], [10.0, 20.0]])
    try:
        results, sent = got
        sent + 0
    except (TypeError, ValueError):
        raise Wrong(f"got {got!r}", "return (the result of each rank, numbers each sent)") from None
    if [list(row) for row in results] != [[11.0, 22.0]] * 2:
        raise Wrong(f"[1, 2] and [10, 20]: {results} and not [11, 22] on both ranks")
    if sent != 2:
        raise Wrong(f"with 2 ranks and 2 numbers each rank sent {sent} and not 2",
                    "one piece to be added up, then one finished piece: 2 (n - 1) pieces of 1/n")
    for n in (3, 4):
        parts = [[float(10 ** (i % 3) * (r + 1)) for i in range(2 * n)] for r in range(n)]
        results, sent = written([list(part) for part in parts])
        want = [sum(column) for column in zip(*parts)]
        if any(list(row) != want for row in results):
            raise Wrong(f"{n} ranks: rank 0 has {list(results[0])} and not {want}",
                        "after n - 1 rounds rank r has finished piece (r + 1) % n; then n - 1 more "
                        "rounds pass the finished pieces on")
        if sent != 2 * (n - 1) * 2:
            raise Wrong(f"{n} ranks with {2 * n} numbers: each sent {sent} and not "
                        f"{2 * (n - 1) * 2}", "whole vectors were sent around? A piece has 1/n")


@turn
def embedding_summand(written):
    """A range of the vocabulary: its rows, and zeros for all other tokens."""
    table = torch.arange(12.0).reshape(6, 2) + 1
    ids = torch.tensor([5, 0, 3])
    for first in (0, 3):
        got = written(ids, table[first:first + 3], first)
        want = torch.stack([table[i] if first <= i < first + 3 else torch.zeros(2) for i in ids])
        if differs(got, want):
            raise Wrong(f"tokens [5, 0, 3] on the rank that holds {first} to {first + 2}: "
                        f"{got.tolist() if torch.is_tensor(got) else got} and not {want.tolist()}",
                        "a token of another rank gets zeros, so that the sum over the ranks is the "
                        "embedding")
