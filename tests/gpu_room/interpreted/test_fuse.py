"""Whole models with the room's layers against the plain ones, and what is not replaced."""

import copy

import pytest
import torch
from fixtures import make_checkpoint, random_prompts
from torch import nn

from nanovllm.config import Config
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.scheduler import ScheduledRow
from nanovllm.engine.sequence import Sequence
from nanovllm.gpu import optimize
from nanovllm.gpu.backends import TritonBackend
from nanovllm.gpu.fuse import FusedAttention, FusedDecoder, FusedHead, fuse
from nanovllm.models.qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3Model


def runner_of(folder, dtype="float32"):
    """A runner whose layers are as the days teach them."""
    return ModelRunner(Config(folder, device="cpu", dtype=dtype, num_kvcache_blocks=8,
                              kvcache_block_size=16, kernels="plain"))


def prefill_then_decode(runner, lengths):
    """The logits of a prefill of all tokens but the last, and of a step of the last."""
    rows = [ScheduledRow(Sequence(prompt), len(prompt) - 1, samples=True)
            for prompt in random_prompts(lengths, seed=2)]
    for i, row in enumerate(rows):
        row.seq.block_table = [2 * i, 2 * i + 1]
    yield runner.run(rows)
    for row in rows:
        row.seq.num_computed_tokens, row.num_new_tokens = len(row.seq) - 1, 1
    yield runner.run(rows)


@pytest.mark.parametrize("family, dtype, backend, lengths, one_row, eps", [
    ("qwen3", "float32", "triton", [20], True, 1e-4),
    ("qwen3", "float16", "triton", [20], True, 6e-2),
    ("qwen3", "float32", "triton", [20, 9], False, 1e-4),   # more rows than one
    ("qwen3", "float32", "sdpa", [20], True, 1e-4),         # a backend that wants k and v
    ("llama", "float32", "triton", [20], True, 1e-4),
    ("qwen2", "float32", "triton", [20], False, 1e-4),      # has biases
    ("qwen3_moe", "float32", "triton", [20], False, 1e-4)])
def test_logits_and_launches(family, dtype, backend, lengths, one_row, eps, launched, tmp_path):
    folder = make_checkpoint(family, folder=tmp_path, head_dim=24, num_hidden_layers=2)[0]
    plain, fused = runner_of(folder, dtype=dtype), runner_of(folder, dtype=dtype)
    if backend == "triton":
        for layer in fused.attention_layers():
            layer.backend = TritonBackend()
    assert optimize(fused.model) is fused.model
    steps = zip(prefill_then_decode(fused, lengths), prefill_then_decode(plain, lengths))
    for is_decode, (got, want) in enumerate(steps):
        assert (got - want).abs().max() < eps
        # four matrices in each of two layers; the head wherever one row samples
        of_layers = 2 * 4 if one_row and is_decode else 0
        assert launched["one_row_linear"] == of_layers + (len(lengths) == 1)
        assert launched["norm_rope_store"] == 2 and not launched["store_kvcache"]
        assert launched["add_rms_norm"] == (1 if of_layers else 2 * 2 + 1)
        launched.clear()


def changed(model, what):
    """A plain model, one thing of it as it may not be replaced."""
    decoder, layer = model.model, model.model.layers[1]
    attention = layer.self_attn
    if what == "another norm between layers":
        layer.pre_mlp_layernorm = copy.deepcopy(layer.input_layernorm)
    elif what == "a norm of another kind":
        decoder.norm = nn.RMSNorm(decoder.norm.weight.shape[0])
    elif what == "a layer's own parameter":
        layer.register_parameter("gate", nn.Parameter(torch.zeros(1)))
    elif what == "two kinds of eps":
        attention.k_norm.eps = 1e-2
    elif what == "a norm over all heads":
        attention.q_norm.weight = nn.Parameter(torch.ones(2 * attention.head_dim))
    elif what == "sinks":
        attention.sinks = nn.Parameter(torch.zeros(4))
    elif what == "another rotary embedding":
        attention.rotary_emb.__class__ = type("Partial", (type(attention.rotary_emb),), {})
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(folder=tmp_path_factory.mktemp("qwen3"))[0]


@pytest.mark.parametrize("what", ["another norm between layers", "a norm of another kind",
                                  "a layer's own parameter"])
def test_a_decoder_that_is_not_known_stays(what, folder):
    model = fuse(changed(runner_of(folder).model, what))
    assert type(model.model) is Qwen3Model
    assert type(model.model.layers[1].self_attn) is FusedAttention


@pytest.mark.parametrize("what", ["two kinds of eps", "a norm over all heads", "sinks",
                                  "another rotary embedding"])
def test_attention_that_is_not_known_stays(what, folder):
    model = fuse(changed(runner_of(folder).model, what))
    assert type(model.model) is FusedDecoder
    assert type(model.model.layers[1].self_attn) is Qwen3Attention
    assert not model.model.one_row


def test_a_slice_of_a_matrix_is_not_taken_for_the_whole(folder):
    model = runner_of(folder).model
    model.model.layers[1].mlp.down_proj.__class__ = type("Slice", (nn.Linear,), {})
    assert not fuse(model).model.one_row


def test_a_head_with_a_bias_stays(folder):
    model = runner_of(folder).model
    assert type(fuse(copy.deepcopy(model)).lm_head) is FusedHead
    model.lm_head = nn.Linear(model.lm_head.in_features, 48)
    assert type(fuse(model).lm_head) is nn.Linear


def test_a_copy_is_optimised_apart(folder):
    """Shared weights, and classes, stay as they are; a second time changes nothing."""
    model = runner_of(folder).model
    before = {name: x.clone() for name, x in model.state_dict().items()}
    shared = {id(x): x for x in [*model.parameters(), *model.buffers()]}
    small = optimize(copy.deepcopy(model, shared))
    assert type(small.model) is FusedDecoder and type(model.model) is Qwen3Model
    assert all(type(layer.self_attn) is Qwen3Attention for layer in model.model.layers)
    assert all(before[name].equal(x) for name, x in model.state_dict().items())
    assert type(model.model.layers[0]) is Qwen3DecoderLayer
    decoder = small.model
    assert optimize(small).model is decoder


def test_bfloat16_stays_plain_in_the_interpreter(folder):
    assert type(optimize(runner_of(folder, dtype="bfloat16").model).model) is Qwen3Model
