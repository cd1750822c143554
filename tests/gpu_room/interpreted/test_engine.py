"""The whole engine with the room's layers and kernels, against transformers."""

import pytest
from fixtures import hf_generate, make_checkpoint, random_prompts

from nanovllm import LLM, SamplingParams
from nanovllm.gpu.fuse import FusedDecoder
from tests.doubles import EagerRecordings


@pytest.mark.parametrize("family, shape", [
    ("qwen3", dict(head_dim=24)), ("llama", dict(num_key_value_heads=1)), ("qwen2", {})])
def test_the_engine_against_transformers(family, shape, launched, tmp_path):
    """Shared beginnings, chunks, preemption and padded rows; then one sequence alone."""
    folder, model = make_checkpoint(family, folder=tmp_path, num_hidden_layers=2, **shape)
    common, *ends = random_prompts([17, 14, 13, 15, 12])
    prompts = [common + end for end in ends]
    greedy = SamplingParams(temperature=0, max_tokens=5)
    with LLM(folder, device="cpu", attention_backend="triton", kvcache_block_size=16,
             num_kvcache_blocks=6, max_model_len=64, max_num_batched_tokens=24,
             max_num_seqs=4) as llm:
        assert type(llm.runner.model.model) is FusedDecoder
        llm.runner.recordings = EagerRecordings(llm.runner)
        llm.runner.recordings.capture()
        outs = llm.generate(prompts, greedy, use_tqdm=False)
        stats = llm.stats
        launched.clear()
        short = SamplingParams(temperature=0, max_tokens=2)
        alone = llm.generate(prompts[:1], short, use_tqdm=False)[0]["token_ids"]
    assert alone == outs[0]["token_ids"][:2]
    # four matrices in each of two layers, and the head then and in the prefill
    assert launched["one_row_linear"] == 2 + (2 * 4 if family != "qwen2" else 0)
    assert stats.preemptions and stats.cached_tokens, stats
    assert [o["token_ids"] for o in outs] == [hf_generate(model, p, 5) for p in prompts]
