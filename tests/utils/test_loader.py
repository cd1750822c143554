"""Safetensors into a model: nothing missing, nothing left over, in pieces and cast on the way."""

import json

import pytest
import torch
from fixtures import hf_generate, make_checkpoint, random_prompts
from safetensors.torch import load_file, save_file
from torch import nn

from nanovllm import LLM, SamplingParams
from nanovllm.config import Config
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.utils import loader
from nanovllm.utils.loader import (
    allocate_parameters, checkpoint_files, default_weight_loader, init_dummy_weights,
)
from tests.engine.test_text import POINTER

SMALL = dict(num_kvcache_blocks=8, kvcache_block_size=4, max_model_len=40)
NORM = "model.layers.1.self_attn.q_norm.weight"


def set_tensors(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: t.clone() for name, t in tensors.items()}, file, metadata={"format": "pt"})


SPOIL = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "load_format='dummy'"),
    "pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "convert"),
    "truncated": (lambda f: (f / "model.safetensors").write_bytes(
        (f / "model.safetensors").read_bytes()[:-100]), "cut short.*fetch it again"),
    "missing": (lambda f: set_tensors(f, lambda t: t.pop(NORM)), f"lacks.*{NORM}"),
    "extra": (lambda f: set_tensors(f, lambda t: t.update(odd=t[NORM])), "unexpected.*odd"),
    "shape": (lambda f: set_tensors(f, lambda t: t.update({NORM: t[NORM][:-1]})),
              rf"{NORM}.*\[15\].*\[16\]"),
    "index": (lambda f: (f / "model.safetensors.index.json").write_text(
        '{"weight_map": {"x": "model-1.safetensors"}}'), "lacks model-1.safetensors"),
}


@pytest.mark.parametrize("kind", SPOIL)
def test_bad_weights(kind, checkpoint):
    spoil, complaint = SPOIL[kind]
    spoil(checkpoint)
    with pytest.raises(ValueError, match=f"(?s){complaint}"):
        LLM(checkpoint, **SMALL)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_a_sharded_checkpoint_is_cast_on_the_way(family, tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "PIECE_BYTES", 1000)  # a few rows: every matrix comes in pieces
    folder, model = make_checkpoint(family, folder=tmp_path, tie_word_embeddings=True)
    single = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    # plain: the fast layers pack weights in a way of their own
    runner = ModelRunner(Config(folder, dtype="bfloat16", num_kvcache_blocks=4, kernels="plain"))
    assert {p.dtype for p in runner.model.parameters()} == {torch.bfloat16}
    down = "model.layers.1.mlp.experts.3" if family == "qwen3_moe" else "model.layers.1.mlp"
    mine = runner.model.get_submodule(down).down_proj.weight
    assert torch.equal(mine, single[f"{down}.down_proj.weight"].bfloat16())
    assert runner.model.lm_head.weight is runner.model.model.embed_tokens.weight


def test_files_of_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="no model.safetensors"):
        checkpoint_files(tmp_path)
    for name in ("model.safetensors", "b.safetensors", "a.safetensors"):
        (tmp_path / name).touch()
    assert [file.name for file in checkpoint_files(tmp_path)] == ["model.safetensors"]
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}}')
    assert [f.name for f in checkpoint_files(tmp_path)] == ["a.safetensors", "b.safetensors"]


class Slices:
    """A tensor of a file, as safetensors gives it: read by slicing."""

    def __init__(self, tensor):
        self.tensor, self.read = tensor, []

    def get_shape(self):
        return list(self.tensor.shape)

    def __getitem__(self, rows):
        self.read.append(self.tensor[rows].shape[0])
        return self.tensor[rows]


def test_rows_of_a_packed_matrix(monkeypatch):
    monkeypatch.setattr(loader, "PIECE_BYTES", 2 * 3 * 4)          # two rows
    parameter, given = nn.Parameter(torch.zeros(8, 3)), Slices(torch.rand(5, 3))
    default_weight_loader(parameter, given, 2, 5)
    assert torch.equal(parameter[2:7], given.tensor) and max(given.read) == 2
    assert not parameter[:2].any() and not parameter[7:].any()
    with pytest.raises(ValueError, match=r"shape \[5, 3\], expected \[4, 3\]"):
        default_weight_loader(parameter, given, 2, 4)


def test_shared_parameters_stay_shared():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model = allocate_parameters(model, "cpu")
    assert model[0].weight is model[1].weight and not model[1].bias.is_meta


def test_dummy_weights_are_the_same_every_time():
    one, two = nn.Linear(8, 8), nn.Linear(8, 8)
    for model in (one, two):
        init_dummy_weights(model)
    assert torch.equal(one.weight, two.weight) and one.weight.std() > 0
    assert one.bias.mean() > .5                                    # 1-D: as norm weights are


def test_a_model_of_dummy_weights(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with LLM(checkpoint, load_format="dummy", **SMALL) as llm:
        assert len(llm.generate([[1, 2, 3]], use_tqdm=False)[0]["token_ids"]) > 0


# -----------------------------------------------------------------------------------------------
# Files that are not taken on trust
# -----------------------------------------------------------------------------------------------

INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("content", [
    "{", "[]", "{}", POINTER, '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": null}',
    '{"weight_map": {"x": 5}}', '{"weight_map": {"x": "../model.safetensors"}}',
    '{"weight_map": {"x": "/model.safetensors"}}', '{"weight_map": {"x": ""}}'])
def test_a_damaged_index(content, checkpoint):
    """Also beside a file that is whole: one of the two is not what was meant."""
    (checkpoint / INDEX).write_text(content)
    with pytest.raises(ValueError, match=f"(?s)model: .*{INDEX}"):
        LLM(checkpoint, **SMALL)


@pytest.mark.parametrize("content, complaint", [
    (POINTER, "model.safetensors is a pointer of git-lfs.*git lfs pull"),
    ("", "model.safetensors is damaged"), ("x" * 100, "model.safetensors is damaged")])
def test_weights_that_are_none(content, complaint, checkpoint):
    (checkpoint / "model.safetensors").write_text(content)
    with pytest.raises(ValueError, match=complaint):
        LLM(checkpoint, **SMALL)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.uint8, torch.int64,
                                   torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_what_is_stored_is_not_cast_without_a_word(dtype, checkpoint):
    set_tensors(checkpoint, lambda t: t.update({NORM: t[NORM].to(dtype)}))
    with pytest.raises(ValueError, match=f"safetensors: tensor {NORM} is stored as .*unquant"):
        LLM(checkpoint, **SMALL)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_floats_are_cast(dtype, checkpoint):
    set_tensors(checkpoint, lambda t: t.update({NORM: t[NORM].to(dtype)}))
    LLM(checkpoint, **SMALL).close()


def test_numbers_that_float16_cannot_hold(checkpoint):
    set_tensors(checkpoint, lambda t: t[NORM].__setitem__(0, 7e4))
    LLM(checkpoint, **SMALL).close()
    with pytest.raises(ValueError, match="^dtype: .*float16 cannot; choose bfloat16"):
        LLM(checkpoint, dtype="float16", **SMALL)


def test_a_tensor_in_two_files(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    save_file({NORM: tensors[NORM] + 1}, checkpoint / "more.safetensors")
    (checkpoint / INDEX).write_text(
        '{"weight_map": {"a": "model.safetensors", "b": "more.safetensors"}}')
    with pytest.raises(ValueError, match=f"in two files.*{NORM}"):
        LLM(checkpoint, **SMALL)


@pytest.mark.parametrize("field, value", [
    ("vocab_size", 150), ("hidden_size", 40), ("intermediate_size", 81),
    ("num_attention_heads", 2), ("num_key_value_heads", 1), ("head_dim", 12)])
def test_a_shape_that_does_not_fit_names_the_field(field, value, checkpoint):
    file = checkpoint / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    with pytest.raises(ValueError, match=f"tensor .* has shape .*config.json: .*{field}"):
        LLM(checkpoint, **SMALL)


# -----------------------------------------------------------------------------------------------
# A tied config over a head of its own
# -----------------------------------------------------------------------------------------------

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


def tied_over_another_head(folder, sharded=False):
    """A checkpoint whose config says tied and whose file holds another head; its model."""
    _, model = make_checkpoint("qwen2", folder=folder, tie_word_embeddings=False)
    if sharded:
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="20KB")
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tie_word_embeddings": True}))
    return model


@pytest.mark.parametrize("sharded", [False, True])
def test_the_head_that_is_stored_is_used(sharded, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(loader, "PIECE_BYTES", 1000)
    model, (prompt,) = tied_over_another_head(tmp_path, sharded), random_prompts([21])
    with LLM(tmp_path, num_kvcache_blocks=16) as llm:
        out, = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    assert out["token_ids"] == hf_generate(model, prompt, 8)
    assert "tie_word_embeddings" in caplog.text and "lm_head" in caplog.text


@pytest.mark.processes
def test_the_head_that_is_stored_is_used_on_two_ranks(tmp_path):
    model, (prompt,) = tied_over_another_head(tmp_path), random_prompts([21])
    with LLM(tmp_path, device="cpu", num_kvcache_blocks=16, tensor_parallel_size=2) as llm:
        out, = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    assert out["token_ids"] == hf_generate(model, prompt, 8)


def test_a_stored_copy_of_the_embedding_stays_tied(tmp_path, caplog):
    folder, _ = make_checkpoint("qwen3", folder=tmp_path, tie_word_embeddings=True)
    set_tensors(folder, lambda t: t.update({HEAD: t[TABLE].clone()}))
    runner = ModelRunner(Config(folder, num_kvcache_blocks=4, kernels="plain"))
    assert runner.model.lm_head.weight is runner.model.model.embed_tokens.weight
    assert "lm_head" not in caplog.text


# -----------------------------------------------------------------------------------------------
# Memory that is not there
# -----------------------------------------------------------------------------------------------

def test_weights_for_which_there_is_no_memory(monkeypatch):
    with torch.device("meta"):
        model = nn.Linear(2**30, 2**30)
    with pytest.raises(ValueError, match="^model: its weights do not fit into memory"):
        allocate_parameters(model, "cpu")
