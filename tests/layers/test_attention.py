"""Attention over whole sequences and over blocks: the plain backend, held against the formula."""

import pytest
import torch

from nanovllm.layers.attention import Attention, AttentionBackend, SDPABackend, store_kvcache
from nanovllm.utils.context import Context, packed_context, use_context

H, KV, D = 6, 2, 8


def exact(q, k, v):
    """softmax(q k / sqrt(D)) v of the last len(q) positions, in fp64: [n, H, D]."""
    n, length = len(q), len(k)
    k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("nhd,lhd->hnl", q.double(), k) / q.shape[2]**0.5
    future = torch.ones(n, length, dtype=torch.bool).tril(length - n).logical_not()
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    return torch.einsum("hnl,lhd->nhd", weights, v).to(q.dtype)


def vectors(tokens):
    torch.manual_seed(tokens)
    return torch.randn(tokens, H, D), torch.randn(tokens, KV, D), torch.randn(tokens, KV, D)


def test_store():
    caches = torch.zeros(2, 3, 4, KV, D)
    _, k, v = vectors(3)
    store_kvcache(k, v, *caches, torch.tensor([11, 0, 5], dtype=torch.int32))
    for given, cache in zip((k, v), caches):
        assert torch.equal(cache.view(12, KV, D)[[11, 0, 5]], given)
        assert cache.count_nonzero() == given.count_nonzero()


@pytest.mark.parametrize("lengths", [[5], [1, 7, 3], [4, 1]])
def test_packed_sequences_do_not_see_each_other(lengths):
    q, k, v = vectors(sum(lengths))
    layer = Attention(H, KV, D)
    assert type(layer.backend) is AttentionBackend
    with use_context(packed_context(lengths)):
        got = layer(q, k, v)
    start = 0
    for n in lengths:
        part = slice(start, start + n)
        torch.testing.assert_close(got[part], exact(q[part], k[part], v[part]))
        start += n


@pytest.mark.parametrize("block_size", [1, 3, 4, 16])
@pytest.mark.parametrize("rows", [  # (tokens before, new tokens), decode rows first
    [(0, 5)], [(7, 1)], [(9, 1), (3, 1)], [(6, 1), (0, 4), (5, 3)], [(4, 4)]], ids=str)
def test_paged(rows, block_size):
    """Blocks in any order, among blocks that hold something else."""
    layer, whole, blocks = Attention(H, KV, D), [], 40
    free = torch.randperm(blocks, generator=torch.Generator().manual_seed(1)).tolist()
    caches = torch.full((2, blocks, block_size, KV, D), 99.0)
    layer.bind_kv_cache(SDPABackend(), *caches)
    slots, tables = [], []
    for before, new in rows:
        whole.append(vectors(before + new))
        table = [free.pop() for _ in range(-(-(before + new) // block_size))]
        where = [table[p // block_size] * block_size + p % block_size for p in range(before + new)]
        if before:
            store_kvcache(whole[-1][1][:before], whole[-1][2][:before], *caches,
                          torch.tensor(where[:before]))
        slots += where[before:]
        tables.append(table)
    news = [new for _, new in rows]
    starts = [sum(news[:i]) for i in range(len(news) + 1)]
    context = Context.pack([0] * sum(news), [0] * sum(news), slots, starts,
                           [sum(row) for row in rows], tables)
    q, k, v = (torch.cat([sequence[i][-new:] for sequence, new in zip(whole, news)])
               for i in range(3))
    with use_context(context):
        got = layer(q, k, v)
    for i, (sequence, new) in enumerate(zip(whole, news)):
        want = exact(sequence[0][-new:], *sequence[1:])
        torch.testing.assert_close(got[starts[i]:starts[i + 1]], want)


def test_prefill_reads_only_its_own_blocks():
    """What lies in the others, and behind the last token, is NaN."""
    layer, length, n = Attention(H, KV, D), 10, 3
    caches = torch.full((2, 6, 4, KV, D), torch.nan)
    layer.bind_kv_cache(SDPABackend(), *caches)
    q, k, v = vectors(length)
    table = torch.tensor([4, 1, 3])
    slots = (table[:, None] * 4 + torch.arange(4)).flatten()[:length]
    store_kvcache(k, v, *caches, slots)
    padded = torch.cat([table, torch.zeros(2, dtype=table.dtype)]).int()
    got = SDPABackend().prefill(layer, q[-n:], padded, length)
    torch.testing.assert_close(got, exact(q[-n:], k, v))


def test_decode_reads_only_its_own_keys():
    """What lies in other blocks, and behind a row's last key, is NaN."""
    layer, lengths = Attention(H, KV, D), [6, 1, 9]
    caches = torch.full((2, 9, 4, KV, D), torch.nan)
    layer.bind_kv_cache(SDPABackend(), *caches)
    tables, whole = [[3, 5], [7], [1, 8, 2]], [vectors(n) for n in lengths]
    for table, (_, k, v) in zip(tables, whole):
        slots = (torch.tensor(table)[:, None] * 4 + torch.arange(4)).flatten()[:len(k)]
        store_kvcache(k, v, *caches, slots)
    context = Context.pack([0] * 3, [0] * 3, [0] * 3, [0, 1, 2, 3], lengths, tables)
    got = SDPABackend().decode(layer, torch.stack([q[-1] for q, _, _ in whole]), context)
    torch.testing.assert_close(got, torch.cat([exact(q[-1:], k, v) for q, k, v in whole]))


@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("new", [3, 9])
def test_a_bad_key_is_seen_from_its_position_on(new, which, spoilt):
    """And not before it: another prompt may share that beginning."""
    layer, length, bad = Attention(H, KV, D), 9, 7
    caches = torch.zeros(2, 3, 4, KV, D)
    layer.bind_kv_cache(SDPABackend(), *caches)
    sequence = vectors(length)
    right = exact(sequence[0][-new:], *sequence[1:])
    sequence[which][bad, 1, 3] = spoilt
    store_kvcache(*sequence[1:], *caches, torch.arange(length))
    got = SDPABackend().prefill(layer, sequence[0][-new:], torch.arange(3), length)
    seen = bad - (length - new)
    torch.testing.assert_close(got[:seen], right[:seen])
    assert got[seen:].isnan().all()
