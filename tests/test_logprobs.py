"""Log-probabilities of answers and prompts, chat, and a checkpoint's own sampling defaults."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from fixtures import DEMO_MODEL, hf_generate, make_checkpoint, random_prompts

import nanovllm.engine.llm_engine as llm_engine
from nanovllm import LLM, SamplingParams

NEW = 10
GREEDY = SamplingParams(temperature=0, max_tokens=NEW)
BOTH = SamplingParams(temperature=0, max_tokens=NEW, logprobs=2, prompt_logprobs=2)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A checkpoint, its model, and prompts with a beginning in common."""
    folder, model = make_checkpoint(folder=tmp_path_factory.mktemp("good"))
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
def test_prompts_and_answers(settings, good):
    folder, model, prompts = good
    with LLM(folder, **{"kvcache_block_size": 4, "num_kvcache_blocks": 64, **settings}) as llm:
        llm.generate(prompts, GREEDY, use_tqdm=False)  # now the prompts are cached
        cached = llm.stats.cached_tokens
        for out, prompt in zip(llm.generate(prompts, BOTH, use_tqdm=False), prompts):
            check(out, model)
            assert out["token_ids"] == hf_generate(model, prompt, NEW)
            assert out["num_cached_tokens"] == 0
        assert llm.stats.cached_tokens == cached
        assert llm.stats.preemptions > 0 or settings.get("num_kvcache_blocks") != 18


def test_they_are_those_of_the_model_and_not_of_the_sampler(good):
    folder, model, prompts = good
    wild = SamplingParams(temperature=3.0, top_k=20, top_p=0.9, seed=1, max_tokens=NEW, logprobs=2,
                          prompt_logprobs=2)
    with LLM(folder, num_kvcache_blocks=64) as llm:
        outs = llm.generate(prompts * 2, [wild] * 3 + [GREEDY] * 3, use_tqdm=False)
    for out in outs[:3]:
        check(out, model)
    assert all(out["logprobs"] is out["prompt_logprobs"] is None for out in outs[3:])
    assert outs[0]["token_ids"] != outs[3]["token_ids"]


def test_how_many(good):
    folder, _, prompts = good
    with LLM(folder, num_kvcache_blocks=64) as llm:
        def ask(**wish):
            params = SamplingParams(temperature=0, max_tokens=2, **wish)
            return llm.generate(prompts[:1], params, use_tqdm=False)[0]
        assert [len(e) for e in ask(logprobs=0)["logprobs"]] == [1, 1]
        assert [len(e) for e in ask(logprobs=10**6)["logprobs"]] == [151, 151]
        assert ask(logprobs=1)["prompt_logprobs"] is None
        assert len(ask(prompt_logprobs=0)["prompt_logprobs"]) == len(prompts[0])
        assert ask(prompt_logprobs=0)["logprobs"] is None


def test_who_does_not_ask_does_not_pay(good, monkeypatch):
    folder, _, prompts = good
    monkeypatch.setattr(llm_engine, "top_logprobs", lambda *args: 1 / 0)
    with LLM(folder, num_kvcache_blocks=64) as llm:
        with pytest.raises(ZeroDivisionError):
            llm.generate(prompts, BOTH, use_tqdm=False)
        monkeypatch.setattr(llm, "_score", lambda *args: 1 / 0)
        llm.generate(prompts, GREEDY, use_tqdm=False)  # the failed ones are forgotten


@pytest.mark.parametrize("at", [1, 2, 3, 6])
def test_a_failing_step_leaves_them_in_order(at, good, monkeypatch):
    """The step fails after the log-probabilities were written down: they are written again."""
    folder, model, prompts = good
    with LLM(folder, num_kvcache_blocks=64, max_num_batched_tokens=20) as llm:
        score, calls = llm._score, []

        def fail(*args):
            score(*args)
            calls.append(args)
            if len(calls) == at:
                raise KeyboardInterrupt

        monkeypatch.setattr(llm, "_score", fail)
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


def test_step_by_step(good):
    folder, _, prompts = good
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


def test_aborted_in_the_middle_of_the_prompt(good):
    folder, _, prompts = good
    with LLM(folder, num_kvcache_blocks=64, max_num_batched_tokens=10) as llm:
        request_id = llm.add_request(prompts[0], BOTH)
        llm.step()
        out = llm.abort(request_id)
        assert [entry is None for entry in out["prompt_logprobs"]] == (
            [True] + [False] * 10 + [True] * 18)
        assert out["logprobs"] == [] and llm._num_scored == 0


def test_on_two_ranks(good):
    folder, model, prompts = good
    with LLM(folder, num_kvcache_blocks=64, tensor_parallel_size=2, device="cpu",
             max_num_batched_tokens=20) as llm:
        for out in llm.generate(prompts, BOTH, use_tqdm=False):
            check(out, model)


@pytest.fixture(scope="module")
def demo():
    with LLM(num_kvcache_blocks=128) as llm:
        yield llm


def test_chat(demo):
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    system = {"role": "system", "content": "Be brief."}
    user = {"role": "user", "content": "What is RoPE?"}
    for messages in ([user], [system, user]):
        out, = demo.chat(messages, GREEDY, use_tqdm=False)
        assert out["prompt_token_ids"] == tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False)
    one, two = demo.chat([[user], [system, user]], [GREEDY, BOTH], use_tqdm=False)
    assert two["token_ids"] == out["token_ids"] and one["logprobs"] is None
    assert "<|" not in one["text"] and demo.chat([], GREEDY, use_tqdm=False) == []


def test_the_beginning_of_sequence_comes_once(tmp_path):
    """A tokenizer that puts it in front, as Llama's, and a template that does, too."""
    folder = Path(shutil.copytree(DEMO_MODEL, tmp_path / "model"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    name, number = (tokenizer["added_tokens"][0][key] for key in ("content", "id"))
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": name, "type_id": 0}},
                   {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]}}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": name}))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    with LLM(folder, num_kvcache_blocks=32) as llm:
        messages = [{"role": "user", "content": "What is RoPE?"}]
        outs = llm.chat(messages, GREEDY, use_tqdm=False)
        outs += llm.generate(["What is RoPE?", name + "What is RoPE?"], GREEDY, use_tqdm=False)
        body = llm.tokenizer.encode("What is RoPE?", add_special_tokens=False)
    assert [out["prompt_token_ids"] for out in outs] == [[number, *body]] * 3


@pytest.mark.parametrize("messages, error, complaint", [
    ("What is RoPE?", TypeError, "messages must be a list"), (None, TypeError, "messages must be"),
    ([{"role": "user"}], ValueError, "chat template refuses"),
    (["hello"], ValueError, "chat template refuses")])
def test_bad_messages(messages, error, complaint, demo):
    with pytest.raises(error, match=complaint):
        demo.chat(messages, GREEDY)
    assert demo.is_finished()


def test_no_chat_template(good):
    with LLM(good[0], num_kvcache_blocks=8) as llm, pytest.raises(ValueError, match="no chat temp"):
        llm.chat([{"role": "user", "content": "hello"}])


@pytest.mark.parametrize("content, expected", [
    (None, SamplingParams()),
    ({}, SamplingParams(temperature=0)),
    ({"temperature": 0.6, "top_p": 0.9}, SamplingParams(temperature=0, top_p=0.9)),
    ({"do_sample": True}, SamplingParams()),
    ({"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "max_new_tokens": 9},
     SamplingParams(temperature=0.6, top_k=20, top_p=0.95, max_tokens=9)),
    ({"do_sample": True, "top_k": None, "eos_token_id": [1, 2]}, SamplingParams())], ids=str)
def test_sampling_defaults(content, expected, tmp_path):
    folder, _ = make_checkpoint(folder=tmp_path)
    file = folder / "generation_config.json"
    file.unlink() if content is None else file.write_text(json.dumps(content))
    with LLM(folder, num_kvcache_blocks=8) as llm:
        assert llm.default_sampling_params() == expected
        assert llm.default_sampling_params(top_k=3, seed=1).top_k == 3


def test_a_penalty_that_is_not_obeyed_is_named(tmp_path, caplog):
    folder, _ = make_checkpoint(folder=tmp_path)
    (folder / "generation_config.json").write_text('{"repetition_penalty": 1.1}')
    with LLM(folder, num_kvcache_blocks=8) as llm:
        llm.default_sampling_params()
    assert "repetition_penalty cannot be obeyed" in caplog.text
