"""Safetensors into a model: nothing missing, nothing left over, in pieces and cast on the way."""

import pytest
import torch
from fixtures import make_checkpoint
from safetensors.torch import load_file, save_file
from torch import nn

from nanovllm import LLM
from nanovllm.config import Config
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.utils import loader
from nanovllm.utils.loader import (
    allocate_parameters, checkpoint_files, default_weight_loader, init_dummy_weights,
)

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
