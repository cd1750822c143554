"""Every family in every shape gives what transformers gives: tokens and log-probabilities."""

import json
import random
import zlib

import pytest
import torch
from fixtures import FAMILIES, hf_generate, make_checkpoint, random_prompts

from nanovllm import LLM, SamplingParams
from tests.parity import logprobs, worst_difference
from tests.ropes import LINEAR, LLAMA3, ORIGINAL, YARN

NEW = 16
CASES = {  # what a case is about; the rest of its shape is drawn at random
    "untied": dict(tie_word_embeddings=False),
    "one-kv-head": dict(num_attention_heads=4, num_key_value_heads=1, tie_word_embeddings=True),
    "bias": dict(attention_bias=True, mlp_bias=True, num_attention_heads=4,
                 num_key_value_heads=4),
    "yarn": dict(YARN),
    "llama3": dict(LLAMA3, head_dim=24),
    "linear": dict(LINEAR, rms_norm_eps=1e-2),
}
KNOWN = {"attention_bias": ("qwen3", "llama", "qwen3_moe"), "mlp_bias": ("llama",)}
MOE = {"untied": dict(norm_topk_prob=False), "yarn": dict(mlp_only_layers=[1]),
       "linear": dict(num_experts=9, num_experts_per_tok=3)}


def shape_of(family, case):
    """A random small shape for a case; the same in every run."""
    draw = random.Random(zlib.crc32(f"{family} {case}".encode()))
    kv = draw.choice([1, 2, 3])
    shape = dict(hidden_size=draw.choice([40, 48, 72]), num_hidden_layers=draw.choice([2, 3]),
                 intermediate_size=draw.choice([56, 80, 104]), num_key_value_heads=kv,
                 num_attention_heads=kv * draw.choice([1, 2, 4]),
                 head_dim=draw.choice([12, 16, 20]),
                 vocab_size=draw.choice([97, 151, 211]), tie_word_embeddings=draw.random() < 0.5)
    shape.update({k: v for k, v in CASES[case].items() if family in KNOWN.get(k, FAMILIES)})
    if family == "llama":  # transformers insists there
        shape["hidden_size"] = 24 * shape["num_attention_heads"]
    if family == "qwen3_moe":
        shape.update(MOE.get(case, {}))
    return dict(shape, seed=draw.randrange(1000))


WISH = SamplingParams(temperature=0, max_tokens=NEW, logprobs=3, prompt_logprobs=0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_family(family, case, tmp_path):
    folder, model = make_checkpoint(family, folder=tmp_path, **shape_of(family, case))
    prompts = random_prompts([7, 21, 2 * ORIGINAL + 3], model.config.vocab_size)
    with LLM(folder, kvcache_block_size=4, num_kvcache_blocks=48,
             max_num_batched_tokens=17) as llm:
        outs = llm.generate(prompts, WISH, use_tqdm=False)
    for prompt, out in zip(prompts, outs):
        assert out["token_ids"] == hf_generate(model, prompt, NEW)
        assert worst_difference(out, logprobs(model, prompt + out["token_ids"])) < 1e-4
    # one that repeats a token would show nothing
    assert len({token for out in outs for token in out["token_ids"]}) >= NEW // 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kernels", ["plain", "auto"])
def test_family_in_bfloat16(family, kernels, tmp_path):
    """Two right implementations differ; transformers' own two say by how much.

    Layers as taught stay within that. A CPU's kernels round elsewhere: half as much again.
    """
    from transformers import AutoModelForCausalLM
    folder, _ = make_checkpoint(family, folder=tmp_path, seed=3)
    prompts = random_prompts([40, 90, 150])
    with LLM(folder, dtype="bfloat16", num_kvcache_blocks=64, kernels=kernels) as llm:
        outs = llm.generate(prompts, WISH, use_tqdm=False)
    sdpa, eager = (AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation=attention).eval()
        for attention in ("sdpa", "eager"))
    ours, theirs = [], []
    for prompt, out in zip(prompts, outs):
        tokens = prompt + out["token_ids"]
        right, other = logprobs(sdpa, tokens), logprobs(eager, tokens)
        chosen = torch.arange(len(tokens) - 1), tokens[1:]
        mine = torch.tensor([entry[token] for entry, token in zip(
            out["prompt_logprobs"][1:] + out["logprobs"], tokens[1:])])
        ours.append((mine - right[chosen]).abs())
        theirs.append((other[chosen] - right[chosen]).abs())
    ours, theirs = torch.cat(ours), torch.cat(theirs)
    allowed = 1.0 if kernels == "plain" else 1.5
    assert ours.mean() <= allowed * theirs.mean() and ours.max() <= allowed * theirs.max()


@pytest.mark.parametrize("family, scaling", [
    ("llama", dict(LLAMA3["rope_parameters"])), ("qwen2", dict(YARN["rope_parameters"])),
    ("qwen3", None), ("llama", dict(LINEAR["rope_parameters"]))],
    ids=["llama3", "yarn", "none", "linear"])
def test_config_json_of_older_transformers(family, scaling, tmp_path):
    """rope_theta beside rope_scaling, whose kind is called `type`, and torch_dtype."""
    shape = dict(rope_parameters=scaling or {"rope_type": "default", "rope_theta": 3e4})
    folder, model = make_checkpoint(family, folder=tmp_path, seed=4, **shape)
    content = json.loads((folder / "config.json").read_text())
    new = content.pop("rope_parameters")
    old = {"rope_theta": new.pop("rope_theta"), "torch_dtype": content.pop("dtype"),
           "rope_scaling": {**new, "type": new.pop("rope_type")} if scaling else None}
    (folder / "config.json").write_text(json.dumps({**content, **old}))
    prompt, = random_prompts([2 * ORIGINAL + 3])
    with LLM(folder, num_kvcache_blocks=16) as llm:
        out, = llm.generate([prompt], WISH, use_tqdm=False)
    assert worst_difference(out, logprobs(model, prompt + out["token_ids"])) < 1e-4


def test_mistral_within_its_window(tmp_path):
    folder, model = make_checkpoint("mistral", folder=tmp_path, sliding_window=40)
    prompt, = random_prompts([24])
    with LLM(folder, max_model_len=40, num_kvcache_blocks=8) as llm:
        out, = llm.generate([prompt], SamplingParams(temperature=0), use_tqdm=False)
    assert out["finish_reason"] == "length" and len(out["token_ids"]) == 16
    assert out["token_ids"] == hf_generate(model, prompt, 16)
