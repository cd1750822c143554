"""Prompts longer than the blocks of keys in which prefill goes through them on a CPU."""

import pytest
import torch
from fixtures import hf_generate, make_checkpoint, random_prompts

from nanovllm import LLM, SamplingParams
from nanovllm.cpu.backend import CPUBackend
from nanovllm.layers.attention import Attention, SDPABackend

NEW = 6
LENGTHS = (600, 257, 256, 40, 2)
pytestmark = [pytest.mark.usefixtures("level"), pytest.mark.parametrize(
    "level", ["native", pytest.param("no AMX", marks=pytest.mark.slow)], indirect=True,
    scope="module")]
SHAPES = {  # in the second all layers are one call of C, where the processor has its products
    "by modules": dict(head_dim=20),
    "in one call": dict(hidden_size=64, intermediate_size=96, head_dim=16)}


@pytest.fixture(scope="module", params=SHAPES)
def reference(level, request, tmp_path_factory):
    """A checkpoint, prompts, and what transformers makes of them."""
    if reason := CPUBackend.why_not(torch.device("cpu"), torch.float32, 20):
        pytest.skip(reason)
    folder, model = make_checkpoint(folder=tmp_path_factory.mktemp("model"), seed=1,
                                    num_attention_heads=6, max_position_embeddings=1024,
                                    **SHAPES[request.param])
    prompts = random_prompts(LENGTHS)
    prompts.append(prompts[0][:500] + prompts[1])  # begins as the first does
    return folder, prompts, [hf_generate(model, prompt, NEW) for prompt in prompts]


def generate(reference, **settings):
    """The prompts' tokens, equal to transformers' when they are asked twice; the statistics."""
    folder, prompts, right = reference
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    with LLM(folder, attention_backend="cpu", **settings) as llm:
        for _ in range(2):
            outs = llm.generate(prompts, params, use_tqdm=False)
            assert [out["token_ids"] for out in outs] == right
        return llm.stats, [out["num_cached_tokens"] for out in outs]


@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("bs, chunk", [(16, 16384), (5, 300), (16, 257), (256, 33),
                                       pytest.param(1, 8, marks=pytest.mark.slow)])
def test_long_prompts(bs, chunk, threads, reference):
    """In one step, in chunks that end before, at and beyond a block of keys, beside decode rows."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        generate(reference, kvcache_block_size=bs, max_num_batched_tokens=chunk,
                 num_kvcache_blocks=-(-2600 // bs))
    finally:
        torch.set_num_threads(before)


def test_chunks_of_one_token(reference):
    generate(reference, kvcache_block_size=16, max_num_batched_tokens=1, num_kvcache_blocks=170)


def test_prompts_from_the_prefix_cache(reference):
    """Asked again, one to a block's worth of tokens at the end of a long context are computed."""
    _, cached = generate(reference, kvcache_block_size=4, num_kvcache_blocks=650)
    assert cached == [(n - 1) // 4 * 4 for n in (*LENGTHS, 500 + LENGTHS[1])]


@pytest.mark.parametrize("chunk", [100, 16384])
def test_preempted_long_prompts(chunk, reference):
    """What was thrown out of a pool for the first two prompts is computed again, the same."""
    stats, _ = generate(reference, kvcache_block_size=1, max_num_batched_tokens=chunk,
                        num_kvcache_blocks=sum(LENGTHS[:2]) + 2, enable_prefix_caching=False)
    assert stats.preemptions > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n, length", [(1, 513), (3, 770), (64, 64), (500, 500), (130, 700)])
def test_attention_reads_only_its_own_blocks(n, length, dtype):
    """All else in the cache, the padding of the last block included, is 1,000 (test_kernels.py)."""
    if reason := CPUBackend.why_not(torch.device("cpu"), dtype, 64):
        pytest.skip(reason)
    layer, bs, blocks = Attention(6, 2, 64), 16, -(-length // 16)
    table = torch.randperm(blocks + 3)[:blocks].int()
    slots = (table[:, None] * bs + torch.arange(bs)).flatten()[:length]
    caches = torch.full((2, (blocks + 3) * bs, 2, 64), 1000.0, dtype=dtype)
    caches[:, slots] = torch.randn(2, length, 2, 64).to(dtype)
    layer.bind_kv_cache(CPUBackend(), *caches.view(2, -1, bs, 2, 64))
    q = torch.randn(n, 3 * 6, 64).to(dtype)[:, 6:12]  # a slice of q, k and v, not contiguous
    padded = torch.cat([table, torch.zeros(5, dtype=torch.int32)])  # as in a batch of longer rows
    got = CPUBackend().prefill(layer, q, padded, length).float()
    layer.bind_kv_cache(SDPABackend(), layer.k_cache.float(), layer.v_cache.float())
    exact = SDPABackend().prefill(layer, q.float(), padded, length)
    tolerance = 1e-5 if dtype is torch.float32 else 0.02
    torch.testing.assert_close(got, exact, atol=tolerance, rtol=tolerance)
