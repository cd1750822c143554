"""Shapes, lengths and one check for tests that compare with Hugging Face, token for token."""

import torch

from nanovllm import LLM, SamplingParams

NEW = 12                     # tokens compared of each prompt
BLOCK_SIZES = (1, 4, 5, 16)
LONG = 21                    # a prompt that is no neighbour of a block's end


def lengths_for(block_size):
    """The lengths at which a block is nearly full, full, and just over."""
    bs = block_size
    return sorted({n for n in (bs - 1, bs, bs + 1, 2 * bs, LONG) if n > 0})


ALL_LENGTHS = sorted({n for bs in BLOCK_SIZES for n in lengths_for(bs)})


def rope(theta, **more):
    """RoPE parameters of config.json, as part of a shape."""
    return dict(rope_parameters={"rope_type": "default", "rope_theta": theta, **more})


LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)  # small: short prompts must show the scaling
SHAPES = {  # in all but one, head_dim is not hidden_size / heads
    "qwen3": dict(seed=1),
    "qwen3-tied-1kv": dict(tie_word_embeddings=True, num_key_value_heads=1, head_dim=20,
                           vocab_size=97, **rope(1e6)),
    "qwen3-mha-bias": dict(num_key_value_heads=4, head_dim=8, attention_bias=True,
                           vocab_size=257, num_hidden_layers=2, **rope(500.0)),
    "llama-12": dict(family="llama", head_dim=12, **rope(5e5)),
    "llama3-tied-1kv": dict(family="llama", num_key_value_heads=1, tie_word_embeddings=True,
                            **rope(5e5, **LLAMA3)),
    "llama-mha-bias-linear": dict(family="llama", num_attention_heads=6, num_key_value_heads=6,
                                  head_dim=10, attention_bias=True, mlp_bias=True,
                                  vocab_size=203, **rope(1e4, rope_type="linear", factor=4.0)),
}


def tokens_of(llm, prompts, max_tokens=NEW):
    """Greedy completions."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    return [out["token_ids"] for out in llm.generate(prompts, params, use_tqdm=False)]


def check(ref, block_size, **settings):
    """Each prompt twice in one batch, then once more; the statistics, and what came cached."""
    bs, lengths = block_size, lengths_for(block_size)
    prompts, right = [ref.prompts[n] for n in lengths], [ref.tokens[n] for n in lengths]
    with LLM(ref.folder, kvcache_block_size=bs, **settings) as llm:
        assert tokens_of(llm, prompts * 2) == right * 2
        params = SamplingParams(temperature=0, max_tokens=NEW)
        again = llm.generate(prompts, params, use_tqdm=False)
        assert [out["token_ids"] for out in again] == right
        assert llm.block_manager.num_free_blocks == llm.block_manager.num_blocks
        return llm.stats, {n: out["num_cached_tokens"] for n, out in zip(lengths, again)}


def tight(block_size):
    """The smallest pool in which the longest request can run by itself."""
    return -(-(max(lengths_for(block_size)) + NEW) // block_size)


def finish(llm):
    """Step to the end; the outputs by request."""
    outputs = {}
    while not llm.is_finished():
        outputs.update({step.request_id: step.output for step in llm.step() if step.output})
    return outputs


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
