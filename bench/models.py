"""Models to measure with: a checkpoint, or the shape of one with random weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_QWEN3 = dict(
    architectures=["Qwen3ForCausalLM"], model_type="qwen3", vocab_size=151936, head_dim=128,
    num_key_value_heads=8, hidden_act="silu", rms_norm_eps=1e-6, attention_bias=False,
    attention_dropout=0.0, rope_theta=1_000_000.0, rope_scaling=None, max_position_embeddings=40960,
    initializer_range=0.02, use_sliding_window=False, sliding_window=None, bos_token_id=151643,
    eos_token_id=151645, torch_dtype="bfloat16", use_cache=True)
_LLAMA_ROPE = dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=8192)
SHAPES = {  # name -> config.json, as the checkpoints of that name have it
    "qwen3-0.6b": dict(_QWEN3, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
                       num_attention_heads=16, tie_word_embeddings=True),
    "qwen3-4b": dict(_QWEN3, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
                     num_attention_heads=32, tie_word_embeddings=True),
    "qwen3-14b": dict(_QWEN3, hidden_size=5120, intermediate_size=17408, num_hidden_layers=40,
                      num_attention_heads=40, tie_word_embeddings=False),
    "llama-3.2-1b": dict(
        architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=128256, head_dim=64,
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, hidden_act="silu", rms_norm_eps=1e-5, attention_bias=False,
        attention_dropout=0.0, mlp_bias=False, pretraining_tp=1, rope_theta=500_000.0,
        rope_scaling=_LLAMA_ROPE, max_position_embeddings=131072, initializer_range=0.02,
        tie_word_embeddings=True, bos_token_id=128000, eos_token_id=128001,
        torch_dtype="bfloat16", use_cache=True),
}


@dataclass
class Model:
    """A model to measure with."""
    folder: str
    title: str
    is_dummy: bool = False      # random weights in the shape of its config.json
    dtype: str = "auto"
    threads: int | None = None  # on a CPU, unless --threads says otherwise; None: PyTorch's choice
    limits: dict | None = None  # what machine.probe says of it


GIVEN = "given.gguf"  # in a model's folder: what llama.cpp is to run


def make_model_folder(shape: str, folder: Path, layers: int | None = None) -> Path:
    """A folder with the config.json of `shape` and no weights; `layers` makes it less deep."""
    config = dict(SHAPES[shape])
    config["num_hidden_layers"] = layers or config["num_hidden_layers"]
    folder = folder / shape
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def demo_model(dtype: str = "auto") -> Model:
    """The checkpoint that comes with the package, so small that a second thread only costs."""
    return Model(str(ROOT / "nanovllm" / "demo_model"), "demo model", dtype=dtype, threads=1)


def gguf_model(file: str, model: str | None, folder: Path, dtype: str) -> Model:
    """A GGUF file, and the same model's folder if there is one: a folder in `folder` with links."""
    both = folder / "gguf"
    both.mkdir()
    for path in Path(model).iterdir() if model else ():
        (both / path.name).symlink_to(path.resolve())
    (both / GIVEN).symlink_to(Path(file).resolve())
    title = f"{Path(model).name} beside {Path(file).name}" if model else Path(file).name
    return Model(str(both), title, dtype=dtype)


def shape_model(shape: str, folder: Path, layers: int | None, dtype: str) -> Model:
    """Random weights in a known shape; its config.json is written into `folder`."""
    return Model(str(make_model_folder(shape, folder, layers)), f"{shape} (random weights)",
                 is_dummy=True, dtype=dtype)
