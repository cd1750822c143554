"""On a GPU in fp32, replayed or launched, by every backend: the tokens of transformers."""

from types import SimpleNamespace

import pytest
from fixtures import hf_generate, make_checkpoint, random_prompts

from nanovllm import LLM, SamplingParams
from nanovllm.utils.rooms import find_room

pytestmark = pytest.mark.gpu
NEW = 24
SHAPES = {
    "qwen3": dict(num_attention_heads=4),
    "qwen3-tied-24": dict(head_dim=24, tie_word_embeddings=True),
    "llama-1kv": dict(family="llama", num_key_value_heads=1, vocab_size=101),
    "qwen2": dict(family="qwen2"), "qwen3_moe": dict(family="qwen3_moe"),
}
WAYS = {
    "all": {}, "triton, replayed": dict(attention_backend="triton"),
    "triton, launched": dict(attention_backend="triton", enforce_eager=True),
    "no step ahead": dict(attention_backend="triton", look_ahead=False),
    "launched, with a step ahead": dict(attention_backend="triton", enforce_eager=True,
                                        look_ahead=True),
    "sdpa": dict(attention_backend="sdpa"), "plain": dict(kernels="plain"),
    "no prefix cache": dict(enable_prefix_caching=False),
}


@pytest.fixture(scope="module", params=SHAPES)
def right(request, tmp_path_factory):
    """A checkpoint, prompts, and what transformers answers."""
    folder, model = make_checkpoint(folder=tmp_path_factory.mktemp("model"),
                                    **SHAPES[request.param])
    prompts = random_prompts([5, 70, 33, 1, 100, 17], model.config.vocab_size)
    return SimpleNamespace(folder=folder, prompts=prompts,
                           tokens=[hf_generate(model, prompt, NEW) for prompt in prompts])


@pytest.mark.parametrize("way", WAYS)
def test_the_tokens_of_transformers(way, right):
    """With little memory, so that sequences are preempted, and prompts in chunks."""
    if "triton" in WAYS[way].values() and find_room("gpu") is None:
        pytest.skip("nanovllm/gpu is not there")
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    with LLM(right.folder, device="cuda", kvcache_block_size=16, num_kvcache_blocks=12,
             max_model_len=160, max_num_seqs=5, max_num_batched_tokens=48, **WAYS[way]) as llm:
        outs = llm.generate(right.prompts, params, use_tqdm=False)
        assert llm.stats.preemptions > 0
    assert [out["token_ids"] for out in outs] == right.tokens


def test_the_fast_way_is_the_one_that_runs(tmp_path):
    """Nothing was left out because it differed: graphs, fused layers, a step ahead."""
    if (room := find_room("gpu")) is None:
        pytest.skip("nanovllm/gpu is not there")
    from nanovllm.gpu.fuse import FusedDecoder
    folder, _ = make_checkpoint(folder=tmp_path)
    for dtype in ("float32", "float16", "bfloat16"):
        with LLM(folder, device="cuda", dtype=dtype, num_kvcache_blocks=24,
                 max_num_seqs=4) as llm:
            assert type(llm.runner.model.model) is FusedDecoder, dtype
            assert llm.runner.recordings.recorded and type(llm.stepper) is room.Lookahead
            llm.generate([[1, 2, 3]] * 2, SamplingParams(temperature=0), use_tqdm=False)
            assert llm.stepper.right > 3


def test_two_engines_on_one_gpu(right):
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    settings = dict(device="cuda", num_kvcache_blocks=64, max_model_len=160, max_num_seqs=4)
    with LLM(right.folder, **settings) as one, LLM(right.folder, **settings) as two:
        for prompt in right.prompts:
            one.add_request(prompt, params)
            two.add_request(prompt, params)
        outs = [{}, {}]
        while not (one.is_finished() and two.is_finished()):
            for llm, found in zip((one, two), outs):
                found.update({s.request_id: s.output for s in llm.step() if s.output})
    for found in outs:
        assert [found[i]["token_ids"] for i in sorted(found)] == right.tokens
