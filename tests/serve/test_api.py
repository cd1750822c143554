"""nanovllm/serve/api.py and protocol.py, by the real `openai` client and by plain HTTP."""

import asyncio
import http.client
import json
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import partial
from urllib.parse import urlsplit

import pytest

from nanovllm import LLM, SamplingParams

from .conftest import QUESTION, demo_engine, serving, until

openai = pytest.importorskip("openai")
ASK = {"model": "demo", "messages": [{"role": "user", "content": QUESTION}]}
GREEDY = SamplingParams(temperature=0, max_tokens=4000)


def send(url, path, body=None, headers=None, method=None):
    """(status, headers, body) of one plain request; the body of JSON as what it means."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    connection.request(method or ("GET" if data is None else "POST"), path, data,
                       {"Content-Type": "application/json", **(headers or {})})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    is_json = response.headers["content-type"] == "application/json"
    return response.status, response.headers, json.loads(text) if is_json else text


# -----------------------------------------------------------------------------------------------
# Answers
# -----------------------------------------------------------------------------------------------

def test_chat(client, llm):
    want = llm.chat(ASK["messages"], GREEDY, use_tqdm=False)[0]
    answer = client.chat.completions.create(**ASK)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", want["text"])
    assert (choice.finish_reason, answer.object) == ("stop", "chat.completion")
    assert answer.model == "demo"
    assert answer.usage.completion_tokens == len(want["token_ids"])
    assert answer.usage.prompt_tokens == len(want["prompt_token_ids"])
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + len(want["token_ids"])


def test_chat_takes_text_in_parts_and_other_roles(client, llm):
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": "TTFT?"}]
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": parts}]
    plain = [messages[0], {"role": "user", "content": "What is\nTTFT?"}]
    answer = client.chat.completions.create(model="demo", messages=messages, max_tokens=8)
    want = llm.chat(plain, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)[0]
    assert answer.choices[0].message.content == want["text"]


def test_chat_streams_what_it_would_answer(client):
    whole = client.chat.completions.create(**ASK)
    chunks = list(client.chat.completions.create(
        **ASK, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == "stop"
    assert len(chunks) > 10 and len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == [] and all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_completion(client, llm):
    want = llm.generate("The KV cache", SamplingParams(temperature=0, max_tokens=16),
                        use_tqdm=False)[0]
    answer = client.completions.create(model="demo", prompt="The KV cache")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (want["text"], "stop")
    chunks = list(client.completions.create(model="demo", prompt=want["prompt_token_ids"],
                                            stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == want["text"]
    assert chunks[-1].choices[0].finish_reason == "stop"
    longer = client.completions.create(model="demo", prompt="x", extra_body={"ignore_eos": True})
    assert (longer.usage.completion_tokens, longer.choices[0].finish_reason) == (16, "length")
    assert answer.object == chunks[0].object == "text_completion"


def test_several_prompts_with_several_choices(client, llm):
    prompts = ["The KV cache", "A block", "TTFT"]
    params = [SamplingParams(temperature=1.0, max_tokens=6, seed=seed) for seed in (5, 6)]
    want = [llm.generate(p, params[i], use_tqdm=False)[0] for p in prompts for i in range(2)]
    ask = dict(model="demo", prompt=prompts, n=2, seed=5, temperature=1.0, max_tokens=6)
    answer = client.completions.create(**ask)
    assert [choice.text for choice in answer.choices] == [output["text"] for output in want]
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert answer.usage.completion_tokens == 36
    assert answer.usage.prompt_tokens == sum(len(o["prompt_token_ids"]) for o in want[::2])
    texts = [""] * 6
    for chunk in client.completions.create(**ask, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [output["text"] for output in want]


def test_chat_with_several_choices_streams_each(client):
    ask = {**ASK, "n": 3, "seed": 1, "temperature": 3.0, "max_tokens": 5}
    whole = client.chat.completions.create(**ask)
    texts, reasons = [""] * 3, [None] * 3
    for chunk in client.chat.completions.create(**ask, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert len(set(texts)) > 1 and reasons == [c.finish_reason for c in whole.choices]


@pytest.mark.parametrize("stream", (False, True))
def test_stop(client, stream):
    answer = client.chat.completions.create(**ASK, stop=["list", "zebra"], stream=stream)
    if stream:
        chunks = [chunk.choices[0] for chunk in answer]
        text, reason = "".join(c.delta.content or "" for c in chunks), chunks[-1].finish_reason
    else:
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert (text, reason) == ("The block table is a ", "stop")


def test_max_completion_tokens_goes_before_max_tokens(client):
    answer = client.chat.completions.create(**ASK, max_tokens=9, max_completion_tokens=3)
    assert answer.usage.completion_tokens == 3
    assert client.chat.completions.create(**ASK, max_tokens=4).usage.completion_tokens == 4


def test_chat_logprobs(client, llm):
    want = llm.chat(ASK["messages"], SamplingParams(temperature=0, max_tokens=5, logprobs=3),
                    use_tqdm=False)[0]
    ask = dict(**ASK, max_tokens=5, logprobs=True, top_logprobs=3)
    content = client.chat.completions.create(**ask).choices[0].logprobs.content
    assert [c.token for c in content] == [llm.tokenizer.decode([t]) for t in want["token_ids"]]
    for found, token, entry in zip(content, want["token_ids"], want["logprobs"]):
        assert found.logprob == pytest.approx(entry[token], abs=1e-4)
        assert bytes(found.bytes).decode() == found.token
        assert len(found.top_logprobs) == 3 and found.top_logprobs[0].token == found.token
        likely = [top.logprob for top in found.top_logprobs]
        assert likely == sorted(likely, reverse=True)
    streamed = [one for chunk in client.chat.completions.create(**ask, stream=True)
                for one in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])]
    assert [one.token for one in streamed] == [one.token for one in content]
    alone = client.chat.completions.create(**ASK, max_tokens=1, logprobs=True)
    assert alone.choices[0].logprobs.content[0].top_logprobs == []
    assert client.chat.completions.create(**ASK, max_tokens=1).choices[0].logprobs is None


def test_completion_logprobs(client):
    ask = dict(model="demo", prompt="The KV cache", max_tokens=5, logprobs=2)
    choice = client.completions.create(**ask).choices[0]
    found = choice.logprobs
    assert "".join(found.tokens) == choice.text
    assert [choice.text[at:].startswith(t) for at, t in zip(found.text_offset, found.tokens)]
    assert found.text_offset[:2] == [0, len(found.tokens[0])]
    assert all(len(top) == 2 and top[token] == logprob for top, token, logprob
               in zip(found.top_logprobs, found.tokens, found.token_logprobs))
    streamed = [chunk.choices[0].logprobs for chunk
                in client.completions.create(**ask, stream=True)]
    assert [t for piece in streamed for t in piece.tokens] == found.tokens
    assert [at for piece in streamed for at in piece.text_offset] == found.text_offset


def test_null_is_as_if_not_given_and_unknown_fields_are_ignored(client):
    answer = client.chat.completions.create(**ASK, max_tokens=2, extra_body={
        "seed": None, "stop": None, "user": "someone", "no_such_field": [1], "min_p": 0,
        "presence_penalty": 0.0, "logit_bias": {}, "response_format": {"type": "text"},
        "top_k": -1, "n": None, "stream_options": None})
    assert answer.usage.completion_tokens == 2


@pytest.mark.parametrize("wish, stream", [
    (dict(presence_penalty=1.5, frequency_penalty=.5), False), (dict(repetition_penalty=1.3), True),
    (dict(min_p=.2, temperature=1.5, seed=4), False), (dict(min_tokens=12), False),
    (dict(stop_token_ids=[289], top_k=-1), True), (dict(skip_special_tokens=False), False),
    (dict(logit_bias={50: -100, 289: 5}), True)], ids=str)
def test_what_vllm_adds_is_obeyed(wish, stream, client, llm):
    """The answer is that of the library."""
    params = SamplingParams(**{"temperature": 0, "max_tokens": 20, **wish})
    want, = llm.chat(ASK["messages"], params, use_tqdm=False)
    ours = {**wish, "logit_bias": {str(i): b for i, b in wish.get("logit_bias", {}).items()}}
    answer = client.chat.completions.create(**ASK, max_tokens=20, stream=stream, extra_body=ours)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in answer) if stream else \
        answer.choices[0].message.content
    assert text == want["text"]


def test_an_answer_that_has_begun_is_continued(client, llm):
    messages = [*ASK["messages"], {"role": "assistant", "content": "It stores the KV"}]
    settings = {"add_generation_prompt": False, "continue_final_message": True}
    answer = client.chat.completions.create(model="demo", messages=messages, temperature=0,
                                            max_tokens=8, extra_body=settings)
    want, = llm.chat(messages, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False,
                     chat_template_kwargs={"continue_final_message": True})
    assert answer.choices[0].message.content == want["text"]
    assert answer.usage.prompt_tokens == len(want["prompt_token_ids"])


def test_a_prompt_asked_twice_is_served_from_the_cache(client):
    long = "Blocks of keys and values. " * 8
    answers = [client.completions.create(model="demo", prompt=long, max_tokens=1)
               for _ in range(2)]
    assert answers[1].usage.prompt_tokens_details.cached_tokens > 0
    assert answers[0].choices[0].text == answers[1].choices[0].text


def test_models_health_metrics_tokenize(client, server, llm):
    assert [model.id for model in client.models.list()] == ["demo"]
    assert send(server.url, "/health")[::2] == (200, {"status": "ok"})
    client.chat.completions.create(**ASK, max_tokens=3)
    status, headers, text = send(server.url, "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4")
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    label = '{model_name="demo"}'
    assert values[f"vllm:num_requests_running{label}"] == "0"
    assert int(values[f"vllm:generation_tokens_total{label}"]) >= 3
    count = int(values[f"vllm:time_to_first_token_seconds_count{label}"])
    assert count == int(values['vllm:time_to_first_token_seconds_bucket'
                               '{model_name="demo",le="+Inf"}']) > 0
    ids = llm.tokenizer.encode(QUESTION)
    assert send(server.url, "/tokenize", {"prompt": QUESTION})[2] == {
        "count": len(ids), "max_model_len": 4096, "tokens": ids,
        "token_strs": [llm.tokenizer.decode([token]) for token in ids]}
    told = send(server.url, "/tokenize", {"messages": ASK["messages"]})[2]
    assert told["count"] == client.chat.completions.create(**ASK).usage.prompt_tokens


def test_a_name_in_the_metrics_is_escaped_as_prometheus_reads_it(server):
    text = server.engine.metrics.text(server.engine.llm, 'mo"dèle\\漢\n')
    assert r'model_name="mo\"dèle\\漢\n"' in text and text.count("\n\n") == 0


def test_metrics_are_what_prometheus_reads(server):
    parser = pytest.importorskip("prometheus_client.parser")
    families = list(parser.text_string_to_metric_families(send(server.url, "/metrics")[2]))
    kinds = {family.name: family.type for family in families}
    assert kinds["vllm:inter_token_latency_seconds"] == "histogram"
    assert kinds["vllm:num_preemptions"] == "counter"


# -----------------------------------------------------------------------------------------------
# The form of an answer
# -----------------------------------------------------------------------------------------------

UNIT = {"type": "object", "properties": {"unit": {"enum": ["block", "page"]},
                                         "count": {"type": "integer", "maximum": 99, "minimum": 0}},
        "required": ["unit", "count"], "additionalProperties": False}


def test_json_that_fits_a_schema(client):
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "json_schema": {"name": "unit", "schema": UNIT, "strict": True}}
    whole = client.chat.completions.create(**ASK, response_format=form, n=3, seed=1, temperature=1)
    for choice in whole.choices:
        found = json.loads(choice.message.content)
        assert choice.finish_reason == "stop" and [*found] == ["unit", "count"]
        assert found["unit"] in ("block", "page") and 0 <= found["count"] <= 99
    assert len({choice.message.content for choice in whole.choices}) > 1
    pieces = client.chat.completions.create(**ASK, response_format=form, seed=1, temperature=1,
                                            stream=True)
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert text == whole.choices[0].message.content
    other = client.completions.create(model="demo", prompt="It says: ", max_tokens=64,
                                      extra_body={"response_format": form})
    assert [*json.loads(other.choices[0].text)] == ["unit", "count"]


def test_json_as_a_class_of_pydantic(client):
    pytest.importorskip("llguidance")
    from pydantic import BaseModel

    class Inner(BaseModel):
        yes: bool

    class Answer(BaseModel):
        parts: tuple[Inner, Inner]

    found = client.chat.completions.parse(**ASK, response_format=Answer).choices[0].message.parsed
    assert isinstance(found.parts[1].yes, bool)


def test_some_json_object(client):
    pytest.importorskip("llguidance")
    answer = client.chat.completions.create(**ASK, response_format={"type": "json_object"},
                                            max_tokens=300, temperature=0)
    choice = answer.choices[0]
    assert choice.message.content.startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)


@pytest.mark.parametrize("schema", [
    {"type": "nonsense"}, 5, "{", [], {"$ref": "#/nowhere"}, {"pattern": "("}], ids=str)
def test_a_schema_that_is_none_is_named(server, schema):
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    status, _, body = send(server.url, "/v1/chat/completions", {**ASK, "response_format": form})
    assert (status, body["error"]["param"]) == (400, "response_format"), body


def test_without_llguidance_a_form_is_refused(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    form = {"response_format": {"type": "json_object"}}
    status, _, body = send(server.url, "/v1/chat/completions", {**ASK, **form})
    assert (status, body["error"]["param"]) == (400, "response_format")
    assert "llguidance" in body["error"]["message"]


# -----------------------------------------------------------------------------------------------
# Errors
# -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, param", [
    ({"temperature": -1}, "temperature"), ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"), ({"top_k": 1.5}, "top_k"), ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "many"}, "max_tokens"), ({"n": 0}, "n"), ({"n": 65}, "n"),
    ({"stop": ["a"] * 17}, "stop"), ({"stop": [""]}, "stop"), ({"stop": 3}, "stop"),
    ({"seed": 2**65}, "seed"), ({"seed": 2**64 - 1, "n": 2}, "seed"),
    ({"top_logprobs": 2}, "top_logprobs"), ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"presence_penalty": 3}, "presence_penalty"), ({"logit_bias": {"3": 101}}, "logit_bias"),
    ({"logit_bias": {"three": 1}}, "logit_bias"), ({"logit_bias": [3]}, "logit_bias"),
    ({"logit_bias": {"123456": 1}}, "logit_bias"),
    ({"logit_bias": dict.fromkeys(map(str, range(1025)), 1)}, "logit_bias"),
    ({"min_p": 1.5}, "min_p"), ({"stop_token_ids": ["x"]}, "stop_token_ids"),
    ({"stop_token_ids": [3] * 1025}, "stop_token_ids"), ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"), ({"top_k": -2}, "top_k"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"skip_special_tokens": "no"}, "skip_special_tokens"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ({"stream": False, "stream_options": {"include_usage": True}}, "stream_options"),
    ({"guided_json": {}}, "guided_json"), ({"allowed_token_ids": [1]}, "allowed_token_ids"),
    ({"logit_bias": {"1" * 5000: 1}}, "logit_bias"), ({"tools": [{}]}, "tools"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"messages": []}, "messages"), ({"messages": "hello"}, "messages"),
    ({"messages": [{"content": "x"}]}, "messages"), ({"messages": [{"role": "user"}] * 4000},
                                                     "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
     "messages"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
    ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
])
def test_a_wrong_argument_is_named(server, change, param):
    status, _, body = send(server.url, "/v1/chat/completions", {**ASK, **change})
    assert (status, body["error"]["param"]) == (400, param), body
    assert body["error"]["type"] == "invalid_request_error" and body["error"]["message"]
    assert "Traceback" not in str(body) and ".py" not in str(body)
    ask = {"stream": True, **ASK, **change}          # refused before the stream begins
    assert send(server.url, "/v1/chat/completions", ask)[0] == 400


@pytest.mark.parametrize("prompt", ["", [], [[]], [10**9], [-1], "x " * 9000, ["a", 3], None, {}])
def test_a_wrong_prompt_is_named(server, prompt):
    status, _, body = send(server.url, "/v1/completions", {"prompt": prompt})
    assert (status, body["error"]["param"]) == (400, "prompt"), body


@pytest.mark.parametrize("body", [b"{", b"[1]", b'"x"', b"\xff", b"[" * 100_000, b""])
def test_a_body_that_is_no_json_object(server, body):
    status, _, answer = send(server.url, "/v1/completions", body)
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error"), answer


@pytest.mark.parametrize("path, change", [
    ("/v1/completions", {"prompt": [1] * 300_000 + ["a"]}),
    ("/v1/completions", {"prompt": [[1]] * 100_000 + ["a"]}),
    ("/v1/completions", {"prompt": "a", "stop": [1] * 300_000}),
    ("/v1/chat/completions", {"messages": [1] * 300_000}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [1] * 300_000}]}),
    ("/tokenize", {"messages": [1] * 300_000})], ids=lambda value: str(value)[:30])
def test_a_long_list_of_mistakes_holds_nobody_up(server, path, change):
    """The check ends at the first: an error for each would take half a minute."""
    start = time.perf_counter()
    assert send(server.url, path, change)[0] == 400
    assert time.perf_counter() - start < 5


def test_short_texts_do_not_wait_for_long_ones(server):
    from nanovllm.serve.api import Limits, Service
    service, gate = Service(server.engine, "demo", Limits()), threading.Event()

    async def ask():
        long = asyncio.create_task(service.encode(lambda tokenizer: gate.wait(60), size=10**6))
        await asyncio.sleep(0)
        assert await asyncio.wait_for(service.encode(lambda tokenizer: "short", size=9), 20)
        assert not long.done()
        gate.set()
        assert await long

    asyncio.run(ask())


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_a_text_says_how_long_it_is(server, path, monkeypatch):
    from nanovllm.serve.api import Service
    sizes, right = [], Service.encode

    def encode(service, function, *args, size=0):
        sizes.append(size)
        return right(service, function, *args, size=size)

    monkeypatch.setattr(Service, "encode", encode)
    text = "word " * 20_000
    body = {"messages": [{"role": "user", "content": text}]} if "chat" in path else {"prompt": text}
    send(server.url, path, body)
    assert max(sizes) >= len(text)


def test_tokenize_counts_what_a_chat_has(server):
    for flags in ({}, {"add_generation_prompt": False},
                  {"add_generation_prompt": False, "continue_final_message": True}):
        body = {**ASK, **flags}
        asked = send(server.url, "/v1/chat/completions", {**body, "max_tokens": 1})[2]
        count = send(server.url, "/tokenize", body)[2]["count"]
        assert count == asked["usage"]["prompt_tokens"]
    wrong = {**ASK, "continue_final_message": True}
    assert send(server.url, "/tokenize", wrong)[0] == 400


def test_a_key_is_a_bearers_in_any_case():
    with serving(partial(LLM, **demo_engine), api_key="schlüssel") as one:
        for scheme, status in (("Bearer", 200), ("bearer", 200), ("Basic", 401)):
            header = f"{scheme} schlüssel".encode().decode("latin-1")
            assert send(one.url, "/v1/models", headers={"Authorization": header})[0] == status


def test_other_addresses_models_and_methods(server, client):
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4o'") as info:
        client.chat.completions.create(**{**ASK, "model": "gpt-4o"})
    assert (info.value.param, info.value.code) == ("model", "model_not_found")
    assert send(server.url, "/nope")[2]["error"]["type"] == "not_found_error"
    assert send(server.url, "/v1/completions")[0] == 405
    assert send(server.url, "/openapi.json")[0] == send(server.url, "/docs")[0] == 404
    preflight = send(server.url, "/v1/completions", headers={
        "Origin": "http://evil.example", "Access-Control-Request-Method": "POST"},
        method="OPTIONS")
    assert not [name for name in preflight[1] if name.lower().startswith("access-control")]


def test_a_page_elsewhere_cannot_send_plain_text(server):
    """A browser sends text/plain anywhere without asking; JSON it does not."""
    status, _, _ = send(server.url, "/v1/completions", {"prompt": "x"},
                        {"Content-Type": "text/plain"})
    assert status == 400


def test_an_error_inside_says_nothing_of_the_inside(server, client, monkeypatch):
    from nanovllm.serve.protocol import Usage
    monkeypatch.setattr(Usage, "as_dict", lambda self: 1 / 0)
    with pytest.raises(openai.InternalServerError) as info:
        client.chat.completions.create(**ASK, max_tokens=2)
    assert "internal error" in str(info.value) and "division" not in str(info.value)
    with pytest.raises(openai.APIError, match="internal error"):    # on another connection
        list(client.with_options(max_retries=2).chat.completions.create(
            **ASK, max_tokens=2, stream=True, stream_options={"include_usage": True}))


# -----------------------------------------------------------------------------------------------
# Clients that leave, and limits
# -----------------------------------------------------------------------------------------------

ENDLESS = {**ASK, "max_tokens": 3500, "extra_body": {"ignore_eos": True}}


def test_a_stream_that_is_closed_is_aborted(server, client):
    aborted = server.engine.metrics.finished["abort"]
    with client.chat.completions.create(**ENDLESS, stream=True) as stream:
        for _, chunk in zip(range(5), stream):
            pass
    until(lambda: server.engine.metrics.finished["abort"] == aborted + 1)
    until(lambda: server.engine.llm.is_finished())


def test_a_client_that_gives_up_waiting_is_aborted(server, client):
    aborted = server.engine.metrics.finished["abort"]
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.4).chat.completions.create(**{**ENDLESS, "n": 2})
    until(lambda: server.engine.metrics.finished["abort"] == aborted + 2)


def test_a_connection_that_breaks_before_the_answer(server):
    """Headers and half a body, and gone; a whole request, and gone."""
    where = urlsplit(server.url)
    body = json.dumps({**ASK, "max_tokens": 3500, "ignore_eos": True}).encode()
    head = (b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/"
            b"json\r\nContent-Length: %d\r\n\r\n" % len(body))
    for data in (head, head + body[:20], head + body):
        with socket.create_connection((where.hostname, where.port)) as connection:
            connection.sendall(data)
    assert send(server.url, "/health")[0] == 200     # nothing_is_left looks at the rest


def test_many_clients_and_a_third_of_them_leave(server, llm):
    """Greedy texts are those of generate, whoever else comes and goes."""
    want = llm.chat(ASK["messages"], GREEDY, use_tqdm=False)[0]["text"]

    async def one(client, i):
        if i % 3 == 0:
            stream = await client.chat.completions.create(**ENDLESS, stream=True)
            async for _ in stream:
                break
            return await stream.close()
        if i % 7 == 0:
            with pytest.raises(openai.BadRequestError):
                await client.chat.completions.create(**ASK, temperature=-1)
            return None
        return (await client.chat.completions.create(**ASK)).choices[0].message.content

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="x",
                                      max_retries=0, timeout=60) as client:
            return await asyncio.gather(*(one(client, i) for i in range(48)))

    texts = [text for text in asyncio.run(all_of_them()) if text is not None]
    assert texts == [want] * len(texts) and len(texts) > 20


def test_too_many_requests_are_told_when_to_come_back():
    with serving(partial(LLM, **demo_engine, max_num_seqs=1), max_waiting=1) as server, \
            openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0) as client:
        streams = [client.chat.completions.create(**ENDLESS, stream=True) for _ in range(2)]
        status, headers, body = send(server.url, "/v1/chat/completions", ASK)
        assert (status, headers["retry-after"]) == (429, "1")
        assert body["error"]["code"] == "rate_limit_exceeded"
        with pytest.MonkeyPatch.context() as patch:      # refused before any text is encoded
            for name in ("chat_prompt", "text_prompt"):
                patch.setattr(f"nanovllm.serve.api.{name}", lambda *args: 1 / 0)
            assert send(server.url, "/v1/chat/completions", ASK)[0] == 429
            assert send(server.url, "/v1/completions", {"prompt": "x"})[0] == 429
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(**ASK)
        for stream in streams:
            stream.close()
        until(lambda: server.engine.num_unfinished == 0)
        assert client.chat.completions.create(**ASK, max_tokens=1)
        status, _, body = send(server.url, "/v1/chat/completions", {**ASK, "n": 3})
        assert (status, body["error"]["param"]) == (400, "n")      # later there is no room either


def test_limits_of_a_request():
    from nanovllm.serve.protocol import Limits
    limits = Limits(choices=2, logprobs=1, body_bytes=2000, seconds=0.5, body_seconds=0.3)
    with serving(partial(LLM, **demo_engine), limits=limits) as server, \
            openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0) as client:
        status, _, body = send(server.url, "/v1/completions", {"prompt": "x" * 3000})
        assert status == 413 and "2000 bytes" in body["error"]["message"]
        parts = (b"x" * 1000 for _ in range(4))      # sent in chunks: no length is said
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=10)
        connection.request("POST", "/v1/completions", parts, {"Content-Type": "application/json"})
        assert connection.getresponse().status == 413
        connection.close()
        with socket.create_connection(urlsplit(server.url).netloc.split(":")) as slow:
            slow.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\n"
                         b"Content-Length: 9\r\n\r\n{")
            slow.settimeout(5)
            assert b" 408 " in slow.recv(1000)
        with socket.create_connection(urlsplit(server.url).netloc.split(":")) as slow:
            slow.settimeout(5)
            slow.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\n"
                         b"Content-Length: 999\r\n\r\n")
            for _ in range(10):                      # a byte now and then
                slow.sendall(b" ")
                time.sleep(.1)
            slow.settimeout(.01)                     # it has been said by now
            assert b" 408 " in slow.recv(1000)
        assert send(server.url, "/v1/completions", {"prompt": ["a", "b", "c"]})[0] == 400
        with pytest.raises(openai.InternalServerError) as info:
            client.chat.completions.create(**ENDLESS)
        assert info.value.status_code == 504
        with pytest.raises(openai.APIError, match="longer than 0.5 seconds"):
            list(client.chat.completions.create(**ENDLESS, stream=True))
        until(lambda: server.engine.llm.is_finished())


def test_a_client_that_does_not_read_is_cut_off(monkeypatch):
    from nanovllm.serve import api
    with serving(partial(LLM, **demo_engine)) as server:
        real = api.EventStream.__init__
        monkeypatch.setattr(api.EventStream, "__init__", lambda self, events, engine, stream, s:
                            real(self, events, engine, stream, 1.0))
        body = json.dumps({**ASK, "n": 8, "max_tokens": 3500, "ignore_eos": True, "stream": True})
        with socket.create_connection(urlsplit(server.url).netloc.split(":")) as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
                         b"application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
                         + body.encode())
            until(lambda: server.engine.metrics.finished["abort"] == 8)


def test_api_key_and_host():
    with serving(partial(LLM, **demo_engine), api_key="secret",
                 hosts=["localhost", "127.0.0.1"]) as server:
        for path in ("/v1/models", "/metrics", "/tokenize", "/v1/completions"):
            for headers in ({}, {"Authorization": "Bearer wrong"},
                            {"Authorization": "Bearer s\xe9cret"}):
                status, _, body = send(server.url, path, headers=headers)
                assert (status, body["error"]["code"]) == (401, "invalid_api_key")
        assert send(server.url, "/health")[0] == 200
        assert send(server.url, "/health", headers={"Host": "evil.example"})[0] == 400
        with openai.OpenAI(base_url=server.url + "/v1", api_key="secret") as client:
            assert client.chat.completions.create(**ASK, max_tokens=1)


def test_a_dead_engine_is_503():
    def fail():
        raise RuntimeError("out of memory at /some/path")

    with serving(partial(LLM, **demo_engine)) as server, \
            openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0) as client:
        stream = iter(client.chat.completions.create(**ENDLESS, stream=True))
        next(stream)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(client.chat.completions.create, **ENDLESS)
            until(lambda: server.engine.num_unfinished == 2)
            server.loop.call_soon_threadsafe(server.engine._inbox.put, (
                None, lambda llm: setattr(llm, "step", fail), ()))
            with pytest.raises(openai.InternalServerError) as info:
                waiting.result(20)
        assert info.value.status_code == 503 and "path" not in str(info.value)
        with pytest.raises(openai.APIError, match="the engine has stopped"):
            list(stream)
        assert send(server.url, "/health")[0] == 503
        assert send(server.url, "/v1/chat/completions", ASK)[0] == 503


def test_another_thread_may_use_the_server_while_one_streams(client, llm):
    """A stream and a whole answer at once: both are batched in one engine."""
    want = llm.chat(ASK["messages"], GREEDY, use_tqdm=False)[0]["text"]
    found = []
    thread = threading.Thread(target=lambda: found.append(
        client.chat.completions.create(**ASK).choices[0].message.content))
    stream = client.chat.completions.create(**ASK, stream=True)
    thread.start()
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    thread.join(20)
    assert (text, found) == (want, [want])


def test_every_sampling_parameter_comes_over_http_or_cannot():
    """One that is new is ignored without a word until it stands in TAKEN."""
    from nanovllm.serve.protocol import TAKEN
    others = {"n", "max_tokens", "logprobs", "prompt_logprobs", "logits_processors"}
    assert {field.name for field in fields(SamplingParams)} == TAKEN | others
