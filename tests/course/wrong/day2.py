"""Typical wrong answers to the turns of day 2."""

import torch
import torch.nn.functional as F


def post_norm(x, norm_1, attention, norm_2, mlp):
    x = norm_1(x + attention(x))
    return norm_2(x + mlp(x))


def both_from_x(x, norm_1, attention, norm_2, mlp):
    return x + attention(norm_1(x)) + mlp(norm_2(x))


def no_residual(x, norm_1, attention, norm_2, mlp):
    return mlp(norm_2(attention(norm_1(x))))


def norm_kept(x, norm_1, attention, norm_2, mlp):
    x = norm_1(x)
    x = x + attention(x)
    return x + mlp(norm_2(x))


def sum_of_squares(x, weight, eps):
    return weight * x / (x.pow(2).sum(-1, keepdim=True) + eps).sqrt()


def layer_norm(x, weight, eps):
    return weight * F.layer_norm(x, (x.shape[-1],), eps=eps)


def eps_outside(x, weight, eps):
    wide = x.float()
    return weight * (wide / (wide.pow(2).mean(-1, keepdim=True).sqrt() + eps)).to(x.dtype)


def nothing_widened(x, weight, eps):
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def weight_first(x, weight, eps):
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (weight.float() * wide).to(x.dtype)


def mean_of_all(x, weight, eps):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean() + eps)).to(x.dtype)


def writes_into_x(x, weight, eps):
    wide = x.float()
    wide *= torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def stays_wide(x, weight, eps):
    wide = x.float()
    return weight * wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


def up_through_silu(x, gate_up, down):
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(gate * F.silu(up), down)


def silu_of_product(x, gate_up, down):
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate * up), down)


def interleaved_gate(x, gate_up, down):
    both = F.linear(x, gate_up)
    return F.linear(F.silu(both[..., 0::2]) * both[..., 1::2], down)


def without_down(x, gate_up, down):
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.silu(gate) * up


def turned(x, positions, base, pairs="halves", sign=1, power=2):
    D = x.shape[-1]
    angles = sign * positions[:, None] * base ** (-power * torch.arange(D // 2) / D)
    cos, sin = angles.cos(), angles.sin()
    x1, x2 = x.chunk(2, -1) if pairs == "halves" else (x[:, 0::2], x[:, 1::2])
    new = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    return torch.cat(new, -1) if pairs == "halves" else torch.stack(new, -1).flatten(-2)


def neighbours(x, positions, base):
    return turned(x, positions, base, "neighbours")


def the_other_way(x, positions, base):
    return turned(x, positions, base, sign=-1)


def slow_by_half(x, positions, base):
    return turned(x, positions, base, power=1)


def same_sign(x, positions, base):
    D = x.shape[-1]
    angles = positions[:, None] * base ** (-2 * torch.arange(D // 2) / D)
    x1, x2 = x.chunk(2, -1)
    return torch.cat([x1 * angles.cos() + x2 * angles.sin(),
                      x2 * angles.cos() + x1 * angles.sin()], -1)


def last_position(x, positions, base):
    return turned(x, positions[-1:], base)


def not_scaled(q, k, v, mask):
    return (q @ k.T).masked_fill(~mask, float("-inf")).softmax(-1) @ v


def masked_by_zero(q, k, v, mask):
    return (q @ k.T / q.shape[-1] ** 0.5).masked_fill(~mask, 0.0).softmax(-1) @ v


def masked_after_softmax(q, k, v, mask):
    return (q @ k.T / q.shape[-1] ** 0.5).softmax(-1).masked_fill(~mask, 0.0) @ v


def softmax_over_queries(q, k, v, mask):
    scores = (q @ k.T / q.shape[-1] ** 0.5).masked_fill(~mask, float("-inf"))
    return scores.softmax(0) @ v


def mask_the_wrong_way(q, k, v, mask):
    return (q @ k.T / q.shape[-1] ** 0.5).masked_fill(mask, float("-inf")).softmax(-1) @ v


def grouped(q, k, v, mask, kv_head, scale=True):
    heads = []
    for h in range(q.shape[1]):
        scores = q[:, h] @ k[:, kv_head(h)].T / (q.shape[-1] ** 0.5 if scale else 1)
        heads.append(scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v[:, kv_head(h)])
    return torch.stack(heads, 1)


def taken_in_turn(q, k, v, mask):
    return grouped(q, k, v, mask, lambda h: h % k.shape[1])


def all_read_the_first(q, k, v, mask):
    return grouped(q, k, v, mask, lambda h: 0)


def groups_not_scaled(q, k, v, mask):
    return grouped(q, k, v, mask, lambda h: h // (q.shape[1] // k.shape[1]), scale=False)


def groups_not_masked(q, k, v, mask):
    return grouped(q, k, v, torch.ones_like(mask), lambda h: h // (q.shape[1] // k.shape[1]))


def groups_always_causal(q, k, v, mask):
    mask = torch.ones_like(mask).tril()
    return grouped(q, k, v, mask, lambda h: h // (q.shape[1] // k.shape[1]))


def all_causal(cu_seqlens):
    n = int(cu_seqlens[-1])
    return torch.ones(n, n).tril().bool()


def full_blocks(cu_seqlens):
    return torch.block_diag(*[torch.ones(n, n) for n in cu_seqlens.diff().tolist()]).bool()


def strictly_before(cu_seqlens):
    lengths = cu_seqlens.diff().tolist()
    return torch.block_diag(*[torch.ones(n, n).tril(-1) for n in lengths]).bool()


def numbers_instead(cu_seqlens):
    return torch.block_diag(*[torch.ones(n, n).tril() for n in cu_seqlens.diff().tolist()])


def never_advances(path, packed_modules):
    return {f"{path}.{part}.weight": (f"{path}.{ours}.weight", 0, rows)
            for ours, parts in packed_modules.items() for part, rows in parts.items()}


def goes_on_counting(path, packed_modules):
    found, start = {}, 0
    for ours, parts in packed_modules.items():
        for part, rows in parts.items():
            found[f"{path}.{part}.weight"] = (f"{path}.{ours}.weight", start, start + rows)
            start += rows
    return found


def without_path(path, packed_modules):
    found = {}
    for ours, parts in packed_modules.items():
        start = 0
        for part, rows in parts.items():
            found[f"{part}.weight"] = (f"{ours}.weight", start, start + rows)
            start += rows
    return found


def starts_only(path, packed_modules):
    found = goes_on_counting(path, packed_modules)
    return {name: start for name, (_, start, _) in found.items()}


WRONG = [
    ("decoder_layer", post_norm, "what a branch reads"),
    ("decoder_layer", both_from_x, "x becomes x + attention(x)"),
    ("decoder_layer", no_residual, "23"),
    ("decoder_layer", norm_kept, "not what is added to"),
    ("rms_norm", sum_of_squares, "12.5"),
    ("rms_norm", layer_norm, "do not subtract"),
    ("rms_norm", eps_outside, "inside the root"),
    ("rms_norm", mean_of_all, "keepdim"),
    ("rms_norm", nothing_widened, "overflows"),
    ("rms_norm", weight_first, "then multiply by the weight"),
    ("rms_norm", writes_into_x, "has changed x"),
    ("rms_norm", stays_wide, "cast back"),
    ("gated_mlp", up_through_silu, "SiLU acts on the gate"),
    ("gated_mlp", silu_of_product, "SiLU acts on the gate"),
    ("gated_mlp", interleaved_gate, "first F rows"),
    ("gated_mlp", without_down, "down comes last"),
    ("rotate_head", neighbours, "pair 0 is (x[0], x[2])"),
    ("rotate_head", the_other_way, "(cos 1, sin 1)"),
    ("rotate_head", slow_by_half, "0.01"),
    ("rotate_head", same_sign, "other half"),
    ("rotate_head", last_position, "its own position"),
    ("masked_attention", not_scaled, "√2"),
    ("masked_attention", masked_by_zero, "-inf"),
    ("masked_attention", masked_after_softmax, "before the softmax"),
    ("masked_attention", softmax_over_queries, "over the keys"),
    ("masked_attention", mask_the_wrong_way, "sees key 0 only"),
    ("grouped_attention", taken_in_turn, "0, 0, 1, 1"),
    ("grouped_attention", all_read_the_first, "0, 0, 1, 1"),
    ("grouped_attention", groups_not_scaled, "√D"),
    ("grouped_attention", groups_not_masked, "mask"),
    ("grouped_attention", groups_always_causal, "that is given"),
    ("packed_mask", all_causal, "another prompt"),
    ("packed_mask", full_blocks, "later token"),
    ("packed_mask", strictly_before, "itself"),
    ("packed_mask", numbers_instead, "bool"),
    ("packed_rows", never_advances, "begin where"),
    ("packed_rows", goes_on_counting, "at 0 in"),
    ("packed_rows", without_path, "no entry"),
    ("packed_rows", starts_only, "goes to 0"),
]
