"""One way to write each function of day 2, and the answers to its exercises."""

import torch
import torch.nn.functional as F


def decoder_layer(x, norm_1, attention, norm_2, mlp):
    x = x + attention(norm_1(x))
    return x + mlp(norm_2(x))


def rms_norm(x, weight, eps):
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def gated_mlp(x, gate_up, down):
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


def rotate_head(x, positions, base):
    D = x.shape[-1]
    theta = base ** (-torch.arange(0, D, 2) / D)            # [D/2]
    angles = positions[:, None] * theta                     # [T, D/2]
    cos, sin = angles.cos(), angles.sin()
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


def masked_attention(q, k, v, mask):
    scores = q @ k.T / q.shape[-1] ** 0.5                   # [T, L]
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return weights @ v


def grouped_attention(q, k, v, mask):
    group = q.shape[1] // k.shape[1]
    heads = []
    for h in range(q.shape[1]):
        scores = q[:, h] @ k[:, h // group].T / q.shape[-1] ** 0.5          # [T, L]
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        heads.append(weights @ v[:, h // group])
    return torch.stack(heads, dim=1)                        # [T, H, D]


def packed_mask(cu_seqlens):
    bounds = cu_seqlens.tolist()
    mask = torch.zeros(bounds[-1], bounds[-1], dtype=torch.bool)
    for start, end in zip(bounds, bounds[1:]):
        mask[start:end, start:end] = torch.ones(end - start, end - start).tril()
    return mask


def packed_rows(path, packed_modules):
    rows_of = {}
    for ours, parts in packed_modules.items():
        start = 0
        for part, rows in parts.items():
            rows_of[f"{path}.{part}.weight"] = (f"{path}.{ours}.weight", start, start + rows)
            start += rows
    return rows_of


def shift_by_1000():
    """The score does not change, but for rounding: only the distance counts.

    Values are added up, not multiplied with each other, so nothing would cancel their rotation:
    the output would depend on absolute positions.
    """
    from nanovllm.layers.rotary_embedding import apply_rotary_emb, default_inv_freq

    def rotate_at(x, position):
        angles = position * default_inv_freq(16, {"rope_theta": 10_000.0})[None]
        return apply_rotary_emb(x[None, None], angles.cos(), angles.sin())[0, 0]

    torch.manual_seed(0)
    q, k = torch.randn(16), torch.randn(16)
    near, far = (rotate_at(q, 5 + s) @ rotate_at(k, 2 + s) for s in (0, 1_000))
    assert abs(near - far) < 1e-3
    assert (rotate_at(k, 2) - rotate_at(k, 1_002)).norm() > 0.1 * k.norm()


def all_heads():
    """58.7 million parameters, and the cache doubles: 114,688 → 229,376 bytes for each token.

    8 more heads for k and for v, 128 wide, read from 1,024 numbers, in each of 28 layers. The cache
    holds k and v of 16 heads instead of 8, in bf16.
    """
    assert 28 * 2 * 8 * 128 * 1024 == 58_720_256
    assert [2 * 28 * heads * 128 * 2 for heads in (8, 16)] == [114_688, 229_376]


def norm_after_rope():
    """The logits change where norm weights differ, and stay where all of them are one.

    Two lines of Qwen3Attention.forward change places:

        q, k = self.rotary_emb(positions, q, k)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)

    A rotation keeps the length, so dividing by the root mean square before it or after it is the
    same. The weights are not the same for both components of a pair, and do not commute. So the bug
    is invisible on a model whose norm weights are one.
    """
    from nanovllm.layers.layernorm import RMSNorm
    from nanovllm.layers.rotary_embedding import RotaryEmbedding

    torch.manual_seed(0)
    rotary, norm = RotaryEmbedding(16, 32, {"rope_theta": 1e4}), RMSNorm(16)
    x, positions = torch.randn(8, 2, 16), torch.arange(8)
    with torch.no_grad():
        for equal in (True, False):
            late = norm(rotary(positions, x, x)[0])
            early = rotary(positions, norm(x), x)[0]
            assert torch.allclose(early, late, atol=1e-5) == equal
            norm.weight.copy_(1 + 0.3 * torch.randn(16))
