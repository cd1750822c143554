"""Log-probabilities of answers and prompts, and statistics."""

import pytest
import torch
from fixtures import hf_generate, make_checkpoint, random_prompts

from nanovllm import LLM, SamplingParams
from nanovllm.engine import llm_engine, outputs
from nanovllm.engine.outputs import EngineStats, Request
from nanovllm.engine.scheduler import ScheduledRow
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.text import Detokenizer
from tests.parity import finish

NEW = 10
GREEDY = SamplingParams(temperature=0, max_tokens=NEW)
BOTH = SamplingParams(temperature=0, max_tokens=NEW, logprobs=2, prompt_logprobs=2)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A checkpoint, its model, and prompts with a beginning in common."""
    folder, model = make_checkpoint(folder=tmp_path_factory.mktemp("three"))
    first, second = random_prompts([29, 16])
    return folder, model, [first, first[:20] + second, second[:1]]


def check(out, model, k=2):
    """An output's log-probabilities are those of transformers, of the right tokens."""
    tokens = out["prompt_token_ids"] + out["token_ids"]
    with torch.inference_mode():
        right = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    entries = out["prompt_logprobs"] + out["logprobs"]
    assert entries[0] is None and len(entries) == len(tokens)
    for row, token, entry in zip(right, tokens[1:], entries[1:]):
        best = row.topk(k).indices.tolist()
        assert list(entry) == [token, *(i for i in best if i != token)]
        for i, value in entry.items():
            assert abs(row[i].item() - value) < 1e-4


@pytest.mark.parametrize("settings", [
    dict(), dict(max_num_batched_tokens=1), dict(max_num_batched_tokens=7), dict(max_num_seqs=1),
    dict(num_kvcache_blocks=18), dict(num_kvcache_blocks=18, max_num_batched_tokens=7)], ids=str)
def test_prompts_and_answers(settings, three):
    folder, model, prompts = three
    with LLM(folder, **{"kvcache_block_size": 4, "num_kvcache_blocks": 64, **settings}) as llm:
        llm.generate(prompts, GREEDY, use_tqdm=False)  # now the prompts are cached
        cached = llm.stats.cached_tokens
        for out, prompt in zip(llm.generate(prompts, BOTH, use_tqdm=False), prompts):
            check(out, model)
            assert out["token_ids"] == hf_generate(model, prompt, NEW)
            assert out["num_cached_tokens"] == 0
        assert llm.stats.cached_tokens == cached
        assert llm.stats.preemptions > 0 or settings.get("num_kvcache_blocks") != 18


def test_they_are_those_of_the_model_and_not_of_the_sampler(three):
    folder, model, prompts = three
    wild = SamplingParams(temperature=3.0, top_k=20, top_p=0.9, seed=1, max_tokens=NEW, logprobs=2,
                          prompt_logprobs=2)
    with LLM(folder, num_kvcache_blocks=64) as llm:
        outs = llm.generate(prompts * 2, [wild] * 3 + [GREEDY] * 3, use_tqdm=False)
    for out in outs[:3]:
        check(out, model)
    assert all(out["logprobs"] is out["prompt_logprobs"] is None for out in outs[3:])
    assert outs[0]["token_ids"] != outs[3]["token_ids"]


def test_how_many(three):
    folder, _, prompts = three
    with LLM(folder, num_kvcache_blocks=64) as llm:
        def ask(**wish):
            params = SamplingParams(temperature=0, max_tokens=2, **wish)
            return llm.generate(prompts[:1], params, use_tqdm=False)[0]
        assert [len(e) for e in ask(logprobs=0)["logprobs"]] == [1, 1]
        assert [len(e) for e in ask(logprobs=10**6)["logprobs"]] == [151, 151]
        assert ask(logprobs=1)["prompt_logprobs"] is None
        assert len(ask(prompt_logprobs=0)["prompt_logprobs"]) == len(prompts[0])
        assert ask(prompt_logprobs=0)["logprobs"] is None


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_not_a_whole_vocabulary(name, demo):
    """Of the 1,024 tokens of the demo model's; a prompt of thousands would need gigabytes."""
    for k in (257, 10**6):
        with pytest.raises(ValueError, match=f"{name}={k} is more than 256"):
            demo.add_request("a", SamplingParams(**{name: k}))
    out, = demo.generate("a", SamplingParams(max_tokens=1, logprobs=256), use_tqdm=False)
    assert len(out["logprobs"][0]) in (256, 257)


def test_who_does_not_ask_does_not_pay(three, monkeypatch):
    folder, _, prompts = three
    monkeypatch.setattr(outputs, "top_logprobs", lambda *args: 1 / 0)
    with LLM(folder, num_kvcache_blocks=64) as llm:
        outs = llm.generate(prompts, BOTH, use_tqdm=False)
        assert all(out["error"].startswith("ZeroDivisionError") for out in outs)
        monkeypatch.setattr(llm_engine, "score", lambda *args: 1 / 0)
        llm.generate(prompts, GREEDY, use_tqdm=False)  # the failed ones are forgotten


@pytest.mark.parametrize("at", [1, 2, 3, 6])
def test_a_failing_step_leaves_them_in_order(at, three, monkeypatch):
    """The step fails after the log-probabilities were written down: they are written again."""
    folder, model, prompts = three
    with LLM(folder, num_kvcache_blocks=64, max_num_batched_tokens=20) as llm:
        score, calls = llm_engine.score, []

        def fail(*args):
            score(*args)
            calls.append(args)
            if len(calls) == at:
                raise KeyboardInterrupt

        monkeypatch.setattr(llm_engine, "score", fail)
        for prompt in prompts:
            llm.add_request(prompt, BOTH)
        outs = []
        while not llm.is_finished():
            try:
                outs += [step.output for step in llm.step() if step.output]
            except KeyboardInterrupt:
                pass
        assert len(outs) == 3 and len(calls) > at
        for out in outs:
            check(out, model)


def test_step_by_step(three):
    folder, _, prompts = three
    with LLM(folder, num_kvcache_blocks=64) as llm:
        llm.add_request(prompts[0], BOTH)
        llm.add_request(prompts[1], GREEDY)
        seen = {}
        while not llm.is_finished():
            for step in llm.step():
                seen.setdefault(step.request_id, []).append(step.logprobs)
                last = step.output or {}
                if last.get("logprobs"):
                    assert last["logprobs"] == seen[step.request_id]
        assert sorted(map(len, seen.values())) == [NEW, NEW]
        assert [steps for steps in seen.values() if steps == [None] * NEW]


def test_aborted_in_the_middle_of_the_prompt(three):
    folder, _, prompts = three
    with LLM(folder, num_kvcache_blocks=64, max_num_batched_tokens=10) as llm:
        request_id = llm.add_request(prompts[0], BOTH)
        llm.step()
        out = llm.abort(request_id)
        assert [entry is None for entry in out["prompt_logprobs"]] == (
            [True] + [False] * 10 + [True] * 18)
        assert out["logprobs"] == [] and llm._num_scored == 0


@pytest.mark.processes
@pytest.mark.slow
def test_on_two_ranks(three):
    folder, model, prompts = three
    with LLM(folder, num_kvcache_blocks=64, tensor_parallel_size=2, device="cpu",
             max_num_batched_tokens=20) as llm:
        for out in llm.generate(prompts, BOTH, use_tqdm=False):
            check(out, model)


def row(new, samples):
    return ScheduledRow(Sequence([1, 2, 3]), new, samples)


def test_steps_are_counted_by_their_kind():
    """With one prefill row a step is a prefill step."""
    stats = EngineStats()
    assert stats.prefill_throughput == stats.decode_throughput == 0
    stats.count([row(1, True), row(3, False)], used_blocks=5, seconds=2.0)
    stats.count([row(1, True), row(1, True)], used_blocks=4, seconds=0.5)
    assert (stats.steps, stats.computed_tokens, stats.generated_tokens) == (2, 6, 3)
    assert (stats.prefill_tokens, stats.decode_tokens, stats.peak_blocks) == (4, 2, 5)
    assert (stats.prefill_throughput, stats.decode_throughput) == (2.0, 4.0)


def test_the_output_of_a_request():
    seq = Sequence([4, 5], SamplingParams(max_tokens=1, logprobs=0))
    request = Request(seq, Detokenizer(None), is_private=True)
    assert request.is_scored and request.logprobs == [] and request.prompt_logprobs is None
    seq.append_token(6)
    seq.finish("length")
    output = request.conclude()
    assert output is request.output and output["request_id"] == seq.seq_id
    assert (output["prompt_token_ids"], output["token_ids"]) == ([4, 5], [6])
    assert output["finish_reason"] == "length" and output["text"] == ""


def test_requests_reported_by_step_and_by_generate(three):
    """step() says nothing of what generate() asked."""
    folder, _, prompts = three
    with LLM(folder, num_kvcache_blocks=64) as llm:
        mine = llm.add_request(prompts[0], GREEDY)
        llm.generate(prompts[1:2], GREEDY, use_tqdm=False)
        assert set(finish(llm)) == {mine}
