"""What is looked at in the functions of day 2: the parts of a decoder."""

from collections.abc import Callable
from functools import wraps

import torch
import torch.nn.functional as F

from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.rotary_embedding import apply_rotary_emb, default_inv_freq
from nanovllm.models.qwen3 import Qwen3DecoderLayer
from turns import Wrong, turn


def seeded(grader: Callable) -> Callable:
    """The grader with random numbers of its own: those of the notebook are not disturbed."""
    @wraps(grader)
    def judge(written):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            grader(written)
    return judge


def same(got, want: torch.Tensor, case: str, hint: str = "", atol: float = 1e-4) -> None:
    """Wrong, unless `got` is a tensor like `want`: its shape, its dtype, its numbers."""
    if not isinstance(got, torch.Tensor):
        raise Wrong(f"{case} gives {got!r}, not a tensor", "does the function end in a return?")
    if got.shape != want.shape:
        raise Wrong(f"{case} has the shape {list(got.shape)}, expected {list(want.shape)}", hint)
    if got.dtype != want.dtype:
        raise Wrong(f"{case} is {got.dtype}, expected {want.dtype}",
                    "cast back: the result has the dtype of the input, .to(x.dtype)")
    if got.isnan().any():
        raise Wrong(f"{case} contains NaN", hint)
    off = (got.float() - want.float()).abs().max().item()
    if off > atol:
        if want.numel() <= 8:
            rounded = [[round(number, 3) for number in x.float().flatten().tolist()]
                       for x in (got, want)]
            raise Wrong(f"{case} gives {rounded[0]}, expected {rounded[1]}", hint)
        raise Wrong(f"{case} is off by up to {off:.2g}", hint)


@turn
@seeded
def decoder_layer(written):
    """Each branch gets the norm of the stream as it is then, and is added to it."""
    x = torch.tensor([[1.0]])
    got = written(x.clone(), lambda h: h, lambda h: 10 * h, lambda h: h, lambda h: h + 1)
    same(got, torch.tensor([[23.0]]), "attention(h) = 10 h, mlp(h) = h + 1, no norms, x = 1",
         "first x becomes x + attention(x) = 11, and the MLP starts from there")
    got = written(x.clone(), lambda h: 2 * h, lambda h: h + 1, lambda h: 0 * h, lambda h: h + 5)
    same(got, torch.tensor([[9.0]]), "norm_1(h) = 2 h, attention(h) = h + 1, norm_2(h) = 0, "
         "mlp(h) = h + 5, x = 1",
         "a norm changes what a branch reads, not what is added to: x + attention(norm_1(x))")
    layer = Qwen3DecoderLayer.__new__(Qwen3DecoderLayer)
    torch.nn.Module.__init__(layer)
    layer.input_layernorm, layer.post_attention_layernorm = RMSNorm(8), RMSNorm(8)
    layer.mlp, attention = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    layer.self_attn = lambda positions, h: attention(h)
    with torch.no_grad():
        layer.post_attention_layernorm.weight.mul_(3)
        x = torch.randn(5, 8)
        got = written(x.clone(), layer.input_layernorm, attention,
                      layer.post_attention_layernorm, layer.mlp)
        same(got, layer(None, x), "a block with random parts", "which norm goes with which part?")


@turn
@seeded
def rms_norm(written):
    """The mean of squares, eps inside the root, fp32 inside, the cast before the weight."""
    x, weight = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0])
    same(written(x, weight, 0.0), torch.tensor([0.8485, 2.2627]),
         "x = [3, 4], weight = [1, 2], eps = 0",
         "the mean of the squares is (9 + 16) / 2 = 12.5; divide by its root, do not subtract a "
         "mean; then times the weight", 1e-3)
    same(written(torch.zeros(2), weight, 1e-6), torch.zeros(2), "x = [0, 0], eps = 1e-6",
         "add eps under the root, so that nothing is divided by 0")
    same(written(torch.tensor([1.0, 1.0]), torch.ones(2), 3.0), torch.tensor([0.5, 0.5]),
         "x = [1, 1], weight 1, eps = 3", "eps is added to the mean, inside the root: 1 / √(1 + 3)")
    same(written(torch.tensor([[3.0, 3.0], [1.0, 1.0]]), torch.ones(2), 0.0), torch.ones(2, 2),
         "two rows, [3, 3] and [1, 1]", "each row has a mean of its own: mean(-1, keepdim=True)")
    half = torch.full((8,), 300.0, dtype=torch.float16)
    same(written(half, torch.ones(8, dtype=torch.float16), 1e-6), torch.ones_like(half),
         "fp16, all of x is 300", "300² overflows fp16: begin with x.float()", 1e-2)
    for dtype in (torch.float32, torch.bfloat16):
        norm, x = RMSNorm(64).to(dtype), 4 * torch.randn(50, 64, dtype=dtype)
        with torch.no_grad():
            norm.weight.copy_(1 + 0.3 * torch.randn(64))
            want, before = norm(x), x.clone()
            got = written(x, norm.weight, norm.eps)
        if not torch.equal(x, before):
            raise Wrong("the function has changed x, and the residual stream still needs it",
                        "x.float() of an fp32 tensor is x itself: wide = wide * …, not wide *= …")
        same(got, want, f"random rows in {dtype}", "", 0.2)
        if dtype == torch.bfloat16 and not torch.equal(got, want):
            raise Wrong(f"bf16: {(got != want).sum()} of {x.numel()} numbers are rounded otherwise",
                        "cast back to the dtype of x first, then multiply by the weight")


@turn
@seeded
def gated_mlp(written):
    """Gate above up, SiLU on the gate alone, then down."""
    x, down = torch.tensor([[1.0]]), torch.tensor([[1.0]])
    same(written(x, torch.tensor([[2.0], [3.0]]), down), torch.tensor([[5.2848]]),
         "x = [[1]], gate_up = [[2], [3]], down = [[1]]",
         "silu(2) · 3 = 5.28: SiLU acts on the gate (the first half), and up is not changed", 1e-3)
    x, gate_up, down = torch.randn(5, 6), torch.randn(8, 6), torch.randn(6, 4)
    gate, up = F.linear(x, gate_up[:4]), F.linear(x, gate_up[4:])
    same(written(x, gate_up, down), F.linear(F.silu(gate) * up, down),
         "5 tokens, d = 6, F = 4, random numbers",
         "the first F rows of gate_up make the gate, the others up; down comes last")


@turn
@seeded
def rotate_head(written):
    """Halves, not neighbours; the angle is position times base ** (-2i / D)."""
    x = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    want = torch.tensor([[0.5403, 0.0, 0.8415, 0.0]])
    same(written(x, torch.tensor([1]), 10_000.0), want, "x = [[1, 0, 0, 0]], position 1",
         "pair 0 is (x[0], x[2]) and turns from (1, 0) to (cos 1, sin 1)", 1e-3)
    same(written(torch.tensor([[0.0, 0.0, 1.0, 0.0]]), torch.tensor([1]), 10_000.0),
         torch.tensor([[-0.8415, 0.0, 0.5403, 0.0]]), "x = [[0, 0, 1, 0]], position 1",
         "the other half of the rotation: (0, 1) turns to (-sin 1, cos 1)", 1e-3)
    same(written(torch.tensor([[0.0, 1.0, 0.0, 0.0]]), torch.tensor([1]), 10_000.0),
         torch.tensor([[0.0, 1.0, 0.0, 0.01]]), "x = [[0, 1, 0, 0]], position 1, base 10,000",
         "pair 1 of D = 4 turns by base ** (-2 · 1 / 4) = 0.01", 1e-4)
    for width, base in ((16, 10_000.0), (64, 1_000_000.0)):
        x, positions = torch.randn(6, width), torch.tensor([0, 1, 2, 50, 3, 700])
        angles = positions[:, None] * default_inv_freq(width, {"rope_theta": base})
        want = apply_rotary_emb(x[:, None], angles.cos(), angles.sin())[:, 0]
        same(written(x, positions, base), want, f"D = {width}, positions {positions.tolist()}",
             "each row has its own position", 1e-3)


@turn
@seeded
def masked_attention(written):
    """Scaled, masked before the softmax, over the keys."""
    q = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    k = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    v = torch.tensor([[10.0, 0.0], [0.0, 10.0], [5.0, 5.0]])
    mask = torch.ones(3, 3).tril().bool()
    got = written(q, k, v, mask)
    same(got[:1], v[:1], "the first of the three tokens above",
         "it sees key 0 only: the other scores become -inf before the softmax over the keys (the "
         "last dimension), so key 0 has weight 1")
    same(got[2:], torch.tensor([[3.3130, 6.6870]]), "the last of the three tokens above",
         "scores 0, 2, 2, each divided by √2, softmax over the keys (the last dimension)", 1e-3)
    q, k, v = torch.randn(5, 8), torch.randn(7, 8), torch.randn(7, 8)
    mask = torch.rand(5, 7) > 0.4
    mask[:, 0] = True
    want = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask[None])[0]
    same(written(q, k, v, mask), want, "5 queries, 7 keys, a random mask",
         "True in the mask means: may be seen")


@turn
@seeded
def grouped_attention(written):
    """Which kv head serves which query head; one mask for all heads."""
    k = v = torch.tensor([[[1.0], [2.0]]])                        # [L = 1, Hkv = 2, D = 1]
    got = written(torch.ones(1, 4, 1), k, v, torch.ones(1, 1).bool())
    same(got.flatten() if isinstance(got, torch.Tensor) else got, torch.tensor([1.0, 1, 2, 2]),
         "4 query heads, values 1 and 2 in kv heads 0 and 1",
         "query head h reads kv head h // (H / Hkv): 0, 0, 1, 1; repeat_interleave, not repeat")
    for heads, kv_heads in ((4, 4), (6, 2), (4, 1)):
        q = torch.randn(5, heads, 8)
        k, v = torch.randn(5, kv_heads, 8), torch.randn(5, kv_heads, 8)
        mask = torch.ones(5, 5).tril().bool()
        want = F.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in (q, k, v)), attn_mask=mask,
            enable_gqa=True)[0].transpose(0, 1)
        same(written(q, k, v, mask), want, f"5 tokens, {heads} query heads, {kv_heads} kv heads",
             "each query head by itself: scores over √D, mask, softmax over the keys, values")
    q, k, v = torch.randn(5, 4, 8), torch.randn(7, 2, 8), torch.randn(7, 2, 8)
    mask = torch.rand(5, 7) > 0.4
    mask[:, 0] = True
    want = F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)),
                                          attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)
    same(written(q, k, v, mask), want, "5 queries, 7 keys, a random mask",
         "use the mask that is given: True means that the key may be seen")


@turn
@seeded
def packed_mask(written):
    """A causal triangle for each prompt and nothing else."""
    for bounds in ([0, 2], [0, 1, 3], [0, 3, 9, 10, 14]):
        got = written(torch.tensor(bounds, dtype=torch.int32))
        lengths = [end - start for start, end in zip(bounds, bounds[1:])]
        want = torch.block_diag(*[torch.ones(n, n).tril() for n in lengths]).bool()
        case = f"cu_seqlens = {bounds}"
        if not isinstance(got, torch.Tensor) or got.dtype != torch.bool:
            raise Wrong(f"{case} gives no tensor of bool", "torch.zeros(T, T, dtype=torch.bool)")
        if got.shape != want.shape:
            raise Wrong(f"{case} gives the shape {list(got.shape)}, expected {list(want.shape)}",
                        "T is the last number of cu_seqlens")
        if (got != want).any():
            row, column = (got != want).nonzero()[0].tolist()
            starts = sum(bound <= row for bound in bounds), sum(bound <= column for bound in bounds)
            hint = ("a later token must not be seen" if column > row else
                    "another prompt must not be seen" if starts[0] != starts[1] else
                    "a token sees itself and all earlier tokens of its own prompt")
            raise Wrong(f"{case}: query {row}, key {column} is {bool(got[row, column])}", hint)


@turn
@seeded
def packed_rows(written):
    """Names and rows, in the order of the dictionary, for any number of parts."""
    got = written("mlp", {"gate_up_proj": {"gate_proj": 80, "up_proj": 80}})
    want = {"mlp.gate_proj.weight": ("mlp.gate_up_proj.weight", 0, 80),
            "mlp.up_proj.weight": ("mlp.gate_up_proj.weight", 80, 160)}
    compare_rows(got, want, "the example of the docstring")
    path = "model.layers.3.self_attn"
    got = written(path, {"qkv_proj": {"q_proj": 64, "k_proj": 32, "v_proj": 32}})
    want = {f"{path}.{part}.weight": (f"{path}.qkv_proj.weight", start, end) for part, start, end
            in (("q_proj", 0, 64), ("k_proj", 64, 96), ("v_proj", 96, 128))}
    compare_rows(got, want, "q, k and v with 64, 32 and 32 rows")
    got = written("x", {"ab": {"a": 1, "b": 2}, "cd": {"c": 3, "d": 4}})
    want = {"x.a.weight": ("x.ab.weight", 0, 1), "x.b.weight": ("x.ab.weight", 1, 3),
            "x.c.weight": ("x.cd.weight", 0, 3), "x.d.weight": ("x.cd.weight", 3, 7)}
    compare_rows(got, want, "a module with two packed layers, ab and cd")


def compare_rows(got, want: dict, case: str) -> None:
    if not isinstance(got, dict):
        raise Wrong(f"{case} gives {got!r}, not a dictionary", "does the function end in a return?")
    for name, place in want.items():
        if name not in got:
            raise Wrong(f"{case}: no entry named {name!r}; there are {sorted(got)}",
                        "path, a dot, the name in the checkpoint, and .weight")
        if not isinstance(got[name], (tuple, list)) or tuple(got[name]) != place:
            raise Wrong(f"{case}: {name} goes to {got[name]}, expected {place}",
                        "the rows of a part begin where those of the part before end, and at 0 in "
                        "each of our layers")
    if extra := sorted(set(got) - set(want)):
        raise Wrong(f"{case}: {extra[0]!r} is one entry too many", "only parts are listed")
