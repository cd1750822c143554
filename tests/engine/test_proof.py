"""A change to a taught layer takes effect: the fast path that does not know of it is not used."""

import logging

import pytest
import torch
from fixtures import make_checkpoint, random_prompts

from nanovllm import LLM, SamplingParams
from nanovllm.engine import proof
from nanovllm.layers import attention
from nanovllm.layers.attention import SDPABackend
from nanovllm.models.qwen3 import Qwen3DecoderLayer
from nanovllm.utils.rooms import find_room
from tests.changes import CHANGES, IDS

GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)


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


@pytest.mark.parametrize("cls, forward", CHANGES, ids=IDS)
def test_a_change_takes_effect(checkpoint, monkeypatch, cls, forward):
    """With a change in a taught class kernels="auto" gives what "plain" gives."""
    prompts = random_prompts([20, 5])
    before, _ = tokens(checkpoint, prompts)
    monkeypatch.setattr(cls, "forward", forward)
    plain, _ = tokens(checkpoint, prompts, kernels="plain")
    auto, _ = tokens(checkpoint, prompts)
    assert auto == plain != before


@pytest.mark.parametrize("cls, forward", CHANGES, ids=IDS)
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


def test_a_layer_that_knows_its_number_is_a_kind_for_itself(tmp_path, monkeypatch):
    """Else a change of one layer in the middle would not be seen."""
    folder, _ = make_checkpoint(folder=tmp_path, hidden_size=64, intermediate_size=96, head_dim=16,
                                num_attention_heads=4, num_hidden_layers=6)
    [prompt] = random_prompts([20])
    plain_init, plain_forward = Qwen3DecoderLayer.__init__, Qwen3DecoderLayer.forward

    def init(self, config, rotary_emb, index):
        plain_init(self, config, rotary_emb, index)
        self.index = index

    def forward(self, positions, x):
        return x if self.index == 3 else plain_forward(self, positions, x)

    before, runner = tokens(folder, [prompt], kernels="plain")
    assert len(proof.few_layers(runner.model).model.layers) == 3
    monkeypatch.setattr(Qwen3DecoderLayer, "__init__", init)
    monkeypatch.setattr(Qwen3DecoderLayer, "forward", forward)
    plain, runner = tokens(folder, [prompt], kernels="plain")
    assert len(proof.few_layers(runner.model).model.layers) == 6
    assert tokens(folder, [prompt])[0] == plain != before
