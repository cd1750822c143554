"""Whole models: as the taught layers compute them, whatever the layers are made of."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nanovllm.cpu import optimize
from nanovllm.cpu.backend import CPUBackend
from nanovllm.cpu.build import load_kernels
from nanovllm.cpu.decoder import CPUDecoder
from nanovllm.cpu.layers import CRMSNorm
from nanovllm.cpu.linear import PackedLinear, TiledLinear
from nanovllm.engine.proof import answers, difference, few_layers
from nanovllm.layers.attention import SDPABackend
from nanovllm.models.llama import LlamaForCausalLM
from nanovllm.models.qwen2 import Qwen2ForCausalLM
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.models.qwen3_moe import Qwen3MoeForCausalLM
from nanovllm.utils.context import Context

SHAPE = dict(vocab_size=151, hidden_size=64, intermediate_size=96, num_hidden_layers=5,
             num_attention_heads=6, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5,
             max_position_embeddings=512, tie_word_embeddings=False,
             rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})
FAMILIES = {"qwen3": (Qwen3ForCausalLM, {}), "llama": (LlamaForCausalLM, {}),
            "biases": (LlamaForCausalLM, dict(attention_bias=True, mlp_bias=True)),
            "qwen2": (Qwen2ForCausalLM, dict(tie_word_embeddings=True))}
pytestmark = pytest.mark.usefixtures("level")


def make_model(family="qwen3", dtype=torch.float32, **shape):
    """A loaded model whose weights are large enough for a bug to show."""
    kind, extra = FAMILIES[family]
    torch.manual_seed(0)
    model = kind(SimpleNamespace(**{**SHAPE, **extra, **shape}))
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape)
        parameter.data = (1 + 0.3 * noise if "norm" in name else 0.15 * noise).to(dtype)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval().requires_grad_(False)


def make_steps(block_size=4):
    """Prefill of three sequences; a chunk beside two decode rows; three decode rows; one row."""
    plan = [[(0, 0, 30), (1, 0, 7), (2, 0, 300)], [(0, 30, 31), (1, 7, 8), (2, 300, 320)],
            [(0, 31, 32), (1, 8, 9), (2, 320, 321)], [(2, 321, 322)]]
    tables = [list(range(row, 3 * 81, 3)) for row in range(3)]
    steps = []
    for rows in plan:
        ids, positions, slots, starts = [], [], [], [0]
        for row, start, end in rows:
            ids += [(7 * p + 31 * row) % 151 for p in range(start, end)]
            positions += range(start, end)
            slots += [tables[row][p // block_size] * block_size + p % block_size
                      for p in range(start, end)]
            starts.append(len(ids))
        steps.append(Context.pack(ids, positions, slots, starts, [end for _, _, end in rows],
                                  [tables[row] for row, *_ in rows], list(range(len(ids)))))
    return steps


def off(fast, plain, dtype=torch.float32):
    """How far the results of two models are apart, each with its own backend."""
    if load_kernels(dtype, 16) is None:
        pytest.skip("no C compiler")
    steps, device = make_steps(), torch.device("cpu")
    return difference(answers(fast, CPUBackend(), 4, steps, device),
                      answers(plain, SDPABackend(), 4, steps, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family, threads", [("qwen3", 1), ("qwen3", 2), ("llama", 2),
                                             ("biases", 1), ("qwen2", 2)])
def test_same_as_the_taught_layers(family, threads, dtype, monkeypatch):
    """In bf16 no further from fp32 than they are, but for chance."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    fast, plain = optimize(make_model(family, dtype)), make_model(family, dtype)
    exact = copy.deepcopy(plain).float()
    allowed = 1e-5
    if dtype is torch.bfloat16:
        steps, device = make_steps(), torch.device("cpu")
        allowed = 1.5 * difference(answers(plain, SDPABackend(), 4, steps, device),
                                   answers(exact, SDPABackend(), 4, steps, device))
    assert off(fast, exact, dtype) < allowed
    has_tiles = load_kernels(dtype, 16).run_layers is not None
    assert (type(fast.model) is CPUDecoder) == has_tiles
    kinds = {type(module) for module in fast.modules()}
    assert nn.Linear not in kinds and (TiledLinear in kinds) == has_tiles
    assert PackedLinear in kinds  # the head's 151 rows are no tiles


def test_another_cache_is_found():
    """bind_kv_cache may be called again: for the proof, then for the engine's own pool."""
    fast, plain = optimize(make_model()), make_model()
    assert max(off(fast, plain) for _ in range(2)) < 1e-5


class HalfBackend(CPUBackend):
    """What somebody has made of the room's backend."""

    def forward(self, *args):
        return super().forward(*args) / 2


@pytest.mark.parametrize("backend", [SDPABackend, HalfBackend])
def test_another_backend_is_asked_layer_by_layer(backend):
    fast, plain = optimize(make_model()), make_model()
    if load_kernels(torch.float32, 16) is None:
        pytest.skip("no C compiler")
    steps, device = make_steps(), torch.device("cpu")
    assert difference(answers(fast, backend(), 4, steps, device),
                      answers(plain, backend(), 4, steps, device)) < 1e-5


def test_weights_that_others_share_are_left_alone():
    """A small copy with the model's weights is optimised, then the model itself."""
    model, plain = make_model(tie_word_embeddings=True), make_model(tie_word_embeddings=True)
    tensors, kinds = dict(model.state_dict()), [type(m) for m in model.modules()]
    small = few_layers(model)
    reference = few_layers(plain)
    assert small.model.embed_tokens.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert off(optimize(small), reference) < 1e-5
    assert [type(module) for module in model.modules()] == kinds
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == tensors[name].data_ptr()
        assert torch.equal(tensor, plain.state_dict()[name])
    assert off(optimize(model), plain) < 1e-5


def test_modules_of_another_dtype_are_left_alone():
    model = make_model(dtype=torch.bfloat16)
    model.model.norm.float()
    model.model.layers[1].mlp.down_proj.float()
    model = optimize(model)
    assert type(model.model.norm) is not CRMSNorm
    assert type(model.model.layers[1].mlp.down_proj) is nn.Linear


def no_norm(model):
    model.model.layers[2].self_attn.q_norm = nn.Identity()


def other_eps(model):
    model.model.layers[2].post_attention_layernorm.eps = 1e-3


def other_eps_in_all(model):
    for layer in model.model.layers:
        layer.post_attention_layernorm.eps = 1e-3


def other_scale(model):
    model.model.layers[2].self_attn.attn.scale *= 2


def own_rotary(model):
    attn = model.model.layers[2].self_attn
    attn.rotary_emb = copy.deepcopy(attn.rotary_emb)


def more_parameters(model):
    model.model.layers[2].gate = nn.Parameter(torch.ones(64))


def more_modules(model):
    model.model.layers[2].extra_norm = copy.deepcopy(model.model.norm)


def setting(model):
    model.model.layers[2].residual_scale = 0.5


def subclass_of_norm(model):
    class Other(type(model.model.norm)):
        """A norm that somebody has changed."""
    model.model.layers[2].input_layernorm.__class__ = Other


def subclass_of_layer(model):
    class Other(type(model.model.layers[0])):
        """A layer that somebody has changed."""
    model.model.layers[2].__class__ = Other


def norm_of_all_heads(model):
    for layer in model.model.layers:
        layer.self_attn.q_norm.weight = nn.Parameter(torch.ones(96), requires_grad=False)


def wider_mlp(model):
    for layer in model.model.layers:
        layer.mlp.down_proj = nn.Linear(64, 64, bias=False)


def other_activation(model):
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.GLU()


def decoder_with_more(model):
    model.model.embed_norm = copy.deepcopy(model.model.norm)


@pytest.mark.parametrize("change", [
    no_norm, other_eps, other_eps_in_all, other_scale, own_rotary, more_parameters, more_modules,
    setting, subclass_of_norm, subclass_of_layer, norm_of_all_heads, wider_mlp, other_activation,
    decoder_with_more], ids=lambda change: change.__name__)
def test_other_layers_are_not_one_call(change):
    """A layer that is not what run_layers knows is run as it is written."""
    model = make_model()
    change(model.requires_grad_(False))
    optimize(model.requires_grad_(False))
    assert type(model.model) is not CPUDecoder
    if change in (other_eps, other_eps_in_all, other_scale, own_rotary):
        plain = make_model()
        change(plain)
        assert off(model, plain) < 1e-5


def test_experts_are_not_one_call():
    config = dict(SHAPE, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=32,
                  norm_topk_prob=True, decoder_sparse_step=2, mlp_only_layers=[])
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(SimpleNamespace(**config)).eval().requires_grad_(False)
    plain = copy.deepcopy(model)
    assert off(optimize(model), plain) < 1e-4
    assert type(model.model) is not CPUDecoder


def test_without_kernels_oneDNN_multiplies(monkeypatch, caplog):
    """The third level: no compiler, packed weights."""
    caplog.set_level(logging.INFO, "nanovllm")
    monkeypatch.setenv("CC", "/no/such/compiler")
    load_kernels.cache_clear()
    try:
        model, plain = optimize(make_model()), make_model()
    finally:
        monkeypatch.undo()
        load_kernels.cache_clear()
    kinds = {type(module).__module__ for module in model.modules()}
    assert "nanovllm.cpu.linear" in kinds and "nanovllm.cpu.layers" not in kinds
    steps, device = make_steps(), torch.device("cpu")
    assert difference(answers(model, SDPABackend(), 4, steps, device),
                      answers(plain, SDPABackend(), 4, steps, device)) < 1e-5
