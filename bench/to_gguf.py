"""A Qwen3 checkpoint in Hugging Face layout -> one GGUF file, the format of llama.cpp.

The weights and no tokenizer: token ids go in and out where it is measured. Needs the package gguf.
"""

from __future__ import annotations

import json
from pathlib import Path

GGML_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def write_gguf(folder: str, file: str, dtype: str, is_random: bool = False) -> None:
    """Write the folder's model to `file`: matrices in `dtype`, norms in float32 as llama.cpp does.

    is_random: weights drawn anew (norms 1), for a folder with a config.json only. ValueError for
    another architecture than Qwen3, and for scaled RoPE.
    """
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
