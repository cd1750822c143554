"""Random shapes and extreme numbers: no kernel reads or writes beside its tensors, and no row of a
step is changed by what stands in another. The sanitizers of tools/test.py run this too."""

import random
from types import SimpleNamespace

import pytest
import torch

from nanovllm.cpu.backend import CPUBackend
from nanovllm.cpu.build import load_kernels
from nanovllm.cpu.layers import CRMSNorm, CRotaryEmbedding, CSiluAndMul
from nanovllm.cpu.linear import TiledLinear
from nanovllm.layers.activation import SiluAndMul
from nanovllm.layers.attention import Attention, SDPABackend
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.rotary_embedding import RotaryEmbedding

pytestmark = [pytest.mark.usefixtures("level"), pytest.mark.parametrize("seed", range(12))]
ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "max_position_embeddings": 1000}


@pytest.fixture
def case(seed):
    """(random numbers, a dtype, the kernels for it and a head size)."""
    rng, dtype = random.Random(seed), (torch.float32, torch.bfloat16)[seed % 2]
    torch.manual_seed(seed)
    kernels = load_kernels(dtype, rng.choice([20, 64]))
    if kernels is None:
        pytest.skip("no C compiler")
    return rng, dtype, kernels


def extreme(*shape, dtype, share=0.2, largest=None):
    """Ordinary numbers, and among them this share of the largest, smallest and what is none."""
    info = torch.finfo(dtype)
    largest = largest or info.max
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, largest, -largest, info.tiny,
                        info.tiny / 4, -info.tiny / 4, -0.0, 0.0], dtype=dtype)
    x = torch.randn(shape).to(dtype)
    return torch.where(torch.rand(shape) < share, odd[torch.randint(len(odd), shape)], x)


def check(got, right, dtype):
    near = 1e-5 if dtype is torch.float32 else 2**-6
    torch.testing.assert_close(got, right, rtol=near, atol=near, equal_nan=True)


def with_extreme_rows(rows, *shape, dtype):
    """[rows, *shape] of which some rows are extreme; which are not; the same, they alone."""
    x, keep = extreme(rows, *shape, dtype=dtype), torch.rand(rows) < 0.5
    x[keep] = torch.randn(int(keep.sum()), *shape).to(dtype)
    return x, keep, torch.where(keep.view(-1, *[1] * len(shape)), x, 0)


def test_norm_activation_and_rotation(case):
    """Rows are kept apart, to the bit. Activation is the plain layer's for every number."""
    rng, dtype, kernels = case
    tokens, n = rng.choice([0, 1, 2, 33]), rng.choice([1, 2, 15, 16, 17, 129])
    norm = RMSNorm(n).to(dtype)
    norm.weight.data.normal_()
    x, keep, alone = with_extreme_rows(tokens, n, dtype=dtype)
    got = CRMSNorm(norm, kernels)(x)
    assert torch.equal(got[keep], CRMSNorm(norm, kernels)(alone)[keep])
    check(got[keep], norm(x[keep]), dtype)
    x = extreme(tokens, 2 * n, dtype=dtype)
    check(CSiluAndMul(None, kernels)(x), SiluAndMul()(x), dtype)
    rotary, positions = RotaryEmbedding(64, 1000, ROPE), torch.randint(1000, (tokens,))
    x, keep, alone = with_extreme_rows(tokens, 4, 64, dtype=dtype)
    turn = lambda x, at: CRotaryEmbedding(rotary, kernels)(at, x[:, :3], x[:, 3:])
    for got, same, right in zip(turn(x, positions), turn(alone, positions),
                                rotary(positions[keep], x[keep][:, :3], x[keep][:, 3:])):
        assert torch.equal(got[keep], same[keep])
        check(got[keep], right, dtype)


def test_store(case):
    """To the bit, and slots below zero are nowhere."""
    rng, dtype, kernels = case
    tokens, kv_heads, bs = rng.choice([0, 1, 7, 90]), rng.choice([1, 3]), rng.choice([1, 5, 16])
    d, blocks = kernels.head_dim, 1 + 90 // bs
    caches = extreme(2, blocks, bs, kv_heads, d, dtype=dtype)
    k, v = extreme(2, tokens, kv_heads, d, dtype=dtype)
    slots = torch.randperm(blocks * bs)[:tokens].int()
    slots[torch.rand(tokens) < 0.4] = rng.choice([-1, -2**31])
    right = caches.clone().view(torch.int32 if dtype is torch.float32 else torch.int16)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            for cache, x in zip(right, (k, v)):
                cache.flatten(0, 1)[slot] = x[token].view(right.dtype)
    layer = Attention(kv_heads, kv_heads, d)
    layer.bind_kv_cache(CPUBackend(), *caches)
    CPUBackend().store(layer, k, v, SimpleNamespace(slot_mapping=slots))
    assert torch.equal(caches.view(right.dtype), right)


def test_a_product_keeps_its_rows_apart(case):
    """To the bit: whatever the other rows hold, and also where there is one row alone."""
    rng, dtype, kernels = case
    k, n = rng.choice([2, 30, 130]), rng.choice([32, 96])
    linear = torch.nn.Linear(k, n, bias=rng.random() < 0.5, dtype=dtype).requires_grad_(False)
    if not TiledLinear.fits(linear, kernels):
        pytest.skip("oneDNN multiplies on this processor")
    fast = TiledLinear(linear, kernels)
    for rows in (1, rng.randrange(2, 13), rng.randrange(13, 60)):
        x, keep, alone = with_extreme_rows(rows, k, dtype=dtype)
        got = fast(x)
        assert torch.equal(got[keep], fast(alone)[keep])
        check(got[keep], linear(x[keep]), dtype)


def cached(rng, lengths, kv_heads, d, bs, dtype):
    """Caches of NaN but for these rows' own keys and values; tables that are padded with -1."""
    counts = [-(-length // bs) for length in lengths]
    order = torch.randperm(sum(counts) + 2).int()
    width = max(counts, default=0) + rng.choice([0, 3])
    caches = torch.full((2, len(order), bs, kv_heads, d), torch.nan, dtype=dtype)
    tables = torch.full((len(lengths), width), -1, dtype=torch.int32)
    for row, count in enumerate(counts):
        tables[row, :count], order = order[:count], order[count:]
        slots = (tables[row, :count, None] * bs + torch.arange(bs)).flatten()[:lengths[row]]
        caches.flatten(1, 2)[:, slots] = torch.randn(2, lengths[row], kv_heads, d).to(dtype)
    return caches, tables


def near_a_border(rng, bs):
    """A length at which blocks of `bs`, or the kernel's 32 or 256 keys, are full or nearly."""
    return max(1, rng.choice([bs, 32, 256, 2 * bs]) * rng.randrange(1, 3) + rng.choice([-1, 0, 1]))


def test_attention_keeps_rows_and_positions_apart(case):
    """A row with extreme queries, keys and values beside others; in it, what lies before them."""
    rng, dtype, kernels = case
    d, kv_heads, group = kernels.head_dim, rng.choice([1, 2]), rng.choice([1, 3])
    bs, heads = rng.choice([1, 5, 16]), kv_heads * group
    lengths = [near_a_border(rng, bs) for _ in range(rng.randrange(4))]
    caches, tables = cached(rng, lengths, kv_heads, d, bs, dtype)
    layer, plain = Attention(heads, kv_heads, d), Attention(heads, kv_heads, d)
    layer.bind_kv_cache(CPUBackend(), *caches)
    exact = [cache.float() for cache in caches]
    plain.bind_kv_cache(SDPABackend(), *exact)
    q = torch.randn(len(lengths), heads, d).to(dtype)
    rows = len(lengths)
    context = SimpleNamespace(block_tables=tables,
                              context_lens=torch.tensor(lengths, dtype=torch.int32))
    before = CPUBackend().decode(layer, q, context)
    near = dict(rtol=2e-4, atol=2e-4) if dtype is torch.float32 else dict(rtol=0.04, atol=0.04)
    bad = rng.randrange(rows) if rows else None
    starts = [rng.randrange(length) for length in lengths]         # what is extreme begins there
    news = [torch.randn(rng.randrange(1, length + 1), heads, d).to(dtype) for length in lengths]
    right = [SDPABackend().prefill(plain, new.float(), table, length)
             for new, table, length in zip(news, tables, lengths)]
    if rows:
        # without our kernel PyTorch adds -inf to a masked score, which must not be +inf
        most = None if kernels.paged_prefill else 1e15
        q[bad] = extreme(heads, d, dtype=dtype)
        for p in range(starts[bad], lengths[bad]):
            for cache, share in zip(caches, rng.choice([(0, 0.3), (0.3, 0), (0.3, 0.3)])):
                cache[tables[bad, p // bs], p % bs] = extreme(kv_heads, d, dtype=dtype, share=share,
                                                              largest=most)
    after = CPUBackend().decode(layer, q, context)
    for row, (new, table, length) in enumerate(zip(news, tables, lengths)):
        got = CPUBackend().prefill(layer, new, table, length)
        assert got.shape == new.shape and got.dtype == dtype
        if row != bad:
            assert torch.equal(after[row], before[row])
            torch.testing.assert_close(got.float(), right[row], **near)
        else:
            sound = max(0, starts[row] - (length - len(new)))
            torch.testing.assert_close(got[:sound].float(), right[row][:sound], **near)
