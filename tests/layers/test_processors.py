"""What a request changes of its logits: by definition, by transformers, and inside the engine."""

import json
import random
import re

import pytest
import torch
from fixtures import make_checkpoint, random_prompts
from transformers.generation import logits_process as theirs

from nanovllm import LLM, SamplingParams
from nanovllm.engine.sequence import Sequence
from nanovllm.layers.processors import (
    after_processors, count_penalty, json_schema, make_processors, min_p, not_before, one_of,
    repetition_penalty,
)
from nanovllm.layers.sampler import Sampler
from tests.processes import run_python

VOCAB = 151
PENALTIES = dict(repetition_penalty=1.7, presence_penalty=.9, frequency_penalty=.6)


def a_row(seed=0, size=VOCAB):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


def penalised(prompt, completion, row, repetition_penalty=1, presence_penalty=0,
              frequency_penalty=0):
    """vLLM's definition, token by token."""
    row = row.tolist()
    for token in range(len(row)):
        if token in prompt or token in completion:
            row[token] *= 1 / repetition_penalty if row[token] > 0 else repetition_penalty
        if token in completion:
            row[token] -= presence_penalty + frequency_penalty * completion.count(token)
    return torch.tensor(row)


@pytest.mark.parametrize("penalty", [.5, 1.3, 4.0])
def test_repetition_is_that_of_transformers(penalty):
    prompt, completion = [3, 9, 9, 150], [9, 4, 4]
    ids = torch.tensor([prompt + completion])
    want = theirs.RepetitionPenaltyLogitsProcessor(penalty)(ids, a_row()[None])[0]
    assert torch.equal(repetition_penalty(penalty, prompt)(completion, a_row()), want)


@pytest.mark.parametrize("share", [1e-6, .05, .4, 1.0])
@pytest.mark.parametrize("temperature", [.3, 1.0, 2.5])
def test_min_p_is_that_of_transformers(share, temperature):
    """There it sees what the temperature has left, here the logits before it."""
    want = theirs.MinPLogitsWarper(share)(None, a_row()[None] / temperature)[0] > -torch.inf
    got = min_p(share, temperature)([], a_row()) > -torch.inf
    assert torch.equal(got, want) and got.any()


def test_min_tokens_is_that_of_transformers():
    for n in (0, 2, 3):
        process = theirs.MinNewTokensLengthLogitsProcessor(5, 3, torch.tensor([7, 9]), "cpu")
        want = process(torch.zeros(1, 5 + n, dtype=torch.long), a_row()[None])[0]
        assert torch.equal(not_before(3, [7, 9])([1] * n, a_row()), want)


@pytest.mark.parametrize("completion", [[], [5], [5, 5, 9, 5]])
def test_counts_are_of_the_completion(completion):
    want = penalised([5, 8], completion, a_row(), 1, .5, -1.25)
    assert torch.allclose(count_penalty(.5, -1.25)(completion, a_row()), want)


def made(**wishes):
    return make_processors(SamplingParams(**wishes), [1, 2], frozenset([0, 500]), VOCAB)


def test_the_list_holds_what_was_asked_for():
    assert made() == [] and made(min_p=.5, temperature=0) == [] and made(logit_bias={}) == []
    mine = [lambda completion, row: row]
    every = made(logits_processors=mine, logit_bias={3: 1}, min_tokens=2, min_p=.1, **PENALTIES)
    assert len(every) == 6 and every[2] is mine[0]       # after min_tokens and the bias, as in vLLM
    with pytest.raises(ValueError, match="^logit_bias holds token id 151; the model has 0 to 150"):
        made(logit_bias={3: 1, 151: 1})


@pytest.mark.parametrize("wishes, forbidden", [
    (dict(), [0]), (dict(stop_token_ids=[4]), [0, 4]),
    (dict(stop_token_ids=[4], ignore_eos=True), [4]), (dict(ignore_eos=True), [])])
def test_min_tokens_forbids_what_would_end_it(wishes, forbidden):
    [process] = made(min_tokens=2, **wishes)
    for n in (0, 1):
        row = process([1] * n, torch.zeros(VOCAB))
        assert (row == -torch.inf).nonzero()[:, 0].tolist() == forbidden
    assert process([1, 1], torch.zeros(VOCAB)).isfinite().all()


def test_a_bias_comes_before_the_penalties():
    """As in vLLM: what the bias has made negative is multiplied."""
    row = torch.zeros(VOCAB)
    for process in made(logit_bias={2: -3}, repetition_penalty=2.0):
        row = process([], row)
    assert row[2] == -6 and row.count_nonzero() == 1


def sequences(*lists):
    seqs = [Sequence([1, 2], SamplingParams(temperature=0)) for _ in lists]
    for seq, processors in zip(seqs, lists):
        seq.logits_processors = processors
    return seqs


def test_only_the_rows_that_ask():
    """Each draw sees the others' logits as they were, in their dtype, and nothing is written."""
    seen = []

    def sampler(logits, params, indices):
        seen.append((logits.dtype, len(params), indices))
        return logits.max(-1).indices

    logits = torch.stack([a_row(i) for i in range(4)]).bfloat16()
    before, best = logits.clone(), logits.argmax(-1).tolist()
    forbid = lambda completion, row: row.masked_fill(row == row.max(), -torch.inf)
    seqs = sequences([], [forbid], [], [forbid, forbid])
    tokens = after_processors(sampler, seqs)(logits, [None] * 4, [7, 8, 9, 10]).tolist()
    assert torch.equal(logits, before)
    assert tokens[::2] == best[::2] and tokens[1] != best[1] and tokens[3] != best[3]
    assert seen == [(torch.float32, 2, [8, 10]), (torch.bfloat16, 2, [7, 9])]


def test_a_processor_may_write_into_its_row():
    def only_5(completion, row):
        row[:] = -torch.inf
        row[5] = 0
        completion.append(9)            # nor is this anybody's list
        return row

    logits, seqs = a_row()[None], sequences([only_5])
    params = [seqs[0].sampling_params]
    assert after_processors(Sampler(), seqs)(logits, params, [0]).tolist() == [5]
    assert logits.isfinite().all() and seqs[0].token_ids == [1, 2]


@pytest.mark.parametrize("wrong", [None, 3, torch.zeros(VOCAB - 1), torch.zeros(1, VOCAB)], ids=str)
def test_what_comes_back_must_be_logits(wrong):
    draw = after_processors(Sampler(), sequences([lambda completion, row: wrong]))
    with pytest.raises(TypeError, match=re.escape(f"must return logits of shape ({VOCAB},)")):
        draw(a_row()[None], [SamplingParams()], [0])


def test_who_forbids_every_token_is_told(demo):
    """Not a token by chance; the others go on."""
    choose = one_of(["block"], demo.tokenizer)           # over before min_tokens is reached
    params = [SamplingParams(temperature=0, logits_processors=choose, min_tokens=5, max_tokens=9),
              SamplingParams(seed=1, logits_processors=lambda completion, row: row - torch.inf),
              SamplingParams(temperature=0, max_tokens=3)]
    outs = demo.generate(["What holds the KV cache?\n"] * 3, params, use_tqdm=False)
    assert [out["finish_reason"] for out in outs] == ["error", "error", "length"]
    assert all("leave no token to draw" in out["error"] for out in outs[:2])
    assert outs[0]["text"] == "block"


def test_one_of_several_strings(demo):
    texts = ["blocks", "block tables", "block", "pages of memory"]
    choose = one_of(texts, demo.tokenizer)
    outs = demo.generate(["What holds the KV cache?\n"] * 12, [
        SamplingParams(seed=i, temperature=3.0, logits_processors=choose)
        for i in range(12)], use_tqdm=False)
    assert {out["text"] for out in outs} <= set(texts) and len({out["text"] for out in outs}) > 1
    assert {out["finish_reason"] for out in outs} == {"stop"}
    favourite, = demo.generate("What holds the KV cache?\n", SamplingParams(
        temperature=0, logits_processors=choose, logit_bias={
            demo.tokenizer.encode("pages")[0]: 100}), False)
    assert favourite["text"] == "pages of memory"


def test_json_that_fits_a_schema(demo):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "yes"]},
                                               "n": {"type": "integer", "minimum": 0,
                                                    "maximum": 99}},
              "required": ["a", "n"], "additionalProperties": False}
    process = json_schema(schema, demo.tokenizer)
    outs = demo.generate(["Say it:"] * 6, [
        SamplingParams(seed=i, logits_processors=process) for i in range(6)], False)
    for out in outs:
        found = json.loads(out["text"])
        assert out["finish_reason"] == "stop" and sorted(found) == ["a", "n"], out["text"]
        assert found["a"] in ("x", "yes") and 0 <= found["n"] <= 99
    with pytest.raises(ValueError, match="^schema: "):
        json_schema({"type": "nonsense"}, demo.tokenizer)


def test_a_schema_that_nothing_fits_is_an_error(demo):
    pytest.importorskip("llguidance")
    process = json_schema({"$ref": "#"}, demo.tokenizer)
    out, = demo.generate(["Say it:"], SamplingParams(logits_processors=process), False)
    assert out["finish_reason"] == "error" and "schema" in out["error"] and len(out["error"]) < 200


def test_a_processor_that_gives_no_numbers(demo):
    out, = demo.generate(["a"], SamplingParams(logits_processors=lambda ids, row: row * torch.nan),
                         False)
    assert out["finish_reason"] == "nan"


# -----------------------------------------------------------------------------------------------
# Inside the engine
# -----------------------------------------------------------------------------------------------

NEW = 14


@pytest.fixture(scope="module")
def penalised_model(tmp_path_factory):
    """A checkpoint, prompts, wishes, and the tokens that a loop around transformers finds."""
    folder, model = make_checkpoint(folder=tmp_path_factory.mktemp("penalised"))
    prompts = random_prompts([5, 19, 11, 3, 26])
    wishes = [PENALTIES, {}, dict(repetition_penalty=.4), dict(frequency_penalty=1.5), {}]
    tokens = []
    for prompt, wish in zip(prompts, wishes):
        ids = list(prompt)
        for _ in range(NEW):
            row = model(torch.tensor([ids])).logits[0, -1].float().detach()
            ids.append(int(penalised(prompt, ids[len(prompt):], row, **wish).argmax()))
        tokens.append(ids[len(prompt):])
    return folder, prompts, wishes, tokens


def answers(folder, prompts, wishes, **settings):
    params = [SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, **w) for w in wishes]
    with LLM(folder, device="cpu", kvcache_block_size=4, **settings) as llm:
        outs = llm.generate(prompts, params, use_tqdm=False)
        return [out["token_ids"] for out in outs], llm.stats


@pytest.mark.parametrize("settings", [
    dict(num_kvcache_blocks=128), dict(num_kvcache_blocks=14, max_model_len=48),
    dict(num_kvcache_blocks=128, max_num_batched_tokens=8), dict(num_kvcache_blocks=128,
                                                                look_ahead=True),
    dict(num_kvcache_blocks=14, max_model_len=48, max_num_batched_tokens=8, look_ahead=True)],
    ids=["plain", "preempted", "chunks", "looking ahead", "all of it"])
def test_greedy_rows_with_penalties(settings, penalised_model):
    folder, prompts, wishes, tokens = penalised_model
    if settings.get("look_ahead"):
        pytest.importorskip("nanovllm.gpu")
    got, stats = answers(folder, prompts, wishes, **settings)
    assert got == tokens
    assert (stats.preemptions > 0) == (settings["num_kvcache_blocks"] == 14)


@pytest.mark.processes
@pytest.mark.slow
def test_on_two_ranks(penalised_model):
    folder, prompts, wishes, tokens = penalised_model
    got, _ = answers(folder, prompts, wishes, num_kvcache_blocks=14, max_model_len=48,
                     max_num_batched_tokens=8, tensor_parallel_size=2)
    assert got == tokens


def test_log_probabilities_are_the_models_own(penalised_model):
    folder, prompts, *_ = penalised_model
    with LLM(folder, device="cpu", num_kvcache_blocks=64) as llm:
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=3)
        plain, = llm.generate(prompts[:1], params, use_tqdm=False)
        [best] = plain["token_ids"]
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=3, logit_bias={best: -100})
        other, = llm.generate(prompts[:1], params, use_tqdm=False)
    assert other["token_ids"] != plain["token_ids"]
    assert other["logprobs"][0][best] == plain["logprobs"][0][best]


def test_random_rows_with_min_p_draw_among_the_likely(penalised_model):
    folder, prompts, *_ = penalised_model
    params = [SamplingParams(seed=i, temperature=2.0, min_p=.3, max_tokens=1, logprobs=VOCAB)
              for i in range(40)]
    with LLM(folder, device="cpu", num_kvcache_blocks=256) as llm:
        outs = llm.generate(prompts[1:2] * 40, params, use_tqdm=False)
    entry, drawn = outs[0]["logprobs"][0], {out["token_ids"][0] for out in outs}
    best = max(entry.values())
    likely = {t for t, p in entry.items() if (p - best) / 2.0 > torch.tensor(.3).log()}
    assert drawn <= likely and (len(drawn) > 1 or len(likely) == 1)


def test_one_that_raises_ends_alone(penalised_model):
    folder, prompts, wishes, tokens = penalised_model

    def broken(completion, row):
        if len(completion) == 5:
            raise KeyError("no such word")
        return row

    params = [SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, **w) for w in wishes]
    with LLM(folder, device="cpu", num_kvcache_blocks=128, check_books=True) as llm:
        outs = llm.generate([*prompts, [1, 2, 3]], [*params, SamplingParams(
            logits_processors=broken, ignore_eos=True)], use_tqdm=False)
        assert [out["token_ids"] for out in outs[:-1]] == tokens
        assert outs[-1]["finish_reason"] == "error" and len(outs[-1]["token_ids"]) == 5
        assert outs[-1]["error"] == "KeyError: 'no such word'"
        assert llm.block_manager.num_used_blocks == 0


@pytest.mark.processes
def test_who_asks_for_nothing_never_meets_the_module():
    """Days 1 to 6 do without it."""
    code = ("import sys; from nanovllm import LLM, SamplingParams; "
            "params = SamplingParams(max_tokens=3, stop_token_ids=[5], n=2); "
            "LLM(num_kvcache_blocks=9).generate(['a'], params, use_tqdm=False); "
            "print('nanovllm.layers.processors' in sys.modules)")
    assert run_python("-c", code).stdout.split()[-1] == "False"


def test_a_long_random_run_of_all_kinds(penalised_model):
    """Rows that ask and rows that do not, in one pool: a seed gives what it gives alone."""
    folder, *_ = penalised_model
    rng = random.Random(5)
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 20))] for _ in range(10)]
    params = [SamplingParams(seed=i, max_tokens=8, ignore_eos=True, temperature=rng.choice([0, 1]),
                             **rng.choice([{}, PENALTIES, dict(min_p=.2, top_k=9),
                                           dict(logit_bias={4: 9, 7: -9})])) for i in range(10)]
    with LLM(folder, device="cpu", num_kvcache_blocks=16, kvcache_block_size=4,
             max_num_batched_tokens=16, max_model_len=48) as llm:
        together = llm.generate(prompts, params, use_tqdm=False)
        for prompt, one, out in zip(prompts, params, together):
            alone, = llm.generate([prompt], one, use_tqdm=False)
            assert alone["token_ids"] == out["token_ids"], one
