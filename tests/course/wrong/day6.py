"""Typical wrong answers to the turns of day 6: (name, what was written, a word of the verdict)."""

import torch.nn.functional as F


def slots_of_zero(ids, positions, slots, lens, tables, size, width):
    spare = size - len(ids)
    return ([*ids, *[0] * spare], [*positions, *[0] * spare], [*slots, *[0] * spare],
            [*lens, *[0] * spare], [t + [0] * (width - len(t)) for t in tables] + [[0] * width] * 2)


def not_padded(ids, positions, slots, lens, tables, size, width):
    return ids, positions, slots, lens, tables


def one_key_each(ids, positions, slots, lens, tables, size, width):
    spare = size - len(ids)
    return ([*ids, *[0] * spare], [*positions, *[0] * spare], [*slots, *[-1] * spare],
            [*lens, *[1] * spare], [t + [0] * (width - len(t)) for t in tables] + [[0] * width] * 2)


def ids_of_nobody(ids, positions, slots, lens, tables, size, width):
    spare = size - len(ids)
    return (ids + [-1] * spare, positions + [0] * spare, slots + [-1] * spare, lens + [0] * spare,
            [t + [0] * (width - len(t)) for t in tables] + [[0] * width] * spare)


def always_two(ids, positions, slots, lens, tables, size, width):
    return (ids + [0] * 2, positions + [0] * 2, slots + [-1] * 2, lens + [0] * 2,
            [t + [0] * (width - len(t)) for t in tables] + [[0] * width] * 2)


def plain_halves(rank, n, heads, kv, d):
    rows = (heads + 2 * kv) * d // n
    return range(rank * rows, (rank + 1) * rows)


def no_shared_heads(rank, n, heads, kv, d):
    rows, start = [], 0
    for total in (heads, kv, kv):
        each = total // n
        rows += range(start + rank * each * d, start + (rank + 1) * each * d)
        start += total * d
    return rows


def only_queries(rank, n, heads, kv, d):
    return list(range(rank * heads // n * d, (rank + 1) * heads // n * d))


def every_other_column(x, gate, up, down, n):
    return [(F.silu(x @ gate[:, r::n]) * (x @ up[:, r::n])) @ down[r::n] for r in range(n)]


def all_by_columns(x, gate, up, down, n):
    h = F.silu(x @ gate) * (x @ up)
    return [h @ part for part in down.chunk(n, dim=1)]


def divided(x, gate, up, down, n):
    return [(F.silu(x @ gate) * (x @ up)) @ down / n] * n


def up_is_whole(x, gate, up, down, n):
    return [(F.silu(x @ g) * (x @ up)[:, :g.shape[1]]) @ d
            for g, d in zip(gate.chunk(n, 1), down.chunk(n, 0))]


def everything_to_everybody(parts):
    total = [sum(column) for column in zip(*parts)]
    return [total] * len(parts), len(parts[0]) * (len(parts) - 1)


def never_passed_on(parts):
    total = [sum(column) for column in zip(*parts)]
    return [total, *parts[1:]], 2


def without_the_count(parts):
    return [[sum(column) for column in zip(*parts)]] * len(parts)


def clamped(token_ids, table, first):
    return table[(token_ids - first).clamp(0, len(table) - 1)]


def wraps_around(token_ids, table, first):
    local = token_ids - first
    out = table[local % len(table)]
    return out.masked_fill((local >= len(table))[:, None], 0)


def forgot_first(token_ids, table, first):
    absent = token_ids >= len(table)
    return table[token_ids.masked_fill(absent, 0)].masked_fill(absent[:, None], 0)


WRONG = [
    ("padded_rows", slots_of_zero, "somebody's"),
    ("padded_rows", not_padded, "all its rows"),
    ("padded_rows", ids_of_nobody, "any valid number"),
    ("padded_rows", always_two, "a batch of 1 for 4"),
    ("padded_rows", one_key_each, "0"),
    ("qkv_rows", plain_halves, "all queries, no keys"),
    ("qkv_rows", no_shared_heads, "fewer kv heads"),
    ("qkv_rows", only_queries, "first half of each"),
    ("mlp_summands", all_by_columns, "down by rows"),
    ("mlp_summands", divided, "another summand"),
    ("mlp_summands", every_other_column, "neighbouring columns"),
    ("mlp_summands", up_is_whole, "the same columns"),
    ("ring_all_reduce", everything_to_everybody, "whole vectors"),
    ("ring_all_reduce", never_passed_on, "on both ranks"),
    ("ring_all_reduce", without_the_count, "numbers each sent"),
    ("embedding_summand", clamped, "zeros"),
    ("embedding_summand", wraps_around, "zeros"),
    ("embedding_summand", forgot_first, "zeros"),
]
