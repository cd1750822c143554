"""RoPE: angles far out for every kind of scaling, and how they turn a query and a key."""

import pytest
import torch
from fixtures import hf_generate, make_checkpoint, random_prompts

from nanovllm import LLM, SamplingParams
from nanovllm.config import Config
from nanovllm.layers.rotary_embedding import RotaryEmbedding, apply_rotary_emb
from tests.parity import worst_difference

NEW, ORIGINAL = 16, 32


def rope(kind, theta=1e4, **more):
    return dict(rope_parameters={"rope_type": kind, "rope_theta": theta, **more})


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


def test_pairs_are_half_a_head_apart():
    x = torch.tensor([[[1.0, 2.0, 0.0, 0.0]]])
    quarter = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])       # 90 and 0 degrees
    assert apply_rotary_emb(x, *quarter).tolist() == [[[0, 2, 1, 0]]]


def test_scores_depend_on_the_distance_alone():
    rotary = RotaryEmbedding(16, 100, {"rope_theta": 1e4})
    q, k = torch.randn(2, 1, 1, 16)
    scores = []
    for at in (0, 7, 60):
        turned_q, turned_k = (rotary(torch.tensor([p]), x, x)[0] for p, x in ((at + 9, q), (at, k)))
        scores.append((turned_q * turned_k).sum())
    torch.testing.assert_close(torch.stack(scores), scores[0].expand(3), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("parameters, complaint", [
    (dict(rope_type="longrope"), "rope_type 'longrope'.*default"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5")])
def test_what_is_not_supported(parameters, complaint):
    with pytest.raises(ValueError, match=complaint):
        RotaryEmbedding(16, 8, {"rope_theta": 1e4, **parameters})


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
    dynamic = dict(rope("dynamic", factor=4.0), max_position_embeddings=ORIGINAL)
    folder, model = make_checkpoint(family, folder=tmp_path, seed=5, **dynamic)
    assert Config(folder).max_model_len == 4 * ORIGINAL
    within, beyond = random_prompts([ORIGINAL - 9, 2 * ORIGINAL + 3])
    wish = SamplingParams(temperature=0, max_tokens=NEW, logprobs=3, prompt_logprobs=0)
    for chunk in (16384, 7):
        with LLM(folder, kvcache_block_size=4, num_kvcache_blocks=64,
                 max_num_batched_tokens=chunk) as llm:
            params = SamplingParams(temperature=0, max_tokens=2 * ORIGINAL)
            out, = llm.generate([within], params, use_tqdm=False)     # it grows past the context
            assert out["token_ids"] == hf_generate(model, within, 2 * ORIGINAL)
            for prompt in (within, beyond):
                out, = llm.generate([prompt], wish, use_tqdm=False)
                right = fed_one_by_one(model, prompt + out["token_ids"])[:-1].log_softmax(-1)
                assert worst_difference(out, right) < 1e-4
                tokens = torch.tensor(out["token_ids"])
                assert torch.equal(right[len(prompt) - 1:].argmax(-1), tokens)
