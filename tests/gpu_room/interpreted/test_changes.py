"""A change to a taught class takes effect, although the room has fused layers for it."""

import logging

import pytest
from fixtures import make_checkpoint, random_prompts

from nanovllm import LLM, SamplingParams
from nanovllm.gpu.fuse import FusedDecoder
from nanovllm.models.qwen3 import Qwen3DecoderLayer, Qwen3Model
from tests.changes import CHANGES, IDS

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


def tokens(folder, **settings):
    """(the tokens of two prompts, the class of the decoder)."""
    with LLM(folder, device="cpu", num_kvcache_blocks=8, **settings) as llm:
        outputs = llm.generate(random_prompts([12, 5]), GREEDY, use_tqdm=False)
        return [output["token_ids"] for output in outputs], type(llm.runner.model.model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(folder=tmp_path_factory.mktemp("taught"), num_hidden_layers=4)[0]


@pytest.mark.parametrize("cls, forward", CHANGES, ids=IDS)
def test_a_change_takes_effect(folder, monkeypatch, caplog, cls, forward):
    monkeypatch.setattr(cls, "forward", forward)
    plain, _ = tokens(folder, kernels="plain")
    with caplog.at_level(logging.WARNING, logger="nanovllm"):
        auto, decoder = tokens(folder, attention_backend="triton")
    assert auto == plain
    assert decoder is Qwen3Model and "nanovllm/gpu is not used" in caplog.text


def test_without_a_change_the_layers_are_fused(folder):
    assert tokens(folder, attention_backend="triton")[1] is FusedDecoder


def test_a_change_of_one_layer_in_the_middle(folder, monkeypatch):
    plain_init, plain_forward = Qwen3DecoderLayer.__init__, Qwen3DecoderLayer.forward

    def init(self, config, rotary_emb, index):
        plain_init(self, config, rotary_emb, index)
        self.index = index

    monkeypatch.setattr(Qwen3DecoderLayer, "__init__", init)
    monkeypatch.setattr(Qwen3DecoderLayer, "forward", lambda self, positions, x: x
                        if self.index == 2 else plain_forward(self, positions, x))
    auto, decoder = tokens(folder, attention_backend="triton")
    assert auto == tokens(folder, kernels="plain")[0] and decoder is Qwen3Model
