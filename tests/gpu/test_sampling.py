"""Tokens drawn by kernels against day 5's sampler, on whole vocabularies."""

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.layers.sampler import (
    Sampler, apply_temperature, filter_top_k_top_p, seeded_noise, stream_seed,
)
from nanovllm.utils.rooms import find_room

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(find_room("gpu") is None,
                                                  reason="nanovllm/gpu is not there")]
GPU = torch.device("cuda")
WISHES = [dict(), dict(temperature=.6, top_k=20, top_p=.95), dict(temperature=.7, top_k=5),
          dict(temperature=1.3, top_p=.9), dict(temperature=0), dict(temperature=.6, top_k=1),
          dict(top_k=3, top_p=1e-4), dict(temperature=.6, top_k=700, top_p=.9),
          dict(temperature=1e-30), dict(top_p=.5)]


@pytest.fixture(scope="module")
def fast():
    from nanovllm.gpu.sampling import TritonSampler
    return TritonSampler(GPU)


def logits_of(rows, vocab, scale, dtype, seed):
    g = torch.Generator(GPU).manual_seed(seed)
    return (scale * torch.randn(rows, vocab, generator=g, device=GPU)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab, scale", [(151_936, 1), (151_936, 6), (32_000, 2), (50_257, .1),
                                          (1000, 8), (300, 1)])
def test_seeded_rows_get_the_plain_sampler_s_tokens(fast, vocab, scale, dtype):
    logits = logits_of(len(WISHES), vocab, scale, dtype, vocab)
    for draw in range(3):
        params = [SamplingParams(seed=i, **wish) for i, wish in enumerate(WISHES)]
        draws = [draw + i for i in range(len(params))]
        assert fast(logits, params, draws).tolist() == Sampler(GPU)(logits, params, draws).tolist()


def test_equal_logits_and_no_numbers(fast):
    logits = torch.zeros(5, 10_000, device=GPU)
    logits[1, 7], logits[2, 7], logits[3] = torch.nan, torch.inf, -torch.inf
    params = [SamplingParams(top_k=3, seed=1)] * 5
    tokens = fast(logits, params, [0] * 5).tolist()
    assert tokens == Sampler(GPU)(logits, params, [0] * 5).tolist()
    assert tokens[0] < 3 and tokens[1:4] == [-1] * 3       # of equal ones the lower ids


@pytest.mark.parametrize("case", range(len(WISHES)))
def test_draws_follow_the_distribution(fast, case):
    """Rows without a seed: chi-square against the exact distribution, a seed for each case."""
    stats = pytest.importorskip("scipy.stats")
    wish, n = WISHES[case], 20_000
    if wish.get("temperature") == 0:
        return
    logits = logits_of(1, 40, 1.5, torch.float32, 100 + case)
    fast.shared.manual_seed(case)
    exact = apply_temperature(logits, torch.tensor([wish.get("temperature", 1.0)], device=GPU))
    exact = filter_top_k_top_p(exact, torch.tensor([wish.get("top_k", 0)], device=GPU),
                               torch.tensor([wish.get("top_p", 1.0)], device=GPU)).softmax(-1)
    drawn = fast(logits.expand(n, -1).contiguous(), [SamplingParams(**wish)] * n, [0] * n)
    counts, expected = torch.bincount(drawn, minlength=40).cpu(), exact[0].double().cpu()
    assert not counts[expected == 0].any()
    likely = expected * n > 5
    if likely.sum() > 1:
        seen, want = counts[likely].double(), expected[likely] * n
        assert stats.chisquare(seen * want.sum() / seen.sum(), want).pvalue > 1e-4


def test_the_noise_is_the_same_everywhere():
    key = stream_seed(3, 14)
    torch.testing.assert_close(seeded_noise(key, 100_000, GPU).cpu(), seeded_noise(key, 100_000),
                               atol=1e-5, rtol=1e-5)


def test_a_seed_gives_the_same_text_with_kernels_and_without():
    texts = []
    for kernels in ("auto", "plain"):
        with LLM(device="cuda", dtype="float32", num_kvcache_blocks=128, kernels=kernels) as llm:
            params = [SamplingParams(temperature=.8, top_k=30, seed=i, max_tokens=24)
                      for i in range(6)]
            outs = llm.generate(["What is a block table?"] * 6, params, use_tqdm=False)
            texts.append([out["token_ids"] for out in outs])
            taught = type(llm.sampler) is Sampler
        assert taught == (kernels == "plain")
    assert texts[0] == texts[1]
