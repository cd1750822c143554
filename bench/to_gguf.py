"""A Qwen3 checkpoint in Hugging Face layout -> one GGUF file, the format of llama.cpp.

The weights and no tokenizer: token ids go in and out where it is measured. Needs the package gguf.
A file of the user's own (bench.py --gguf) is taken as it is, whatever its architecture and bits.
"""

from __future__ import annotations

import json
from pathlib import Path

from bench.models import GIVEN

GGML_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def gguf_limits(file: str) -> dict:
    """What `probe` tells of a model, from a GGUF file: its sizes, and the type of most weights."""
    import gguf
    reader = gguf.GGUFReader(file)

    def value(name, default=None):
        found = reader.get_field(name.format(arch=arch))
        return default if found is None else found.contents()

    arch = ""
    arch = value("general.architecture")
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in reader.tensors}
    of_type = {}
    for tensor in reader.tensors:
        kind = tensor.tensor_type.name.lower()
        of_type[kind] = of_type.get(kind, 0) + sizes[tensor.name]
    layers, heads = value("{arch}.block_count"), value("{arch}.attention.head_count")
    kv_heads = value("{arch}.attention.head_count_kv", heads)
    kv_heads = sum(kv_heads) if isinstance(kv_heads, list) else layers * kv_heads
    width = value("{arch}.embedding_length") // (max(heads) if isinstance(heads, list) else heads)
    key = value("{arch}.attention.key_length", width)
    both = key + value("{arch}.attention.value_length", key)
    table = next(t for t in reader.tensors if t.name == "token_embd.weight")
    read = sum(sizes.values()) - sizes[table.name] * ("output.weight" in sizes)
    return {"dtype": max(of_type, key=of_type.get), "vocab": int(table.shape[-1]),
            "max_model_len": value("{arch}.context_length"),
            "weight_bytes": None if value("{arch}.expert_count") else read,
            # llama.cpp's own choice is a cache in fp16
            "kv_bytes_per_token": 2 * kv_heads * both}


def write_gguf(folder: str, file: str, dtype: str, is_random: bool = False) -> None:
    """Write the folder's model to `file`: matrices in `dtype`, norms in float32 as llama.cpp does.

    is_random: weights drawn anew (norms 1), for a folder with a config.json only. ValueError for
    another architecture than Qwen3, and for scaled RoPE. A GGUF file that the folder holds is
    linked instead.
    """
    if (given := Path(folder) / GIVEN).exists():
        Path(file).symlink_to(given.resolve())
        return
    names = json.loads((Path(folder) / "config.json").read_text()).get("architectures")
    if names != ["Qwen3ForCausalLM"]:
        raise ValueError(f"to_gguf: only Qwen3ForCausalLM, not {names}")
    import gguf
    import torch

    from bench.engines.transformers import load_model
    model = load_model(str(folder), "cpu", "auto", is_random)
    config, rope = model.config, model.config.rope_parameters
    if rope["rope_type"] != "default":
        raise ValueError(f"to_gguf: RoPE of type {rope['rope_type']!r} is not supported")
    writer = gguf.GGUFWriter(file, "qwen3")
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    name_of = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.num_hidden_layers).get_name
    for name, tensor in model.named_parameters():  # tied weights are named once
        kept = dtype if tensor.dim() > 1 else "float32"
        raw = tensor.detach().to(getattr(torch, kept)).contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name_of(name, try_suffixes=(".weight",)), raw,
                          raw_dtype=gguf.GGMLQuantizationType[GGML_NAMES[kept]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
