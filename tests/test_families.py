"""Every family in every shape gives what transformers gives: tokens, log-probabilities, angles."""

import importlib
import json
import random
import sys
import zlib
from pathlib import Path

import pytest
import torch
from fixtures import FAMILIES, hf_generate, make_checkpoint, make_hf_model, random_prompts
from safetensors.torch import load_file

from nanovllm import LLM, SamplingParams
from nanovllm.config import Config, max_positions
from nanovllm.engine.model_runner import MODEL_OPTIMIZERS, ModelRunner
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.utils import loader

ROOT = Path(__file__).parents[1]
NEW = 16
ORIGINAL = 32  # the context that scaled models were "trained" on; prompts go past it


def rope(kind, theta=1e4, **more):
    return dict(rope_parameters={"rope_type": kind, "rope_theta": theta, **more})


LLAMA3 = rope("llama3", 5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=ORIGINAL)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=ORIGINAL, beta_fast=4.0)
LINEAR = rope("linear", factor=4.0)
DYNAMIC = dict(rope("dynamic", factor=4.0), max_position_embeddings=ORIGINAL)
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


def logprobs(model, tokens):
    """Log-probabilities [n - 1, vocab] of all tokens but the first, by transformers."""
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0, :-1].float().log_softmax(-1)


def worst_difference(out, right):
    """Between an output's log-probabilities and the right ones, prompt and answer."""
    entries = out["prompt_logprobs"][1:] + out["logprobs"]
    assert len(entries) == len(right)
    return max(abs(row[i].item() - value) for row, entry in zip(right, entries)
               for i, value in entry.items())


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
@pytest.mark.parametrize("optimized", [False, True])
def test_family_in_bfloat16(family, optimized, tmp_path, monkeypatch):
    """Two right implementations differ; transformers' own two say by how much.

    Layers as taught stay within that. A CPU's kernels round elsewhere: half as much again.
    """
    if not optimized:
        monkeypatch.delitem(MODEL_OPTIMIZERS, "cpu")
    from transformers import AutoModelForCausalLM
    folder, _ = make_checkpoint(family, folder=tmp_path, seed=3)
    prompts = random_prompts([40, 90, 150])
    with LLM(folder, dtype="bfloat16", num_kvcache_blocks=64,
             attention_backend="auto" if optimized else "sdpa") as llm:
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
    allowed = 1.5 if optimized else 1.0
    assert ours.mean() <= allowed * theirs.mean() and ours.max() <= allowed * theirs.max()


def fed_one_by_one(model, tokens):
    """Logits [n, vocab] of transformers with its cache, one token after another."""
    from transformers import DynamicCache
    cache, rows = DynamicCache(config=model.config), []
    with torch.inference_mode():
        for token in tokens:
            rows.append(model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1])
    return torch.stack(rows)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_dynamic_rope_is_that_of_a_text_that_grows(family, tmp_path):
    """A key depends on its position alone: as in transformers, fed token by token."""
    folder, model = make_checkpoint(family, folder=tmp_path, seed=5, **DYNAMIC)
    assert Config(folder).max_model_len == 4 * ORIGINAL
    within, beyond = random_prompts([ORIGINAL - 9, 2 * ORIGINAL + 3])
    for chunk in (16384, 7):
        with LLM(folder, kvcache_block_size=4, num_kvcache_blocks=64,
                 max_num_batched_tokens=chunk) as llm:
            params = SamplingParams(temperature=0, max_tokens=2 * ORIGINAL)
            out, = llm.generate([within], params, use_tqdm=False)     # it grows past the context
            assert out["token_ids"] == hf_generate(model, within, 2 * ORIGINAL)
            for prompt in (within, beyond):
                out, = llm.generate([prompt], WISH, use_tqdm=False)
                right = fed_one_by_one(model, prompt + out["token_ids"])[:-1].log_softmax(-1)
                assert worst_difference(out, right) < 1e-4
                tokens = torch.tensor(out["token_ids"])
                assert torch.equal(right[len(prompt) - 1:].argmax(-1), tokens)


ROPES = {
    "default": rope("default", 1e6), "linear": rope("linear", factor=8.0),
    "llama3": rope("llama3", 5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=8192),
    "yarn": rope("yarn", 1e6, factor=4.0, original_max_position_embeddings=32_768),
    "yarn-all": rope("yarn", 1e4, factor=16.0, original_max_position_embeddings=8192, beta_fast=16,
                     beta_slow=2, truncate=False, mscale=0.8, mscale_all_dim=1.0),
    "yarn-given": rope("yarn", 1e6, factor=4.0, original_max_position_embeddings=32_768,
                       attention_factor=1.25),
    "dynamic": rope("dynamic", factor=4.0),
}


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kind", ROPES)
def test_rope_far_out(kind, head_dim):
    """Positions 0, 1, 8k, 32k and 128k; one bit of a frequency is 0.01 radians out there."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    far = [0, 1, 8_191, 32_767, 131_071]
    config = LlamaConfig(hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim,
                         max_position_embeddings=8192, **ROPES[kind])
    theirs = LlamaRotaryEmbedding(config)
    parameters = {**config.rope_parameters, "max_position_embeddings": 8192}
    ours = RotaryEmbedding(head_dim, far[-1] + 1, parameters).cos_sin[far]
    for position, mine in zip(far, ours):
        cos, sin = theirs(torch.zeros(1), torch.tensor([[position]]))
        right = torch.stack((cos[0, 0, :head_dim // 2], sin[0, 0, :head_dim // 2]))
        torch.testing.assert_close(mine, right, atol=1e-6 + position * 2e-7, rtol=0)


def test_positions_reach_as_far_as_the_scaling():
    for shape, reach in [(LLAMA3, 512), (YARN, 512), (LINEAR, 2048), (DYNAMIC, 4 * ORIGINAL),
                         (dict(YARN, max_position_embeddings=ORIGINAL), 4 * ORIGINAL)]:
        config = make_hf_model("llama", num_hidden_layers=1, **shape).config
        assert max_positions(config) == reach


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
    with pytest.raises(ValueError, match="max_model_len=41.*sliding_window=40.*choose 40"):
        Config(folder, max_model_len=41)
    prompt, = random_prompts([24])
    with LLM(folder, max_model_len=40, num_kvcache_blocks=8) as llm:
        out, = llm.generate([prompt], SamplingParams(temperature=0), use_tqdm=False)
    assert out["finish_reason"] == "length" and len(out["token_ids"]) == 16
    assert out["token_ids"] == hf_generate(model, prompt, 16)


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_family_on_two_ranks(family, tmp_path):
    folder, model = make_checkpoint(family, folder=tmp_path, seed=2)
    prompts = random_prompts([5, 30])
    with LLM(folder, tensor_parallel_size=2, device="cpu", num_kvcache_blocks=32) as llm:
        outs = llm.generate(prompts, WISH, use_tqdm=False)
    for prompt, out in zip(prompts, outs):
        assert out["token_ids"] == hf_generate(model, prompt, NEW)
        assert worst_difference(out, logprobs(model, prompt + out["token_ids"])) < 1e-4


def test_experts_that_cannot_be_dealt_out(tmp_path):
    folder, _ = make_checkpoint("qwen3_moe", folder=tmp_path, moe_intermediate_size=25)
    with pytest.raises(ValueError, match="tensor_parallel_size=2 does not divide 25"):
        LLM(folder, tensor_parallel_size=2, device="cpu", num_kvcache_blocks=8)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_a_sharded_checkpoint_is_cast_on_the_way(family, tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "PIECE_BYTES", 1000)  # a few rows: every matrix comes in pieces
    folder, model = make_checkpoint(family, folder=tmp_path, tie_word_embeddings=True)
    single = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    monkeypatch.delitem(MODEL_OPTIMIZERS, "cpu")     # it would pack the weights away
    runner = ModelRunner(Config(folder, dtype="bfloat16", num_kvcache_blocks=4))
    assert {p.dtype for p in runner.model.parameters()} == {torch.bfloat16}
    down = "model.layers.1.mlp.experts.3" if family == "qwen3_moe" else "model.layers.1.mlp"
    mine = runner.model.get_submodule(down).down_proj.weight
    assert torch.equal(mine, single[f"{down}.down_proj.weight"].bfloat16())
    assert runner.model.lm_head.weight is runner.model.model.embed_tokens.weight


@pytest.fixture
def parity(monkeypatch, capsys):
    """Runs tools/parity.py here; its exit status and what it shows."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    tool = importlib.import_module("parity")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["parity.py", *map(str, arguments)])
        status, shown = tool.main(), capsys.readouterr()
        return status, shown.out + shown.err

    return run


def test_parity_tool(parity, tmp_path, monkeypatch):
    folder, _ = make_checkpoint("qwen2", folder=tmp_path)
    status, shown = parity(folder, "--max-tokens", 8)
    assert status == 0 and "greedy: 40 of 40 tokens agree" in shown, shown
    status, shown = parity(folder / "nope")
    assert status == 2 and "error: model: there is no folder" in shown, shown
    monkeypatch.delitem(MODEL_OPTIMIZERS, "cpu")     # it would put another RoPE in its place
    right = RotaryEmbedding.forward
    monkeypatch.setattr(RotaryEmbedding, "forward",
                        lambda self, positions, q, k: right(self, positions * 2, q, k))
    status, shown = parity(folder, "--max-tokens", 8)
    assert status == 1 and "NOT equal" in shown and "tokens they part" in shown, shown
