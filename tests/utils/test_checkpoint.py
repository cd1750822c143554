"""What a checkpoint's files say: the right value, or an error that names file and field."""

import json

import pytest
import torch
from fixtures import FAMILIES, hf_generate, make_checkpoint, random_prompts

from nanovllm import LLM, SamplingParams
from nanovllm.config import Config, read_hf_config
from nanovllm.models.registry import get_model_class
from nanovllm.utils.checkpoint import is_lfs_pointer, read_json, stored_dtype
from tests.engine.test_text import POINTER

SMALL = dict(device="cpu", num_kvcache_blocks=16, kvcache_block_size=4, max_model_len=40)
ABSENT = ...                     # in a test's name it reads the same in every process


def change(folder, **fields):
    """Set fields of config.json, or take them away."""
    file = folder / "config.json"
    content = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not ABSENT}))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """family -> a checkpoint, its model and the text of its config.json."""
    made = {}
    for family in FAMILIES:
        folder, model = make_checkpoint(family, folder=tmp_path_factory.mktemp(family))
        made[family] = folder, model, (folder / "config.json").read_text()
    return made


@pytest.fixture
def fresh(folders):
    """The same, for a test that changes config.json."""
    yield lambda family="qwen3": folders[family][:2]
    for folder, _, text in folders.values():
        (folder / "config.json").write_text(text)


def test_json_files(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"a": 1}')
    assert read_json(file) == {"a": 1} and not is_lfs_pointer(file)
    for content, complaint in [(POINTER, "pointer of git-lfs"), ("{", "damaged"), ("", "damaged"),
                               ("[]", "no JSON object"), ("[" * 10**5, "damaged"), ("5", "object")]:
        file.write_text(content)
        with pytest.raises(ValueError, match=f"(?s)a.json.*{complaint}"):
            read_json(file)
    file.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match="a.json is damaged"):
        read_json(file)


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "intermediate_size",
                                  "num_hidden_layers", "num_attention_heads"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_that_no_model_can_do_without(family, name, fresh):
    """The default of transformers is that of another model; heads even fit, with wrong tokens."""
    folder, _ = fresh(family)
    with pytest.raises(ValueError, match=f"config.json lacks {name}"):
        read_hf_config(change(folder, **{name: ABSENT}))


@pytest.mark.parametrize("name, value", [
    *[(name, value) for name in ("vocab_size", "hidden_size", "num_hidden_layers", "head_dim",
                                 "num_key_value_heads", "max_position_embeddings",
                                 "intermediate_size", "num_attention_heads")
      for value in (0, -1, "8", 1.5, True, [8], 10**9, 10**30)],
    ("num_key_value_heads", 3), ("num_key_value_heads", 8), ("head_dim", 15),
    ("rms_norm_eps", None), ("rms_norm_eps", "x"), ("rms_norm_eps", -1.0), ("rms_norm_eps", 1.5),
    ("rms_norm_eps", float("nan")), ("rope_parameters", 5), ("rope_scaling", "linear"),
    ("model_type", None), ("model_type", []), ("architectures", 5), ("architectures", [5]),
    ("dtype", 0), ("dtype", "x"), ("dtype", []), ("quantization_config", "fp8"),
    ("layer_types", 5), ("layer_types", ["chunked_attention"] * 3),
    ("layer_types", ["sliding_attention"] * 3), ("tie_word_embeddings", "yes"),
    ("attention_bias", 1), ("hidden_act", None), ("auto_map", None),
    ("eos_token_id", "2")], ids=str)
def test_what_cannot_be_is_refused_by_name(name, value, fresh):
    with pytest.raises(ValueError, match=f"(?s)config.json.*{name}"):
        read_hf_config(change(fresh()[0], **{name: value}))


@pytest.mark.parametrize("name, value", [
    ("num_experts_per_tok", 7), ("num_experts_per_tok", 0), ("decoder_sparse_step", 0),
    ("num_experts", 10**5), ("moe_intermediate_size", 0), ("mlp_only_layers", "x"),
    ("norm_topk_prob", 1)])
def test_experts_that_cannot_be(name, value, fresh):
    with pytest.raises(ValueError, match=f"(?s)config.json.*{name}"):
        read_hf_config(change(fresh("qwen3_moe")[0], **{name: value}))


LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=32)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=128)


@pytest.mark.parametrize("rope, name", [
    *[({**LLAMA3, name: value}, name) for name in LLAMA3 if name != "rope_type"
      for value in (None, 0, -1.0, "2", [1], float("nan"), True)],
    *[({k: v for k, v in LLAMA3.items() if k != name}, name) for name in
      ("factor", "low_freq_factor", "high_freq_factor")],
    ({**LLAMA3, "low_freq_factor": 4.0}, "low_freq_factor"), ({**YARN, "factor": None}, "factor"),
    ({**YARN, "rope_theta": 1.0}, "rope_theta"), ({**YARN, "beta_fast": -1}, "beta_fast"),
    ({**YARN, "attention_factor": "x"}, "attention_factor"), ({**YARN, "mscale": []}, "mscale"),
    ({"rope_type": "linear", "rope_theta": 1e4}, "factor"),
    ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 0}, "factor"),
    ({"rope_type": "default", "rope_theta": 0}, "rope_theta"),
    ({"full_attention": {"rope_type": "default", "rope_theta": 1e4}}, "rope_theta")], ids=str)
def test_rope_that_cannot_be(rope, name, fresh):
    with pytest.raises(ValueError, match=f"(?s)config.json.*{name}"):
        read_hf_config(change(fresh()[0], rope_parameters=rope))


def test_a_table_that_fits_into_no_memory_is_not_begun(fresh):
    folder, _ = fresh()
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 1e9}
    with pytest.raises(ValueError, match="config.json: max_position_embeddings.*factor"):
        LLM(change(folder, rope_parameters=rope), **SMALL)


@pytest.mark.parametrize("field, size", [("hidden_size", 2**18), ("intermediate_size", 2**20)])
def test_weights_larger_than_the_machine(field, size, fresh, monkeypatch):
    monkeypatch.setattr("nanovllm.engine.kv_cache.free_memory", lambda device: 10**9)
    with pytest.raises(ValueError, match="its weights take.*this machine has 1,000,000,000"):
        LLM(change(fresh()[0], **{field: size}), load_format="dummy", **SMALL)


def tokens(folder, prompt, **settings):
    with LLM(folder, **{**SMALL, **settings}) as llm:
        return llm.generate([prompt], SamplingParams(temperature=0, max_tokens=8),
                            use_tqdm=False)[0]["token_ids"]


@pytest.mark.parametrize("family, fields", [
    ("qwen2", dict(attention_bias=True)), ("qwen2", dict(mlp_bias=True)),
    ("mistral", dict(attention_bias=True)), ("mistral", dict(mlp_bias=True)),
    ("qwen3", dict(mlp_bias=True)), ("qwen3_moe", dict(mlp_bias=True)),
    ("llama", dict(sliding_window=16)), ("llama", dict(layer_types=["sliding_attention"] * 3)),
    ("qwen3_moe", dict(layer_types=["sliding_attention"] * 3)),
    ("qwen3", dict(partial_rotary_factor=.5)), ("llama", dict(hidden_act="swish")),
    ("qwen3", dict(architectures=ABSENT)), ("llama", dict(architectures=None)),
    ("qwen3_moe", dict(architectures=[])), ("qwen2", dict(architectures="Qwen2ForCausalLM")),
    ("llama", dict(dtype=ABSENT)),
    ("qwen3", dict(dtype=None)), ("qwen3", dict(quantization_config=None)),
    ("qwen3", dict(eos_token_id=[]))], ids=str)
def test_the_same_tokens_whatever_a_field_says_that_is_not_read(family, fields, fresh):
    folder, model = fresh(family)
    prompt, = random_prompts([21])
    assert tokens(change(folder, **fields), prompt) == hf_generate(model, prompt, 8)


def test_a_sliding_window_that_a_family_ignores_is_no_limit(fresh):
    assert Config(change(fresh("llama")[0], sliding_window=16)).max_model_len == 512


def test_mistral_with_kinds_of_layers_is_another_family(fresh):
    with pytest.raises(ValueError, match="config.json: model_type 'mistral'.*'ministral'"):
        read_hf_config(change(fresh("mistral")[0], layer_types=["full_attention"] * 3))


def test_a_config_that_contradicts_itself(fresh):
    config = read_hf_config(change(fresh("qwen3")[0], architectures=["LlamaForCausalLM"]))
    with pytest.raises(ValueError, match="config.json contradicts.*LlamaForCausalLM.*'qwen3'"):
        get_model_class(config)


@pytest.mark.parametrize("kind", ["qwen2_vl", "mamba", "bert", "gpt2", "llama4"])
@pytest.mark.parametrize("size", [1, 2])
def test_other_families_are_refused_as_such(kind, size, tmp_path):
    from transformers import AutoConfig
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"architecture '{kind}' is not supported"):
        LLM(tmp_path, load_format="dummy", tensor_parallel_size=size, **SMALL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_of_the_weights_where_config_json_names_none(dtype, tmp_path):
    folder, model = make_checkpoint(folder=tmp_path)
    model.to(dtype).save_pretrained(folder)
    change(folder, dtype=ABSENT, torch_dtype=ABSENT)
    assert stored_dtype(folder) == str(dtype).removeprefix("torch.")
    with LLM(folder, **SMALL) as llm:
        assert llm.runner.dtype is dtype


def test_no_dtype_and_no_weights(fresh, tmp_path):
    assert stored_dtype(tmp_path) == "float32"
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    assert stored_dtype(tmp_path) == "float32"


@pytest.mark.parametrize("dtype", ["float64", "int8", "float8_e4m3fn"])
def test_a_dtype_that_is_not_computed_in(dtype, fresh):
    with pytest.raises(ValueError, match=f"dtype '{dtype}' of config.json is not supported"):
        LLM(change(fresh()[0], dtype=dtype), **SMALL)
