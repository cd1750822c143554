"""The kernels around attention against the plain layers."""

import random

import pytest
import torch
import torch.nn.functional as F

from nanovllm.gpu.layer_kernels import add_rms_norm, norm_rope_store_, one_row_linear, silu_and_mul
from nanovllm.layers.activation import SiluAndMul
from nanovllm.layers.attention import store_kvcache
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.rotary_embedding import RotaryEmbedding


def norm_of(n, dtype, eps=1e-6):
    """A norm with weights that show."""
    norm = RMSNorm(n, eps)
    norm.weight.data = (1 + .3 * torch.randn(n)).to(dtype)
    return norm.requires_grad_(False)


@pytest.mark.parametrize("dtype, eps", [(torch.float32, 1e-5), (torch.float16, 4e-3)])
@pytest.mark.parametrize("n", [48, 100, 1024, 3000])
def test_add_rms_norm(n, dtype, eps):
    norm = norm_of(n, dtype)
    x, residual = torch.randn(2, 5, n).to(dtype)
    summed, updated = x + residual, residual.clone()
    assert (add_rms_norm(x, updated, norm.weight, norm.eps) - norm(summed)).abs().max() < eps
    assert updated.equal(summed)                                                  # in place
    assert (add_rms_norm(None, residual, norm.weight, norm.eps) - norm(residual)).abs().max() < eps


@pytest.mark.parametrize("dtype, eps", [(torch.float32, 1e-5), (torch.float16, 4e-3)])
@pytest.mark.parametrize("n", [80, 1500])
def test_silu_and_mul(n, dtype, eps):
    x = torch.randn(3, 2 * n).to(dtype)
    assert (silu_and_mul(x) - SiluAndMul()(x)).abs().max() < eps


@pytest.mark.parametrize("seed", range(16))
def test_norm_rope_store(seed):
    """q in place, k and v in their slots; those without a slot, and k and v themselves, stay."""
    rng, _ = random.Random(seed), torch.manual_seed(seed)
    dtype, eps = rng.choice([(torch.float32, 2e-5), (torch.float16, 2e-2)])
    num_q, num_k, head_dim = rng.choice([1, 4, 9]), rng.choice([1, 3]), rng.choice([8, 24, 128])
    rotary, tokens = RotaryEmbedding(head_dim, 99, {"rope_theta": 1e4}), rng.randrange(1, 9)
    q_norm, k_norm = (norm_of(head_dim, dtype, 1e-2 if seed % 2 else 1e-6) for _ in range(2))
    heads = torch.randn(tokens, num_q + 2 * num_k, head_dim).to(dtype)
    before = heads.clone()
    q, k, v = before.split((num_q, num_k, num_k), dim=1)
    if has_norm := rng.random() < .7:
        q, k = q_norm(q), k_norm(k)
    positions, slots = torch.randint(99, (tokens,)), torch.randperm(48)[:tokens] - 1
    q, k = rotary(positions, q, k)
    want = torch.randn(2, 3, 16, num_k + 2, head_dim + 1).to(dtype)     # a cache with strides
    caches, stored = want.clone(), slots >= 0
    store_kvcache(k[stored], v[stored], *want[..., 2:, :-1], slots[stored])
    norm_rope_store_(heads, positions, rotary.cos_sin,
                     torch.stack([q_norm.weight, k_norm.weight]) if has_norm else None,
                     q_norm.eps, *caches[..., 2:, :-1], slots)
    assert (heads[:, :num_q] - q).abs().max() < eps
    assert heads[:, num_q:].equal(before[:, num_q:])
    assert (caches - want).abs().max() < eps
    assert caches[1].equal(want[1])                                     # values are only copied


def test_a_far_slot():
    """A slot whose address passes 2**31 elements: memory that is reserved and never touched."""
    cache = torch.empty_strided((1, 3, 2, 16), (0, 2**30, 16, 1), dtype=torch.float16)
    k_cache, v_cache = cache.split(1, dim=2)
    heads = torch.randn(1, 3, 16).to(torch.float16)
    rotary = RotaryEmbedding(16, 4, {"rope_theta": 1e4})
    positions, slots = torch.tensor([[0], [2]], dtype=torch.int32)
    norm_rope_store_(heads, positions, rotary.cos_sin, None, 0., k_cache, v_cache, slots)
    assert k_cache[0, 2, 0].equal(heads[0, 1])                          # position 0 turns by 0
    assert v_cache[0, 2, 0].equal(heads[0, 2])


@pytest.mark.parametrize("dtype, eps", [(torch.float32, 2e-5), (torch.float16, 2e-2)])
@pytest.mark.parametrize("n, k", [(7, 100), (12, 1024), (33, 1500), (6, 2100), (1, 5), (9, 1025)])
@pytest.mark.parametrize("has_norm", [False, True])
def test_one_row_linear(n, k, dtype, eps, has_norm):
    """With and without a norm, gated, and added in place; nothing is written beyond the end."""
    torch.manual_seed(n)
    norm = norm_of(k, dtype, eps=1e-2)                                  # one that shows
    x, wide = (torch.randn(1, size).to(dtype) for size in (k, n + 1))
    weight = (torch.randn(2 * n, k) / k**.5).to(dtype)
    normed, around = (norm(x), (norm.weight, norm.eps)) if has_norm else (x, (None, 0.))
    got = one_row_linear(x, weight, *around)
    assert (got - F.linear(normed, weight)).abs().max() < eps
    got = one_row_linear(x, weight, *around, gated=True)
    assert (got - SiluAndMul()(F.linear(normed, weight))).abs().max() < eps
    summed, got = wide.clone(), wide.clone()
    summed[:, :n] += F.linear(normed, weight[:n])
    one_row_linear(x, weight[:n], *around, residual=got[:, :n])
    assert (got - summed).abs().max() < eps and got[:, n:].equal(wide[:, n:])


def test_one_row_linear_takes_one_row():
    with pytest.raises(ValueError, match="one row, not 2"):
        one_row_linear(torch.ones(2, 4), torch.ones(3, 4))
