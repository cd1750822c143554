#!/usr/bin/env python3
"""A Qwen3 checkpoint in Hugging Face layout -> one GGUF file, the format of llama.cpp.

    python tools/to_gguf.py FOLDER FILE.gguf [--dtype float32] [--random]

For bench.py, which measures llama.cpp with it: the weights, and no tokenizer, since token ids go in
and out there. It needs numpy alone, so that it runs in the environment of the engine. The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import argparse
import json
import math
import struct
from pathlib import Path

import numpy as np

ALIGNMENT = 32                                                    # of each tensor's first byte
GGML_TYPES = {"float32": 0, "float16": 1, "bfloat16": 30}         # as ggml numbers them
UINT32, FLOAT32, STRING = 4, 6, 8                                 # kinds of a metadata value
LAYER_NAMES = {  # Hugging Face's names within a layer -> GGUF's
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down"}


def tensor_shapes(config: dict) -> dict[str, tuple[str, tuple[int, ...]]]:
    """GGUF's name of every tensor -> (Hugging Face's name, shape)."""
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    q, kv = (config[name] * head_dim for name in ("num_attention_heads", "num_key_value_heads"))
    wide, vocab = config["intermediate_size"], config["vocab_size"]
    in_layer = {
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, q),
        "self_attn.q_norm": (head_dim,), "self_attn.k_norm": (head_dim,),
        "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide)}
    shapes = {"token_embd.weight": ("model.embed_tokens.weight", (vocab, hidden)),
              "output_norm.weight": ("model.norm.weight", (hidden,))}
    if not config.get("tie_word_embeddings"):
        shapes["output.weight"] = ("lm_head.weight", (vocab, hidden))
    for i in range(config["num_hidden_layers"]):
        for name, shape in in_layer.items():
            shapes[f"blk.{i}.{LAYER_NAMES[name]}.weight"] = (f"model.layers.{i}.{name}.weight",
                                                             shape)
    return shapes


def rope_base(config: dict) -> float:
    """The base of RoPE's frequencies; ValueError if they are scaled, which is not written here."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"to_gguf: RoPE of type {rope['rope_type']!r} is not supported")
    return float(rope.get("rope_theta") or config["rope_theta"])


def metadata(config: dict) -> dict[str, tuple[int, object]]:
    """What llama.cpp needs to know of the model beside its tensors: key -> (kind, value)."""
    numbers = {
        "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
        "block_count": "num_hidden_layers", "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim",
        "attention.value_length": "head_dim", "vocab_size": "vocab_size"}
    return {
        "general.architecture": (STRING, "qwen3"), "tokenizer.ggml.model": (STRING, "no_vocab"),
        **{f"qwen3.{key}": (UINT32, config[name]) for key, name in numbers.items()},
        "qwen3.rope.freq_base": (FLOAT32, rope_base(config)),
        "qwen3.attention.layer_norm_rms_epsilon": (FLOAT32, config["rms_norm_eps"])}


class Safetensors:
    """Tensors of a folder's *.safetensors files, by name, as numpy arrays in float32."""

    def __init__(self, folder: Path):
        self.places = {}
        for file in sorted(folder.glob("*.safetensors")):
            with open(file, "rb") as stream:
                size, = struct.unpack("<Q", stream.read(8))
                header = json.loads(stream.read(size))
            header.pop("__metadata__", None)
            self.places.update({name: (file, 8 + size, entry) for name, entry in header.items()})

    def __getitem__(self, name: str) -> np.ndarray:
        file, base, entry = self.places[name]
        kind = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[entry["dtype"]]
        begin, end = entry["data_offsets"]
        raw = np.fromfile(file, kind, (end - begin) // np.dtype(kind).itemsize, offset=base + begin)
        if entry["dtype"] == "BF16":  # the upper half of a float32
            raw = (raw.astype("<u4") << 16).view("<f4")
        return raw.astype("<f4").reshape(entry["shape"])


def encode(values: np.ndarray, dtype: str) -> bytes:
    """float32 values in another dtype's bytes; bfloat16 is rounded to the nearest, ties to even."""
    if dtype != "bfloat16":
        return values.astype("<f4" if dtype == "float32" else "<f2").tobytes()
    bits = np.ascontiguousarray(values, "<f4").view("<u4")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


def write_gguf(folder: Path, file: Path, dtype: str, is_random: bool = False) -> None:
    """Write the folder's model to `file`: matrices in `dtype`, norms in float32 as llama.cpp does.

    is_random: weights drawn anew (norms 1), for a folder with a config.json only. ValueError for
    another architecture than Qwen3.
    """
    config = json.loads((folder / "config.json").read_text())
    if config.get("architectures") != ["Qwen3ForCausalLM"]:
        raise ValueError(f"to_gguf: only Qwen3ForCausalLM, not {config.get('architectures')}")

    def text(string: str) -> bytes:
        return struct.pack("<Q", len(string)) + string.encode()

    def padding(size: int) -> bytes:
        return bytes(-size % ALIGNMENT)

    shapes, pairs = tensor_shapes(config), metadata(config)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(pairs))
    for key, (kind, value) in pairs.items():
        head += text(key) + struct.pack("<I", kind)
        head += text(value) if kind == STRING else struct.pack("<I" if kind == UINT32 else "<f",
                                                               value)
    offset, dtypes = 0, {}
    for name, (_, shape) in shapes.items():
        dtypes[name] = dtype if len(shape) > 1 else "float32"
        head += text(name) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *reversed(shape))       # the fastest comes first
        head += struct.pack("<IQ", GGML_TYPES[dtypes[name]], offset)
        size = math.prod(shape) * (4 if dtypes[name] == "float32" else 2)
        offset += size + len(padding(size))
    weights = None if is_random else Safetensors(folder)
    rng = np.random.default_rng(0)
    with open(file, "wb") as stream:
        stream.write(head + padding(len(head)))
        for name, (source, shape) in shapes.items():
            if not is_random:
                values = weights[source]
                if values.shape != shape:
                    raise ValueError(f"to_gguf: {source} is {values.shape}, expected {shape}")
            elif len(shape) == 1:
                values = np.ones(shape, "<f4")
            else:
                values = rng.standard_normal(shape, dtype="<f4") * np.float32(0.02)
            raw = encode(values, dtypes[name])
            stream.write(raw + padding(len(raw)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--dtype", choices=GGML_TYPES, default="float32")
    parser.add_argument("--random", action="store_true", help="random weights")
    args = parser.parse_args()
    write_gguf(args.folder, args.file, args.dtype, args.random)
