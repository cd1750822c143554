"""Each kernel against plain PyTorch: odd shapes, slices, threads, large and small values."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from nanovllm.cpu.backend import CPUBackend
from nanovllm.cpu.build import load_kernels
from nanovllm.cpu.layers import CRMSNorm, CRotaryEmbedding, CSiluAndMul
from nanovllm.cpu.linear import TiledLinear
from nanovllm.layers.activation import SiluAndMul
from nanovllm.layers.attention import Attention, SDPABackend
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.utils.context import Context

ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "max_position_embeddings": 1000}
pytestmark = pytest.mark.usefixtures("level")


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request):
    return request.param


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def kernels_for(dtype, head_dim=64):
    kernels = load_kernels(dtype, head_dim)
    if kernels is None:
        pytest.skip("no C compiler")
    return kernels


def check(got, right, dtype, scale=1.0):
    """Equal to what was computed in fp64 or fp32, as far as the dtype can tell."""
    near = (1e-5 if dtype is torch.float32 else 2**-6) * scale
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), right.double(), rtol=near, atol=near)


@pytest.mark.parametrize("size", [1e-18, 1.0, 1e4, 1e12])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 7), (40, 1024), (5, 3, 20), (70, 4, 64)])
def test_rms_norm(shape, size, dtype, threads):
    norm = RMSNorm(shape[-1], eps=1e-6).to(dtype)
    norm.weight.data.normal_()
    x = (torch.randn(*shape[:-1], shape[-1]) * size).to(dtype)
    got = CRMSNorm(norm, kernels_for(dtype))(x)
    check(got, norm.double()(x.double()), dtype)


def test_rms_norm_rounds_before_the_weight(dtype):
    """As Hugging Face does. Were it rounded once, a quarter of the numbers would differ."""
    norm = RMSNorm(256).to(dtype)
    norm.weight.data.uniform_(0.5, 1.5)
    x = torch.randn(64, 256).to(dtype)
    got, right = CRMSNorm(norm, kernels_for(dtype))(x), norm(x)
    if dtype is torch.bfloat16:
        assert (got != right).float().mean() < 0.01
    check(got, right, dtype)


def test_rms_norm_of_heads_in_the_middle(dtype):
    """q and k are slices of one tensor."""
    norm, heads = RMSNorm(20).to(dtype), torch.randn(9, 7, 20).to(dtype)
    for x in (heads[:, 2:5], heads[:, 6:], heads.transpose(0, 1)):
        check(CRMSNorm(norm, kernels_for(dtype))(x), norm.float()(x.float()), dtype)
        norm.to(dtype)


@pytest.mark.parametrize("tokens, n", [(0, 8), (1, 1), (3, 7), (17, 96), (70, 1000)])
def test_silu_and_mul(tokens, n, dtype, threads):
    x = (4 * torch.randn(tokens, 2 * n)).to(dtype)
    check(CSiluAndMul(None, kernels_for(dtype))(x), SiluAndMul()(x.double()), dtype, scale=4)


def test_silu_of_extreme_gates(dtype):
    """Gates from -3e38 to 3e38: what is far below 0 is 0, what is far above is itself."""
    gates = torch.tensor([0, 1e-30, 1, 20, 80, 87, 88, 88.5, 89, 100, 1e4, 1e30, 3e38])
    x = torch.cat([gates, torch.ones_like(gates)])[None].to(dtype)
    silu = CSiluAndMul(None, kernels_for(dtype))
    for sign in (1, -1):
        x[:, :13] = sign * x[:, :13].abs()
        check(silu(x), SiluAndMul()(x.double()), dtype)
    assert torch.isnan(silu(x.fill_(torch.nan))).all()


def test_rounding_to_bf16():
    """To the nearest, ties to even, as PyTorch rounds: silu of a large gate is the gate itself."""
    gate = torch.arange(128, 256).bfloat16().repeat_interleave(128)
    up = torch.linspace(1, 2 - 1 / 128, 128).bfloat16().repeat(128)  # their product has 16 bits
    x = torch.cat([gate, up])[None]
    assert torch.equal(CSiluAndMul(None, kernels_for(torch.bfloat16))(x)[0], gate * up)


@pytest.mark.parametrize("head_dim", [2, 20, 64])
@pytest.mark.parametrize("tokens, heads, kv_heads", [(0, 2, 1), (1, 1, 1), (9, 6, 2), (60, 8, 8)])
def test_rope(tokens, heads, kv_heads, head_dim, dtype, threads):
    """Of slices of one tensor, at positions in any order, int32 or int64."""
    rotary = RotaryEmbedding(head_dim, 1000, ROPE)
    x = torch.randn(tokens, heads + 2 * kv_heads, head_dim).to(dtype)
    q, k, _ = x.split((heads, kv_heads, kv_heads), dim=1)
    for positions in (torch.randint(1000, (tokens,)), torch.arange(tokens, dtype=torch.int32)):
        for got, right in zip(CRotaryEmbedding(rotary, kernels_for(dtype))(positions, q, k),
                              rotary(positions, q, k)):
            check(got, right, dtype, scale=2)


@pytest.mark.parametrize("k, n, bias", [(2, 32, True), (30, 96, False), (256, 64, True)])
def test_linear(k, n, bias, dtype, threads):
    """Of rows that are slices, any number of them."""
    kernels, linear = kernels_for(dtype), torch.nn.Linear(k, n, bias=bias).to(dtype)
    linear.requires_grad_(False)
    if not TiledLinear.fits(linear, kernels):
        pytest.skip("oneDNN multiplies on this processor")
    fast, exact = TiledLinear(linear, kernels), copy.deepcopy(linear).double()
    for rows in (*range(26), 40, 100):
        x = torch.randn(2 * rows, k).to(dtype)[::2]
        check(fast(x), exact(x.double()), dtype)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_linear_of_extreme_values(size, dtype):
    kernels, linear = kernels_for(dtype), torch.nn.Linear(64, 32, bias=False).to(dtype)
    if not TiledLinear.fits(linear, kernels):
        pytest.skip("oneDNN multiplies on this processor")
    x = (torch.randn(13, 64) * size).to(dtype)
    fast, exact = TiledLinear(linear, kernels), copy.deepcopy(linear).double()
    got, right = fast(x), exact(x.double())
    check(got.double().div(size).to(dtype), right / size, dtype)
    x[3, 5], x[4, 6] = torch.inf, torch.nan
    got = fast(x)
    assert not got[3:5].isfinite().any() and got[5:].isfinite().all()


def test_only_shapes_in_tiles_are_taken():
    kernels = kernels_for(torch.float32)
    for k, n in ((63, 64), (64, 63), (64, 48)):
        assert not TiledLinear.fits(torch.nn.Linear(k, n), kernels)
    assert TiledLinear.fits(torch.nn.Linear(64, 64), kernels) == bool(kernels.linear)


def paged(lengths, kv_heads, head_dim, block_size, dtype, size=1.0):
    """Caches with these sequences' numbers, all else 1,000; their block tables.

    Not NaN: prefill computes a result that is not finite again, by itself, and would look right.
    """
    counts = [-(-length // block_size) for length in lengths]
    order, width = torch.randperm(sum(counts) + 3).int(), max(counts) + 2
    caches = torch.full((2, len(order), block_size, kv_heads, head_dim), 1000.0, dtype=dtype)
    tables, used = torch.zeros(len(lengths), width, dtype=torch.int32), 0
    for row, (length, count) in enumerate(zip(lengths, counts)):
        tables[row, :count] = order[used:used + count]
        slots = (tables[row, :count, None] * block_size + torch.arange(block_size)).flatten()
        caches.flatten(1, 2)[:, slots[:length]] = (
            size * torch.randn(2, length, kv_heads, head_dim)).to(dtype)
        used += count
    return caches, tables


def attend(q, k, v, scale):
    """Attention in fp64 of the last n of L positions: q [n, H, D], k and v [L, Hkv, D]."""
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    n, length = q.shape[1], k.shape[1]
    mask = torch.ones(n, length, dtype=torch.bool).tril(length - n)
    out = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=scale,
                                         enable_gqa=True)
    return out[0].transpose(0, 1)


def make_layer(heads, kv_heads, head_dim, caches):
    layer = Attention(heads, kv_heads, head_dim)
    layer.bind_kv_cache(CPUBackend(), *caches)
    return layer


def keys_of(caches, table, length):
    return (cache[table.long()].flatten(0, 1)[:length] for cache in caches)


ATTENTION_CASES = pytest.mark.parametrize(
    "heads, kv_heads, head_dim, block_size, size",
    [(6, 2, 64, 16, 1.0), (5, 5, 20, 5, 1.0), (8, 1, 64, 5, 30.0), (1, 1, 20, 1, 30.0)])


def check_attention(got, right, dtype, size):
    """As `check`; with values 30 times as large, scores are in the thousands and round so."""
    fine = 1e-4 if size == 1 else 2e-3
    near = fine if dtype is torch.float32 else 2**-5
    torch.testing.assert_close(got.double(), right, rtol=near, atol=near * size)


@pytest.mark.parametrize("lengths", [[1], [5, 64, 1, 33], [257], [16] * 7 + [300]])
@ATTENTION_CASES
def test_decode(lengths, heads, kv_heads, head_dim, block_size, size, dtype, threads):
    """It reads its own keys alone; scores of some thousands too."""
    kernels_for(dtype, head_dim)
    caches, tables = paged(lengths, kv_heads, head_dim, block_size, dtype, size)
    rows = len(lengths)
    context = Context.pack([0] * rows, [0] * rows, [0] * rows, list(range(rows + 1)), lengths,
                           tables.tolist())
    q = (size * torch.randn(rows, 2 * heads, head_dim)).to(dtype)[:, heads:]
    layer = make_layer(heads, kv_heads, head_dim, caches)
    got = CPUBackend().decode(layer, q, context)
    for row, length in enumerate(lengths):
        right = attend(q[row:row + 1], *keys_of(caches, tables[row], length), layer.scale)
        check_attention(got[row:row + 1], right, dtype, size)


@pytest.mark.parametrize("n, length", [(1, 1), (2, 2), (1, 513), (3, 770), (64, 64), (500, 500),
                                       (130, 700), (33, 257), (13, 268)])
@ATTENTION_CASES
def test_prefill(n, length, heads, kv_heads, head_dim, block_size, size, dtype, threads):
    """It reads its own keys alone, the padding of the last block not either."""
    kernels_for(dtype, head_dim)
    caches, tables = paged([length], kv_heads, head_dim, block_size, dtype, size)
    q = (size * torch.randn(n, 3 * heads, head_dim)).to(dtype)[:, heads:2 * heads]
    layer = make_layer(heads, kv_heads, head_dim, caches)
    got = CPUBackend().prefill(layer, q, tables[0], length)
    right = attend(q, *keys_of(caches, tables[0], length), layer.scale)
    check_attention(got, right, dtype, size)


def test_prefill_of_rising_scores(dtype):
    """Each block of keys has a larger maximum than all before: sums so far must fade."""
    n, head_dim = 600, 64
    kernels_for(dtype, head_dim)
    caches, tables = paged([n], 1, head_dim, 16, dtype)
    places = tables[0, :-(-n // 16)].long()
    caches[0][places] = torch.linspace(0, 3, len(places))[:, None, None, None].to(dtype)
    layer, q = make_layer(2, 1, head_dim, caches), torch.ones(n, 2, head_dim).to(dtype)
    got = CPUBackend().prefill(layer, q, tables[0], n)
    check_attention(got, attend(q, *keys_of(caches, tables[0], n), layer.scale), dtype, size=1)


@pytest.mark.parametrize("which, spoilt", [
    *((which, spoilt) for which in ("keys", "values") for spoilt in (torch.nan, torch.inf,
                                                                     -torch.inf)),
    ("values", 3e38)])
@pytest.mark.parametrize("n, length, bad", [(40, 40, 17), (300, 600, 555), (13, 268, 255),
                                            (5, 64, 63), (600, 600, 1)])
def test_a_bad_key_is_seen_from_its_position_on(n, length, bad, spoilt, which, dtype, threads):
    """And not before it, as 0 * NaN: another prompt may share that beginning."""
    heads, head_dim = 6, 20
    kernels_for(dtype, head_dim)
    caches, tables = paged([length], 2, head_dim, 5, dtype)
    q = torch.randn(n, heads, head_dim).to(dtype)
    layer = make_layer(heads, 2, head_dim, caches)
    right = attend(q, *keys_of(caches, tables[0], length), layer.scale)
    caches[int(which == "values"), tables[0, bad // 5], bad % 5, :, 3] = spoilt
    got, seen = CPUBackend().prefill(layer, q, tables[0], length), bad - (length - n)
    check_attention(got[:seen], right[:seen], dtype, 1)
    assert got[seen:, :, 3].isnan().all() or not math.isnan(spoilt)


@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf, 3e38])
def test_a_score_far_below_the_largest_counts_for_nothing(spoilt, dtype):
    """e^x is 0 there, and not the smallest float: times 3e38 that would be seen."""
    kernels_for(dtype)
    caches, tables = paged([40], 1, 64, 16, dtype)
    low, high = tables[0, :2].tolist()
    caches[0, low, 2], caches[1, low, 2], caches[0, high, 1] = -100, spoilt, 100
    layer, q = make_layer(2, 1, 64, caches), torch.ones(1, 2, 64).to(dtype)
    context = Context.pack([0], [0], [0], [0, 1], [40], tables.tolist())
    for got in (CPUBackend().prefill(layer, q, tables[0], 40),
                CPUBackend().decode(layer, q, context)):
        assert spoilt != 3e38 or torch.equal(got[0, 0], caches[1, high, 1, 0])
        assert got.isnan().all() or spoilt == 3e38


@pytest.mark.parametrize("tokens", [0, 1, 5, 100])
def test_store(tokens, dtype, threads):
    """Keys and values that are slices go to their slots; those of slot -1 nowhere."""
    kernels_for(dtype)
    caches = torch.randn(2, 12, 16, 2, 64).to(dtype)
    right, x = caches.clone(), torch.randn(tokens, 10, 64).to(dtype)
    k, v = x[:, 6:8], x[:, 8:]
    slots = torch.randperm(12 * 16)[:tokens].int()
    slots[1::4] = -1
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            right[0].flatten(0, 1)[slot], right[1].flatten(0, 1)[slot] = k[token], v[token]
    context = Context.pack([0], [0], [0], [0, 1], [1], [[0]])
    context.slot_mapping = slots
    CPUBackend().store(make_layer(6, 2, 64, caches), k, v, context)
    assert torch.equal(caches, right)


def test_without_tiles_prefill_is_pytorch(level):
    """What has no kernel is inherited: the plain backend's."""
    kernels = kernels_for(torch.float32)
    has_tiles = kernels.paged_prefill is not None
    if level == "no AVX-512":
        assert not has_tiles
    assert has_tiles == (kernels.linear is not None) == (kernels.run_layers is not None)
    caches, tables = paged([40], 2, 64, 16, torch.float32)
    layer, q = make_layer(6, 2, 64, caches), torch.randn(40, 6, 64)
    same = torch.equal(CPUBackend().prefill(layer, q, tables[0], 40),
                       SDPABackend().prefill(layer, q, tables[0], 40))
    assert same != has_tiles
