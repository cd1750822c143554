"""Conversations: begun answers, content in parts, templates that loop."""

import logging
import time

import pytest
from fixtures import DEMO_MODEL

from nanovllm import LLM, SamplingParams
from nanovllm.engine import chat
from nanovllm.engine.chat import chat_settings, no_endless_template, with_plain_content

ONE = SamplingParams(temperature=0, max_tokens=1)
BEGUN = [{"role": "user", "content": "What is RoPE?"},
         {"role": "assistant", "content": "RoPE rotates"}]


def prompt_of(llm, messages, **kwargs):
    out, = llm.chat(messages, ONE, use_tqdm=False, chat_template_kwargs=kwargs)
    return llm.tokenizer.decode(out["prompt_token_ids"])


def test_an_answer_that_was_begun_goes_on(demo):
    assert prompt_of(demo, BEGUN, continue_final_message=True).endswith("RoPE rotates")
    whole = demo.chat(BEGUN[:1], SamplingParams(temperature=0, max_tokens=20), use_tqdm=False)[0]
    begun = BEGUN[:1] + [{"role": "assistant", "content": whole["text"][:12]}]
    out, = demo.chat(begun, SamplingParams(temperature=0, max_tokens=20), use_tqdm=False,
                     chat_template_kwargs={"continue_final_message": True})
    text = whole["text"][:12] + out["text"]
    assert text.startswith(whole["text"][:25])


def test_the_caller_may_say_that_no_answer_is_opened(demo):
    closed = prompt_of(demo, BEGUN, add_generation_prompt=False)
    assert prompt_of(demo, BEGUN).startswith(closed) and closed != prompt_of(demo, BEGUN)


def test_a_model_for_chats_that_gets_bare_text_says_so_once(demo, caplog):
    def hints(ask, *prompts):
        caplog.clear()
        for prompt in prompts:
            ask(prompt)
        return [record.levelname for record in caplog.records if "llm.chat" in record.message]

    def generate(prompt):
        return demo.generate(prompt, ONE, use_tqdm=False)

    marked = "<|im_start|>user\nWhat is RoPE?<|im_end|>\n<|im_start|>assistant\n"
    demo.chat(BEGUN[:1], ONE, use_tqdm=False)
    assert not hints(generate, [[5, 6]], marked, "\n" + marked, [marked, [5]])
    with pytest.raises(ValueError):
        hints(generate, ["What is RoPE?", ""])
    assert not caplog.records                     # nothing was asked
    assert hints(generate, [[5], marked, "What is RoPE?"], "What is RoPE?") == ["WARNING"]
    assert not hints(lambda prompt: list(demo.stream(prompt, ONE)), "What is RoPE?")
    demo._hinted = False
    assert hints(lambda prompt: list(demo.stream(prompt, ONE)), "What is RoPE?") == ["WARNING"]


def test_a_model_without_a_template_is_asked_in_text(demo, caplog):
    demo.tokenizer.chat_template = None
    demo.generate("What is RoPE?", ONE, use_tqdm=False)
    assert not caplog.records


@pytest.mark.parametrize("kwargs, error", [
    ({"tokenize": False}, ValueError), ({"return_dict": True}, ValueError), (["a"], TypeError),
    # these change the tokenizer, and with it the prompts of other threads
    ({"truncation": True, "max_length": 3}, ValueError), ({"padding": True}, ValueError),
    ({"tokenizer_kwargs": {"truncation": True}}, ValueError)])
def test_arguments_that_are_not_the_templates(kwargs, error):
    with pytest.raises(error, match="^chat_template_kwargs"):
        chat_settings(kwargs)


def test_content_in_parts_is_text(demo):
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": "RoPE?"}]
    [message] = with_plain_content([{"role": "user", "content": parts, "name": "a"}])
    assert message == {"role": "user", "content": "What is\nRoPE?", "name": "a"}
    listed = [{"role": "user", "content": [{"type": "text", "text": "What is RoPE?"}]}]
    assert prompt_of(demo, listed) == prompt_of(demo, BEGUN[:1])
    plain = [BEGUN[0], "no message"]
    assert with_plain_content(plain) == plain
    called = {"role": "assistant", "content": None, "tool_calls": []}     # as OpenAI's clients say
    assert with_plain_content([called]) == [{**called, "content": ""}]
    with pytest.raises(TypeError, match="^messages: a conversation must be a list"):
        demo.chat([None], ONE)


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {"url": "x"}}, 5, {},
                                  {"type": "text", "text": None}])
def test_parts_that_are_no_text_are_refused(part, demo):
    with pytest.raises(ValueError, match="^messages: content"):
        demo.chat([{"role": "user", "content": [part]}], ONE)
    assert demo.is_finished()


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def test_a_template_that_loops_is_stopped(demo, monkeypatch):
    monkeypatch.setattr(chat, "TEMPLATE_SECONDS", .3)
    demo.tokenizer.chat_template, start = LOOPS, time.perf_counter()
    with pytest.raises(ValueError, match="chat template.*more than"):
        demo.chat(BEGUN, ONE)
    assert time.perf_counter() - start < 5


def test_other_code_is_not_watched(monkeypatch):
    monkeypatch.setattr(chat, "TEMPLATE_SECONDS", -1)
    with no_endless_template():
        assert sum(i for i in range(1000)) == 499500


def test_a_template_with_an_error(demo):
    demo.tokenizer.chat_template = "{% for %}"
    with pytest.raises(ValueError, match="chat template"):
        demo.chat(BEGUN, ONE)


def test_nothing_is_logged_where_nothing_is_wrong(caplog):
    with caplog.at_level(logging.WARNING, "nanovllm"), LLM(
            DEMO_MODEL, num_kvcache_blocks=64) as llm:
        llm.chat(BEGUN, ONE, use_tqdm=False)
    assert not [r for r in caplog.records if r.name == "nanovllm"]
