"""From logits to tokens: each row by its own parameters, and draws that follow the distribution."""

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.layers.sampler import (
    Sampler, apply_temperature, filter_top_k_top_p, gumbel_noise, stream_seed, top_logprobs,
)

LOGITS = torch.tensor([2.0, 0.0, 1.0, -1.0])


def kept(top_k=0, top_p=1.0, logits=LOGITS):
    """Token ids that the filters leave."""
    out = filter_top_k_top_p(logits[None], torch.tensor([top_k]), torch.tensor([top_p]))
    assert torch.equal(out[0][out[0] > -torch.inf], logits[out[0] > -torch.inf])
    return out[0].isfinite().nonzero().flatten().tolist()


def test_temperature():
    out = apply_temperature(LOGITS.bfloat16()[None], torch.tensor([0.5]))
    assert out.dtype is torch.float32 and out.tolist() == [[0, -4, -2, -6]]
    tiny = apply_temperature(LOGITS[None], torch.tensor([1e-30]))
    assert tiny.softmax(-1).tolist() == [[1, 0, 0, 0]]


@pytest.mark.parametrize("top_k, top_p, expected", [
    (0, 1.0, [0, 1, 2, 3]), (1, 1.0, [0]), (2, 1.0, [0, 2]), (99, 1.0, [0, 1, 2, 3]),
    (0, 0.6, [0]), (0, 0.65, [0, 2]),        # probabilities .644 .237 .087 .032
    (0, 0.9, [0, 1, 2]), (0, 1e-50, [0]), (2, 0.9, [0, 2]), (2, 0.7, [0])])
def test_top_k_and_top_p(top_k, top_p, expected):
    """Top-p acts on what top-k left, renormalised (.731 and .269), and keeps what crosses it."""
    assert kept(top_k, top_p) == expected


def test_of_equal_logits_the_lower_id_ranks_first():
    assert kept(2, logits=torch.zeros(4)) == [0, 1] and kept(0, 0.5, torch.zeros(4)) == [0, 1]


def test_each_row_has_its_own_filter():
    out = filter_top_k_top_p(LOGITS.repeat(3, 1), torch.tensor([0, 1, 0]),
                             torch.tensor([1.0, 1.0, 0.65]))
    assert out.isfinite().sum(-1).tolist() == [4, 1, 2]


def test_draws_follow_the_distribution():
    generator = torch.Generator().manual_seed(0)
    noise = gumbel_noise((20_000, 4), generator)
    counts = torch.bincount((LOGITS + noise).argmax(-1), minlength=4) / 20_000
    torch.testing.assert_close(counts, LOGITS.softmax(-1), atol=0.015, rtol=0)


def sample(params, indices=None, logits=LOGITS):
    return Sampler()(logits.repeat(len(params), 1), params, indices or [0] * len(params)).tolist()


def test_greedy_rows_beside_random_ones():
    """Whoever is greedy gets the largest, whatever stands beside it."""
    greedy, wild = SamplingParams(temperature=0), SamplingParams(temperature=9.0)
    drawn = [sample([wild, greedy, wild, greedy]) for _ in range(40)]
    assert all(row[1] == row[3] == 0 for row in drawn)
    assert len({row[0] for row in drawn}) > 1


def test_a_seed_makes_a_draw_that_depends_on_nothing_else():
    """Not on the batch, nor on what was drawn before; each token has a draw of its own."""
    logits = torch.zeros(1000)
    seeded, free = SamplingParams(seed=7), SamplingParams()
    alone = sample([seeded], [3], logits)
    assert sample([free, seeded, free], [0, 3, 9], logits)[1:2] == alone
    assert sample([seeded, seeded], [3, 4], logits)[1] != alone[0]
    assert sample([SamplingParams(seed=8)], [3], logits) != alone


def test_seeds_of_draws():
    seeds = {stream_seed(s, i) for s in (0, 1, -5, 10**30) for i in range(50)}
    assert len(seeds) == 200 and all(0 <= seed < 2**63 for seed in seeds)
    assert stream_seed(1, 23) != stream_seed(12, 3)


def test_log_probabilities():
    entries = top_logprobs(torch.stack([LOGITS, LOGITS]), [3, 0], [2, 1])
    right = LOGITS.log_softmax(-1).tolist()
    assert [list(entry) for entry in entries] == [[3, 0, 2], [0]]
    for entry in entries:
        assert entry == pytest.approx({i: right[i] for i in entry})


def test_a_tiny_top_p_keeps_the_likeliest(demo):
    prompt = "What is PagedAttention?"
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    tiny = SamplingParams(top_p=1e-50, max_tokens=12, ignore_eos=True)
    want, got = (demo.generate(prompt, p, use_tqdm=False)[0]["token_ids"] for p in (greedy, tiny))
    assert got == want


def test_a_seed_in_the_engine(good):
    """The same text alone, in company, and preempted."""
    folder, prompt, _ = good
    params = [SamplingParams(temperature=1.5, seed=seed, max_tokens=16) for seed in range(4)]
    found = []
    for blocks in (64, 9):
        with LLM(folder, kvcache_block_size=4, num_kvcache_blocks=blocks) as llm:
            outs = llm.generate([prompt] * 4, params, use_tqdm=False)
            assert llm.stats.preemptions > 0 or blocks == 64
            found.append([out["token_ids"] for out in outs])
            found.append([llm.generate([prompt], p, use_tqdm=False)[0]["token_ids"]
                          for p in params])
    assert all(tokens == found[0] for tokens in found) and len(set(map(tuple, found[0]))) == 4


@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf])
@pytest.mark.parametrize("params", [
    SamplingParams(temperature=0), SamplingParams(seed=1), SamplingParams(top_k=2, top_p=0.9)])
def test_logits_that_are_no_numbers(spoilt, params):
    """-1 for that row; -inf for some tokens is none of it, for all of them it is."""
    rows = LOGITS.repeat(4, 1)
    rows[1, 3] = spoilt
    rows[2] = -torch.inf
    rows[3, 1:] = -torch.inf
    tokens = Sampler()(rows, [params] * 4, [0] * 4).tolist()
    assert tokens[1:] == [-1, -1, 0] and tokens[0] >= 0


def test_whole_numbers_of_any_size():
    """Who sets a field by force gets no error inside a step."""
    params = SamplingParams()
    object.__setattr__(params, "temperature", 10**20)
    assert sample([params, SamplingParams(temperature=0)])[1] == 0
