"""LLM: greedy output in fp32 is that of Hugging Face, whatever the settings; chat and streams."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from fixtures import DEMO_MODEL, hf_generate

from nanovllm import LLM, SamplingParams
from tests.parity import BLOCK_SIZES, LONG, SHAPES, check, tight, tokens_of

COURSE = json.loads(
    (Path(__file__).parents[1] / "tools" / "course_qa.json").read_text(encoding="utf-8"))
GREEDY = SamplingParams(temperature=0, max_tokens=10)
SMALL = dict(num_kvcache_blocks=8, kvcache_block_size=4, max_model_len=40)


# -----------------------------------------------------------------------------------------------
# The same tokens as transformers
# -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", SHAPES)
def test_the_checkpoint_would_show_a_bug(name, reference):
    """One that repeats a token gives the right tokens whatever is broken."""
    ref = reference(name)
    right = hf_generate(ref.model, ref.prompts[LONG], 64)
    assert len(set(right)) >= 15
    with LLM(ref.folder, num_kvcache_blocks=32) as llm:
        assert tokens_of(llm, [ref.prompts[LONG]], 64) == [right]


@pytest.mark.parametrize("caching", [True, pytest.param(False, marks=pytest.mark.slow)],
                         ids=["caching", "no-caching"])
@pytest.mark.parametrize("chunk", [pytest.param(1, marks=pytest.mark.slow), 7, "bs", "bs+1", None])
@pytest.mark.parametrize("bs", BLOCK_SIZES)
def test_every_setting_gives_the_same_tokens(bs, chunk, caching, reference):
    ref = reference("qwen3")
    settings = dict(enable_prefix_caching=caching, max_num_batched_tokens={
        "bs": bs, "bs+1": bs + 1, None: 16384}.get(chunk, chunk))
    stats, cached = check(ref, bs, num_kvcache_blocks=512, **settings)
    assert stats.preemptions == 0
    # all full blocks come from the cache, but the last token is always computed
    assert cached == {n: (n - 1) // bs * bs * caching for n in cached}
    stats, _ = check(ref, bs, num_kvcache_blocks=tight(bs), **settings)
    if chunk is None:
        assert stats.preemptions > 0


@pytest.mark.parametrize("bs, chunk", [
    pytest.param(1, 16384, marks=pytest.mark.slow), (4, 7), (5, 16384),
    pytest.param(16, 17, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "qwen3"])
def test_every_shape_gives_the_same_tokens(name, bs, chunk, reference):
    stats, _ = check(reference(name), bs, num_kvcache_blocks=tight(bs),
                     max_num_batched_tokens=chunk)
    assert stats.preemptions > 0 or chunk < 16384


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 100])
def test_batch_size_does_not_matter(max_num_seqs, reference):
    check(reference("qwen3"), 4, num_kvcache_blocks=256, max_num_seqs=max_num_seqs)


@pytest.fixture(scope="module")
def answers():
    """Prompts for the demo model, and what transformers answers: ids and text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype="float32")
    questions = ["What is PagedAttention?", "What is the capital of France?",
                 "What does the scheduler do?", "What is a KV cache?"]
    prompts = [tokenizer.apply_chat_template(
        [{"role": "system", "content": COURSE["system_prompt"]},
         {"role": "user", "content": question}], tokenize=False, add_generation_prompt=True)
        for question in questions] + ["What is prefill?"]
    tokens = [hf_generate(model, tokenizer.encode(prompt), 64) for prompt in prompts]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens]
    return prompts, tokens, texts


@pytest.mark.parametrize("settings", [
    dict(), dict(kvcache_block_size=4, max_num_batched_tokens=7, num_kvcache_blocks=100),
    dict(kvcache_block_size=16, num_kvcache_blocks=14)], ids=["default", "chunks", "preempted"])
def test_demo_model_answers_like_transformers(settings, answers):
    prompts, tokens, texts = answers
    with LLM(**{"num_kvcache_blocks": 256, **settings}) as llm:
        outs = llm.generate(prompts, SamplingParams(temperature=0), use_tqdm=False)
        assert [out["token_ids"] for out in outs] == tokens
        assert [out["text"] for out in outs] == texts
        assert llm.stats.preemptions > 0 or settings.get("num_kvcache_blocks") != 14


# -----------------------------------------------------------------------------------------------
# Calls
# -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prompts, params, error, complaint", [
    ([[1]], [GREEDY] * 2, ValueError, "got 2 for 1.*one for each"),
    ([[1], [2]], [GREEDY], ValueError, "got 1 for 2.*one for each"),
    ([[1]], {"temperature": 0}, TypeError, "sampling_params must be"),
    ([[1]], 0.5, TypeError, "sampling_params must be"),
    ([[1]], [{"temperature": 0}], TypeError, "must be SamplingParams"),
    ([1, 2], GREEDY, TypeError, "bare token id"),
    (None, GREEDY, TypeError, "prompts must be"), (5, GREEDY, TypeError, "prompts must be")])
def test_bad_call(prompts, params, error, complaint, good):
    with LLM(good[0], **SMALL) as llm:
        with pytest.raises(error, match=complaint):
            llm.generate(prompts, params, use_tqdm=False)
        assert llm.is_finished() and llm.block_manager.num_used_blocks == 0
        assert tokens_of(llm, [good[1]], 8) == [good[2]]


def test_empty_text():
    with LLM(num_kvcache_blocks=8) as llm, pytest.raises(ValueError, match="prompt is empty"):
        llm.generate("")


def test_outputs_come_in_the_order_of_the_prompts(good):
    """Each with parameters of its own."""
    folder, prompt, right = good
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (5, 1, 3)]
    with LLM(folder, **SMALL) as llm:
        outs = llm.generate([prompt] * 3, params, use_tqdm=False)
        assert [out["token_ids"] for out in outs] == [right[:5], right[:1], right[:3]]
        assert llm.generate([], use_tqdm=False) == []


def test_what_is_no_model():
    with pytest.raises(TypeError, match="model must be"):
        LLM(5)


# -----------------------------------------------------------------------------------------------
# Streams
# -----------------------------------------------------------------------------------------------

def test_a_stream_adds_up_to_the_text(demo):
    """While another request moves on with it."""
    whole = demo.generate("What is prefill?", GREEDY, use_tqdm=False)[0]["text"]
    other = demo.add_request("What is RoPE?", GREEDY)
    parts = list(demo.stream("What is prefill?", GREEDY))
    assert "".join(parts) == whole and len(parts) > 3
    assert [step.request_id for step in demo.step() if step.output] == [other]


def test_stream_closed_early(demo):
    stream = demo.stream("What is prefill?", SamplingParams(temperature=0))
    assert next(stream)
    stream.close()
    assert demo.is_finished()
    assert demo.block_manager.num_free_blocks == demo.block_manager.num_blocks


def test_a_stream_of_no_text(good):
    with LLM(good[0], **SMALL) as llm, pytest.raises(ValueError, match="no tokenizer.*generate"):
        llm.stream([1, 2])


# -----------------------------------------------------------------------------------------------
# Conversations
# -----------------------------------------------------------------------------------------------

def test_chat(demo):
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    system = {"role": "system", "content": "Be brief."}
    user = {"role": "user", "content": "What is RoPE?"}
    for messages in ([user], [system, user]):
        out, = demo.chat(messages, GREEDY, use_tqdm=False)
        assert out["prompt_token_ids"] == tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False)
    scored = SamplingParams(temperature=0, max_tokens=10, logprobs=2, prompt_logprobs=2)
    one, two = demo.chat([[user], [system, user]], [GREEDY, scored], use_tqdm=False)
    assert two["token_ids"] == out["token_ids"] and one["logprobs"] is None
    assert "<|" not in one["text"] and demo.chat([], GREEDY, use_tqdm=False) == []


@pytest.mark.parametrize("messages, error, complaint", [
    ("What is RoPE?", TypeError, "messages must be a list"), (None, TypeError, "messages must be"),
    ([{"role": "user"}], ValueError, "chat template refuses"),
    (["hello"], TypeError, "a conversation must be a list"), ([None], TypeError, "got NoneType")])
def test_bad_messages(messages, error, complaint, demo):
    with pytest.raises(error, match=complaint):
        demo.chat(messages, GREEDY)
    assert demo.is_finished()


def test_no_chat_template(good):
    with LLM(good[0], **SMALL) as llm, pytest.raises(ValueError, match="no chat temp"):
        llm.chat([{"role": "user", "content": "hello"}])


# -----------------------------------------------------------------------------------------------
# A checkpoint's own sampling defaults
# -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("content, expected", [
    (None, SamplingParams()),
    ({}, SamplingParams(temperature=0)),
    ({"temperature": 0.6, "top_p": 0.9}, SamplingParams(temperature=0, top_p=0.9)),
    ({"do_sample": True}, SamplingParams()),
    ({"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "max_new_tokens": 9},
     SamplingParams(temperature=0.6, top_k=20, top_p=0.95, max_tokens=9)),
    ({"do_sample": True, "top_k": None, "eos_token_id": [1, 2]}, SamplingParams())], ids=str)
def test_sampling_defaults(content, expected, checkpoint):
    file = checkpoint / "generation_config.json"
    file.unlink() if content is None else file.write_text(json.dumps(content))
    with LLM(checkpoint, num_kvcache_blocks=8) as llm:
        assert llm.default_sampling_params() == expected
        assert llm.default_sampling_params(top_k=3, seed=1).top_k == 3


def test_what_is_not_obeyed_is_named(checkpoint, caplog):
    wishes = '{"repetition_penalty": 1.1, "length_penalty": 2.0}'
    (checkpoint / "generation_config.json").write_text(wishes)
    with LLM(checkpoint, num_kvcache_blocks=8) as llm:
        assert llm.get_default_sampling_params().repetition_penalty == 1.1
    assert "length_penalty cannot be obeyed" in caplog.text


# -----------------------------------------------------------------------------------------------
# What users of vLLM expect
# -----------------------------------------------------------------------------------------------

def test_several_completions_of_a_prompt(good):
    folder, prompt, _ = good
    params = SamplingParams(n=3, seed=5, max_tokens=6, ignore_eos=True)
    alone = [SamplingParams(seed=5 + i, max_tokens=6, ignore_eos=True) for i in range(3)]
    with LLM(folder, num_kvcache_blocks=32, kvcache_block_size=4, max_model_len=40) as llm:
        three, one = llm.generate([prompt, prompt], [params, GREEDY], use_tqdm=False)
        want = llm.generate([prompt] * 3, alone, use_tqdm=False)
        assert [out["token_ids"] for out in three["outputs"]] == [out["token_ids"] for out in want]
        assert len({tuple(out["token_ids"]) for out in want}) > 1
        assert {**three, "outputs": None} == {**three["outputs"][0], "outputs": None}
        assert "outputs" not in one and json.dumps(three)
        for call in (llm.add_request, llm.stream):
            with pytest.raises(ValueError, match="^n=3 is for `generate`"):
                call(prompt, params)
        assert llm.is_finished()


def test_no_limit_but_the_models(good):
    folder, prompt, _ = good
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    with LLM(folder, **SMALL) as llm:
        out, = llm.generate([prompt], params, use_tqdm=False)
    blocks_hold = SMALL["num_kvcache_blocks"] * SMALL["kvcache_block_size"] + 1
    assert len(prompt) + len(out["token_ids"]) == min(SMALL["max_model_len"], blocks_hold)
    assert out["finish_reason"] == "length"


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_token_that_ends_it(ignore_eos, demo):
    """It is the last of the token ids, and no text, as the end of sequence is."""
    question = [{"role": "user", "content": "What is PagedAttention?"}]
    whole, = demo.chat(question, SamplingParams(temperature=0), use_tqdm=False)
    params = SamplingParams(temperature=0, stop_token_ids=whole["token_ids"][5:9],
                            ignore_eos=ignore_eos)
    out, = demo.chat(question, params, use_tqdm=False)
    assert (out["token_ids"], out["finish_reason"]) == (whole["token_ids"][:6], "stop")
    assert out["text"] == demo.tokenizer.decode(whole["token_ids"][:5])
    assert "".join(demo.stream(question, params)) == out["text"]


def test_not_before_min_tokens(demo):
    question = [{"role": "user", "content": "What is PagedAttention?"}]
    whole, = demo.chat(question, SamplingParams(temperature=0, max_tokens=99), use_tqdm=False)
    n = len(whole["token_ids"])                      # the last of them is the end of sequence
    assert whole["finish_reason"] == "stop" and n < 90
    for least in (n - 1, n, n + 5):
        out, = demo.chat(question, SamplingParams(temperature=0, max_tokens=n + 20,
                                                  min_tokens=least), use_tqdm=False)
        assert (out["token_ids"] == whole["token_ids"]) == (least < n)
        assert len(out["token_ids"]) > least


def test_special_tokens_in_the_text(demo):
    end = demo.tokenizer.eos_token
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True,
                            logit_bias={demo.tokenizer.eos_token_id: 100})
    out, = demo.generate("a", params, use_tqdm=False)
    assert out["text"] == ""
    out, = demo.generate("a", replace(params, skip_special_tokens=False), use_tqdm=False)
    assert out["text"] == end * 12
    params = replace(params, skip_special_tokens=False, stop=end * 2, min_tokens=3)
    out, = demo.generate("a", params, use_tqdm=False)
    assert (out["text"], out["finish_reason"], len(out["token_ids"])) == (end * 3, "stop", 5)


def test_a_stream_of_messages(demo):
    say = [{"role": "user", "content": "What is a block table?"}]
    out, = demo.chat(say, GREEDY, use_tqdm=False)
    assert "".join(demo.stream(say, GREEDY)) == out["text"] != ""
    begun = [*say, {"role": "assistant", "content": "A block table"}]
    kwargs = {"continue_final_message": True}
    out, = demo.chat(begun, GREEDY, use_tqdm=False, chat_template_kwargs=kwargs)
    assert "".join(demo.stream(begun, GREEDY, kwargs)) == out["text"]


def test_vllms_names(demo):
    assert demo.get_tokenizer() is demo.tokenizer
    assert demo.get_default_sampling_params() == demo.default_sampling_params()
