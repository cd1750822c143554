"""Paged attention by our kernels against day 3's, and the backends around them."""

import random

import pytest
import torch
import torch.nn.attention.varlen as varlen

from nanovllm.gpu.attention_kernels import paged_decode, paged_prefill
from nanovllm.gpu.backends import TorchBackend, TritonBackend
from nanovllm.layers.attention import Attention, SDPABackend
from nanovllm.utils.context import Context, use_context

DTYPES = [(torch.float32, 2e-5), (torch.float16, 4e-3)]


def paged_case(heads, kv_heads, head_dim, bs, lens, news, dtype=torch.float32, seed=0):
    """A layer over a random cache and a step's queries: news[i] of lens[i] tokens in row i."""
    g = torch.Generator().manual_seed(seed)
    width = max(-(-n // bs) for n in lens)
    blocks = width * len(lens) + 2
    randn = lambda *shape: torch.randn(*shape, generator=g).to(dtype)
    layer = Attention(heads, kv_heads, head_dim)
    layer.bind_kv_cache(SDPABackend(), *randn(2, blocks, bs, kv_heads, head_dim))
    tables = torch.randperm(blocks, generator=g)[:width * len(lens)].view(len(lens), -1).tolist()
    q = randn(sum(news), 3 * heads, head_dim)[:, heads:2 * heads]   # strided, as a slice of qkv is
    starts = torch.tensor([0, *news]).cumsum(0).tolist()
    positions = [p for n, new in zip(lens, news) for p in range(n - new, n)]
    slots = [tables[i][p // bs] * bs + p % bs for i, (n, new) in enumerate(zip(lens, news))
             for p in range(n - new, n)]
    return layer, q, Context.pack([0] * len(q), positions, slots, starts, lens, tables)


def row_by_row(layer, q, context):
    """Day 3's attention of each row."""
    starts, lens = context.cu_seqlens_q.tolist(), context.context_lens.tolist()
    return torch.cat([SDPABackend().prefill(layer, q[a:b], context.block_tables[i], lens[i])
                      for i, (a, b) in enumerate(zip(starts, starts[1:]))])


@pytest.mark.parametrize("seed", range(16))
def test_random_shapes(seed):
    rng = random.Random(seed)
    dtype, eps = rng.choice(DTYPES)
    kv_heads, group = rng.choice([1, 2, 3]), rng.choice([1, 2, 5])
    head_dim, bs = rng.choice([8, 16, 24, 64, 80, 128, 192, 256]), rng.choice([16, 32, 64, 128])
    news = sorted(rng.randrange(1, 40) for _ in range(rng.randrange(1, 5)))
    lens = [new + rng.choice([0, 1, 15, 16, 70]) for new in news]
    shape = kv_heads * group, kv_heads, head_dim, bs
    layer, q, context = paged_case(*shape, lens, news, dtype, seed)
    cache = layer.k_cache, layer.v_cache, context.block_tables
    got = paged_prefill(q, *cache, context.cu_seqlens_q, max(news), context.context_lens,
                        layer.scale)
    assert (got - row_by_row(layer, q, context)).abs().max() < eps
    q = q[:len(lens)]
    want = SDPABackend().decode(layer, q, context)
    for parts in (1, rng.choice([2, 4, 16])):
        got = paged_decode(q, *cache, context.context_lens, layer.scale, parts)
        assert (got - want).abs().max() < eps, parts


@pytest.mark.parametrize("parts", [1, 4])
def test_a_padded_row_gives_zeros(parts):
    layer, q, context = paged_case(4, 2, 16, 16, [1, 17, 70], [1] * 3)
    context.context_lens[1] = 0
    got = paged_decode(q, layer.k_cache, layer.v_cache, context.block_tables, context.context_lens,
                       layer.scale, parts)
    assert not got[1].any() and got[0].any() and got[2].any()


def run_mixed_step(backend, dtype, lens=(30, 9, 40, 20), news=(1, 1, 7, 20)):
    """Output and caches of one step through this backend."""
    layer, q, context = paged_case(4, 2, 16, 16, list(lens), list(news), dtype, seed=3)
    k, v = torch.randn(2, len(q), 2, 16, generator=torch.Generator().manual_seed(4)).to(dtype)
    layer.backend = backend
    with use_context(context):
        return layer(q, k, v), layer.k_cache, layer.v_cache


@pytest.mark.parametrize("dtype, eps", DTYPES)
@pytest.mark.parametrize("news", [(1, 1, 7, 20), (1, 1, 1, 1), (2, 5, 7, 20)])
def test_a_step_of_the_backend(dtype, eps, news):
    """Decode rows, chunks and both; what is stored is the same to the bit."""
    ours, *caches = run_mixed_step(TritonBackend(), dtype, news=news)
    want, *others = run_mixed_step(SDPABackend(), dtype, news=news)
    assert (ours - want).abs().max() < eps
    assert all(a.equal(b) for a, b in zip(caches, others))


def test_torch_backend(monkeypatch):
    """Its arguments for `varlen_attn`, which needs a GPU, mean what day 3 computes."""
    def stand_in(q, k_cache, v_cache, starts, key_starts, max_q, max_k, *, scale, window_size,
                 enable_gqa, seqused_k, block_table):
        assert window_size == (-1, 0) and enable_gqa and max_k >= seqused_k.max()
        assert {x.dtype for x in (starts, key_starts, seqused_k, block_table)} == {torch.int32}
        assert max_q == starts.diff().max() and key_starts.diff().equal(seqused_k)
        layer = Attention(q.shape[1], k_cache.shape[2], q.shape[2])
        layer.scale, layer.k_cache, layer.v_cache = scale, k_cache, v_cache
        context = Context.pack([0], [0], [0], starts.tolist(), seqused_k.tolist(),
                               block_table.tolist())
        return row_by_row(layer, q, context)

    monkeypatch.setattr(varlen, "varlen_attn", stand_in, raising=False)
    want = run_mixed_step(SDPABackend(), torch.float32)[0]
    assert (run_mixed_step(TorchBackend(), torch.float32)[0] - want).abs().max() < 2e-5
