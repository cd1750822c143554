"""What cannot work is refused: the error names the argument and a remedy."""

import json
import os

import pytest
import torch
from fixtures import make_checkpoint, make_hf_model

from nanovllm import LLM
from nanovllm.config import DEMO_MODEL, Config, max_positions, resolve_model
from tests.ropes import DYNAMIC, LINEAR, LLAMA3, ORIGINAL, YARN

SMALL = dict(num_kvcache_blocks=8, kvcache_block_size=4, max_model_len=40)


def set_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def make_adapter(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


SPOIL = {  # tests/utils/test_loader.py has those about weights
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "architecture": (lambda f: set_config(f, architectures=["NopeForCausalLM"]),
                     "NopeForCausalLM.*Qwen3ForCausalLM"),
    "quantised": (lambda f: set_config(f, quantization_config={"quant_method": "fp8"}),
                  "quantised .fp8.*use the original"),
    "old gptq": (lambda f: (f / "quantize_config.json").write_text("{}"),
                 "quantised checkpoint.*give the original"),
    "adapter": (lambda f: make_adapter(f), "an adapter.*merge it"),
    "gguf": (lambda f: (f / "model.safetensors").rename(f / "model.gguf"),
             "GGUF.*give the original"),
    "sliding": (lambda f: set_config(f, use_sliding_window=True, sliding_window=16,
                                     max_window_layers=0, layer_types=None),
                "max_model_len=40.*sliding_window=16.*choose 16"),
    "activation": (lambda f: set_config(f, hidden_act="gelu"), "hidden_act 'gelu'.*only 'silu'"),
    "rope": (lambda f: set_config(f, rope_parameters={
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "long_factor": [1.0] * 8,
        "short_factor": [1.0] * 8}), "rope_type 'longrope'.*default"),
}


@pytest.mark.parametrize("kind", SPOIL)
def test_bad_checkpoint(kind, checkpoint):
    spoil, complaint = SPOIL[kind]
    spoil(checkpoint)
    with pytest.raises(ValueError, match=f"(?s){complaint}"):
        LLM(checkpoint, **SMALL)


def test_a_file_is_no_checkpoint(checkpoint):
    with pytest.raises(ValueError, match="is a file.*Give the folder"):
        LLM(checkpoint / "model.safetensors")


def test_missing_folder(tmp_path):
    with pytest.raises(ValueError, match="there is no folder.*Hub id"):
        LLM(tmp_path / "nope")


def test_which_folder():
    assert resolve_model(None) == DEMO_MODEL == resolve_model(str(DEMO_MODEL))
    with pytest.raises(TypeError, match="model must be"):
        resolve_model(5)


@pytest.mark.parametrize("name, value", [
    ("num_kvcache_blocks", 10**15), ("num_kvcache_blocks", 10**30), ("num_kvcache_blocks", 0),
    ("num_kvcache_blocks", 1.5), ("kvcache_block_size", 0), ("kvcache_block_size", "4"),
    ("dtype", "fp32"), ("dtype", "int8"), ("dtype", None), ("device", "gpu"), ("device", "meta"),
    ("device", None), ("attention_backend", "nope"), ("load_format", "gguf"),
    ("tensor_parallel_size", 3), ("max_model_len", 0), ("max_num_batched_tokens", 0),
    ("max_num_seqs", "a"), ("revision", 1), ("revision", "main"),
    ("gpu_memory_utilization", 1.5), ("gpu_memory_utilization", "a"),
    ("kernels", "fast"), ("kernels", None), ("look_ahead", "yes"), ("look_ahead", 1),
    ("enforce_eager", 1), ("enable_prefix_caching", None)])
def test_bad_setting(name, value, good):
    with pytest.raises(ValueError, match=name):
        LLM(good[0], **{**SMALL, name: value})


def test_positions_reach_as_far_as_the_scaling():
    for shape, reach in [(LLAMA3, 512), (YARN, 512), (LINEAR, 2048), (DYNAMIC, 4 * ORIGINAL),
                         (dict(YARN, max_position_embeddings=ORIGINAL), 4 * ORIGINAL)]:
        config = make_hf_model("llama", num_hidden_layers=1, **shape).config
        assert max_positions(config) == reach


def test_no_further_than_a_sliding_window(tmp_path):
    folder, _ = make_checkpoint("mistral", folder=tmp_path, sliding_window=40)
    with pytest.raises(ValueError, match="max_model_len=41.*sliding_window=40.*choose 40"):
        Config(folder, max_model_len=41)
    assert Config(folder, max_model_len=40).max_model_len == 40


def test_a_wish_that_is_lowered_is_named(good, caplog):
    with LLM(good[0], **{**SMALL, "max_model_len": 100_000}) as llm:
        assert llm.config.max_model_len == 512
        with pytest.raises(ValueError, match="max_model_len=512: shorten it; the model has no"):
            llm.generate([[1] * 512], use_tqdm=False)
    assert "max_model_len=100,000 is lowered to 512" in caplog.text


def test_the_default_is_no_wish(good, caplog):
    assert Config(good[0]).max_model_len == 512 and not caplog.text
    with LLM(good[0], **SMALL) as llm:
        with pytest.raises(ValueError, match="max_model_len=40: shorten it or raise max_model_len"):
            llm.generate([[1] * 40], use_tqdm=False)


# load of the machine (None: there is no such figure), this process' threads, whether that is told
@pytest.mark.parametrize("load, threads, is_told", [
    (10.0, 4, True), (8.0, 4, False), (0.0, 8, False), (10.0, 1, False), (None, 4, False)])
def test_a_busy_machine_is_told_of_once_and_nothing_is_changed(good, monkeypatch, caplog, load,
                                                              threads, is_told):
    def getloadavg():
        if load is None:
            raise OSError("unobtainable")
        return load, 0.0, 0.0

    monkeypatch.setattr(os, "getloadavg", getloadavg, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: pytest.fail("the user's own"))
    with LLM(good[0], device="cpu", kernels="plain", **SMALL) as llm:
        llm.generate([[1, 2]], use_tqdm=False)
    assert caplog.text.count("set_num_threads(1)") == is_told
    assert not is_told or "is 10 on 8 cores" in caplog.text
