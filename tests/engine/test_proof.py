"""A change to a taught layer takes effect: the fast path that does not know of it is not used."""

import logging

import pytest
import torch
from fixtures import make_checkpoint, random_prompts

from nanovllm import LLM, SamplingParams
from nanovllm.engine import proof
from nanovllm.layers import attention
from nanovllm.layers.activation import SiluAndMul
from nanovllm.layers.attention import SDPABackend
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.models.qwen3 import Qwen3DecoderLayer, Qwen3MLP, Qwen3Model
from nanovllm.utils.rooms import find_room

GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)


def half_residual(self, positions, x):
    x = x + 0.5 * self.self_attn(positions, self.input_layernorm(x))
    return x + self.mlp(self.post_attention_layernorm(x))


def norm_without_mean(self, x):
    return self.weight * (x / (1 + x.abs().amax(-1, keepdim=True)))


def other_gate(self, x):
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.gelu(gate) * up


def turned_back(self, positions, q, k):
    cos, sin = self.cos_sin[positions].to(q.dtype).unbind(1)
    return (attention_rotate(q, cos, -sin), attention_rotate(k, cos, -sin * 0.5))


def attention_rotate(x, cos, sin):
    x1, x2 = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def scaled_embedding(self, input_ids, positions):
    x = self.embed_tokens(input_ids) * 3
    for layer in self.layers:
        x = layer(positions, x)
    return self.norm(x)


def every_other_layer(self, input_ids, positions):
    x = self.embed_tokens(input_ids)
    for layer in self.layers[::2]:
        x = layer(positions, x)
    return self.norm(x)


def half_mlp(self, x):
    return 0.5 * self.down_proj(self.act_fn(self.gate_up_proj(x)))


CHANGES = [(Qwen3DecoderLayer, half_residual), (RMSNorm, norm_without_mean),
           (SiluAndMul, other_gate), (RotaryEmbedding, turned_back), (Qwen3MLP, half_mlp),
           (Qwen3Model, scaled_embedding), (Qwen3Model, every_other_layer)]


def tokens(folder, prompts, **settings):
    with LLM(folder, device="cpu", num_kvcache_blocks=32, **settings) as llm:
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        return [output["token_ids"] for output in outputs], llm.runner


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder, _ = make_checkpoint(folder=tmp_path_factory.mktemp("taught"), hidden_size=64,
                                intermediate_size=96, head_dim=16, num_attention_heads=4)
    return folder


def prompt_logprobs(folder, prompt, **settings):
    """The log-probabilities of a prompt's tokens, as a tensor."""
    asks = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    with LLM(folder, device="cpu", num_kvcache_blocks=32, **settings) as llm:
        entries = llm.generate([prompt], asks, use_tqdm=False)[0]["prompt_logprobs"]
    return torch.tensor([next(iter(entry.values())) for entry in entries[1:]])


@pytest.mark.parametrize("cls, forward", CHANGES, ids=[f.__name__ for _, f in CHANGES])
def test_a_change_takes_effect(checkpoint, monkeypatch, cls, forward):
    """With a change in a taught class kernels="auto" gives what "plain" gives."""
    prompts = random_prompts([20, 5])
    before, _ = tokens(checkpoint, prompts)
    monkeypatch.setattr(cls, "forward", forward)
    plain, _ = tokens(checkpoint, prompts, kernels="plain")
    auto, _ = tokens(checkpoint, prompts)
    assert auto == plain != before


@pytest.mark.parametrize("cls, forward", CHANGES, ids=[f.__name__ for _, f in CHANGES])
def test_a_change_takes_effect_in_bfloat16(checkpoint, monkeypatch, cls, forward):
    """Where rounding differs: nearer to the changed layers than to the old ones by far."""
    [prompt] = random_prompts([30])
    before = prompt_logprobs(checkpoint, prompt, dtype="bfloat16")
    monkeypatch.setattr(cls, "forward", forward)
    plain = prompt_logprobs(checkpoint, prompt, dtype="bfloat16", kernels="plain")
    auto = prompt_logprobs(checkpoint, prompt, dtype="bfloat16")
    assert (auto - plain).abs().mean() < 0.2 * (auto - before).abs().mean()


def test_a_change_of_plain_attention_takes_effect(checkpoint, monkeypatch, caplog):
    """Whoever changes the plain backend is not answered by another backend."""
    prompts = random_prompts([20, 5])
    real = SDPABackend.decode
    monkeypatch.setattr(SDPABackend, "decode", lambda self, *args: -real(self, *args))
    plain, _ = tokens(checkpoint, prompts, kernels="plain")
    with caplog.at_level(logging.WARNING, logger="nanovllm"):
        auto, runner = tokens(checkpoint, prompts)
    assert auto == plain
    assert type(runner.backend) is SDPABackend


def test_a_change_of_the_store_takes_effect(checkpoint, monkeypatch):
    prompts = random_prompts([20, 5])
    real = attention.store_kvcache
    monkeypatch.setattr(attention, "store_kvcache",
                        lambda k, v, *rest: real(k, v * 2, *rest))
    plain, _ = tokens(checkpoint, prompts, kernels="plain")
    assert tokens(checkpoint, prompts)[0] == plain


def test_unchanged_layers_are_replaced(checkpoint, caplog):
    """The check does not say no to what is right."""
    if find_room("cpu") is None:
        pytest.skip("nanovllm/cpu is not there")
    for dtype in ("float32", "bfloat16"):
        with caplog.at_level(logging.WARNING, logger="nanovllm"):
            _, runner = tokens(checkpoint, random_prompts([5]), dtype=dtype)
        assert not caplog.text
        kinds = {type(module) for module in runner.model.modules()}
        assert torch.nn.Linear not in kinds


def test_a_room_that_fails_is_left_out(checkpoint, monkeypatch, caplog):
    """An error in a fast path is a line in the log, and no error of the engine."""
    room = find_room("cpu")
    if room is None:
        pytest.skip("nanovllm/cpu is not there")
    prompts = random_prompts([20])
    plain, _ = tokens(checkpoint, prompts, kernels="plain")

    def broken(model, group=None):
        raise OSError("no such kernel")

    monkeypatch.setattr(room, "optimize", broken)
    with caplog.at_level(logging.WARNING, logger="nanovllm"):
        assert tokens(checkpoint, prompts)[0] == plain
    assert "no such kernel" in caplog.text


def test_few_layers_share_the_weights(checkpoint):
    """The copy costs no memory for weights, and its modules can be replaced without harm."""
    with LLM(checkpoint, device="cpu", num_kvcache_blocks=8, kernels="plain") as llm:
        model = llm.runner.model
        small = proof.few_layers(model)
        assert len(small.model.layers) <= 3
        first = small.model.layers[0]
        assert first is not model.model.layers[0]
        assert first.mlp.down_proj.weight is model.model.layers[0].mlp.down_proj.weight
        first.mlp = None
        assert model.model.layers[0].mlp is not None
