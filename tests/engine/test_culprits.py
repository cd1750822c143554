"""One request that makes steps fail, and the others that must not notice."""

import asyncio
import os
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovllm import LLM, SamplingParams
from tests.parity import finish

NEW = 8
SETTINGS = dict(device="cpu", num_kvcache_blocks=24, kvcache_block_size=4, max_model_len=60,
                check_books=True)
GREEDY = SamplingParams(temperature=0, max_tokens=NEW)
BAD = [5, 6, 7]


@pytest.fixture
def llm(good):
    with LLM(good[0], **SETTINGS) as llm:
        yield llm


def poison(llm, monkeypatch, error=ValueError("no such thing")):
    """Every step with a row of the bad prompt raises."""
    run = llm.runner.run

    def fail(batch):
        if any(row.seq.prompt_token_ids == BAD for row in batch):
            raise error
        return run(batch)

    monkeypatch.setattr(llm.runner, "run", fail)


def test_it_ends_and_the_rest_goes_on(llm, good, monkeypatch):
    first = llm.add_request(good[1], GREEDY)
    llm.step()
    poison(llm, monkeypatch)
    bad, second = llm.add_request(BAD, GREEDY), llm.add_request(good[1], GREEDY)
    outputs = finish(llm)
    assert [outputs[i]["token_ids"] for i in (first, second)] == [good[2]] * 2
    assert outputs[bad]["finish_reason"] == "error"
    assert outputs[bad]["error"] == "ValueError: no such thing" and outputs[first]["error"] is None
    assert not llm.block_manager.num_used_blocks


def test_alone(llm, monkeypatch, caplog):
    poison(llm, monkeypatch)
    out, = llm.generate([BAD], GREEDY, use_tqdm=False)
    assert out["finish_reason"] == "error" and "no such thing" in caplog.text


def test_in_one_call(llm, good, monkeypatch):
    poison(llm, monkeypatch)
    outs = llm.generate([good[1], BAD, good[1]], GREEDY, use_tqdm=False)
    assert [out["finish_reason"] for out in outs] == ["length", "error", "length"]
    assert [out["token_ids"] for out in outs] == [good[2], [], good[2]]


def test_in_a_later_chunk_of_its_prompt(good, monkeypatch):
    with LLM(good[0], **SETTINGS, max_num_batched_tokens=4) as llm:
        execute = llm.runner.execute

        def fail(step, *rest):
            if 99 in step.input_ids.tolist():
                raise ValueError("99")
            return execute(step, *rest)

        monkeypatch.setattr(llm.runner, "execute", fail)
        outs = llm.generate([good[1], [1] * 13 + [99, 2]], GREEDY, use_tqdm=False)
    assert [out["finish_reason"] for out in outs] == ["length", "error"]
    assert outs[0]["token_ids"] == good[2]


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_an_engine_that_is_broken_blames_nobody(error, llm, good, monkeypatch):
    ids = [llm.add_request(good[1], GREEDY) for _ in range(2)]
    with monkeypatch.context() as patch:
        def fail(batch):
            raise error
        patch.setattr(llm.runner, "run", fail)
        for _ in range(2):
            with pytest.raises(type(error)):
                llm.step()
    outputs = finish(llm)
    assert [outputs[i]["token_ids"] for i in ids] == [good[2]] * 2


def test_a_handler_that_raises_in_a_step_blames_nobody(llm, good, monkeypatch):
    class Timeout(Exception):
        """A user's time limit."""

    def handler(*args):
        raise Timeout

    before = signal.signal(signal.SIGALRM, handler)
    run, calls = llm.runner.run, []

    def late(batch):
        calls.append(batch)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGALRM)
        return run(batch)

    monkeypatch.setattr(llm.runner, "run", late)
    ids = [llm.add_request(good[1], GREEDY) for _ in range(2)]
    llm.step()
    with pytest.raises(Timeout):
        llm.step()
    assert len(calls) == 2              # nobody was tried alone
    signal.signal(signal.SIGALRM, before)
    outputs = finish(llm)
    assert [outputs[i]["token_ids"] for i in ids] == [good[2]] * 2


class PanicException(BaseException):
    """What a panic in Rust code is in Python (pyo3); by its name, for nobody can import it."""


@pytest.mark.parametrize("error", [
    ConnectionError("lost"), asyncio.CancelledError("lost"), PanicException("lost")], ids=repr)
@pytest.mark.parametrize("times", [1, 1000])
def test_a_processor_that_fails(error, times, llm, good):
    """Once or always: whose it is is known, and nobody else notices."""
    failed = []

    def fail(completion, row):
        if len(completion) == 3 and len(failed) < times:
            failed.append(1)
            raise error
        return row

    bad = llm.add_request(BAD, replace(GREEDY, logits_processors=[fail]))
    out, = llm.generate([good[1]], GREEDY, use_tqdm=False)
    assert out["token_ids"] == good[2] and len(failed) == 1
    outputs = finish(llm)
    assert outputs[bad]["finish_reason"] == "error" and "lost" in outputs[bad]["error"]
    assert len(outputs[bad]["token_ids"]) == 3


def test_a_handler_that_raises_in_a_processor_blames_nobody(llm, good):
    def handler(*args):
        raise ValueError("time is over")

    def late(completion, row):
        if len(completion) == 3 and not hits:
            hits.append(1)
            signal.raise_signal(signal.SIGALRM)
        return row

    before, hits = signal.signal(signal.SIGALRM, handler), []
    mine = llm.add_request(good[1], replace(GREEDY, logits_processors=[late]))
    with pytest.raises(ValueError, match="time is over"):
        while True:
            llm.step()
    signal.signal(signal.SIGALRM, before)
    assert finish(llm)[mine]["token_ids"] == good[2]


@pytest.mark.parametrize("error", [UnicodeError("no text"), PanicException("no text")], ids=repr)
@pytest.mark.parametrize("stop", [(), ("zzz",)])
def test_a_tokenizer_that_fails_for_one(stop, error, demo, monkeypatch):
    """Its text ends where decoding failed; its neighbour's is whole."""
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop=stop)
    first, second = demo.generate(["What is RoPE?", "Why is decode slow?"], params, use_tqdm=False)
    decode, bad = demo.tokenizer.decode, second["token_ids"][5]
    assert bad not in first["token_ids"]

    def fail(ids, **kwargs):
        if bad in ids:
            raise error
        return decode(ids, **kwargs)

    monkeypatch.setattr(demo.tokenizer, "decode", fail)
    for private in (True, False):
        if private:
            outs = demo.generate(["What is RoPE?", "Why is decode slow?"], params, use_tqdm=False)
        else:
            ids = [demo.add_request(p, params) for p in ("What is RoPE?", "Why is decode slow?")]
            found = finish(demo)
            outs = [found[i] for i in ids]
        assert outs[0]["text"] == first["text"] and outs[0]["token_ids"] == first["token_ids"]
        assert outs[1]["finish_reason"] == "error" and "no text" in outs[1]["error"]
    with pytest.raises(RuntimeError, match="no text"):
        list(demo.stream("Why is decode slow?", params))
    assert not demo.requests and not demo.block_manager.num_used_blocks


@pytest.fixture
def overflowing(checkpoint):
    """A checkpoint in which token 145 alone has an embedding of NaN; the proof does not use it."""
    file = checkpoint / "model.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"][145] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    return checkpoint


@pytest.fixture
def tiles(monkeypatch):
    """Products of the CPU's room in tiles, also where the processor has AMX, which is faster."""
    build = pytest.importorskip("nanovllm.cpu.build")
    flags = os.environ.get("NANOVLLM_CFLAGS", "")
    monkeypatch.setenv("NANOVLLM_CFLAGS", f"{flags} -mno-amx-bf16")
    build.load_kernels.cache_clear()
    if build.load_kernels(torch.float32, 16) is None:
        pytest.skip("no C compiler")
    yield
    build.load_kernels.cache_clear()


@pytest.mark.parametrize("settings", [
    dict(attention_backend="sdpa"), dict(), dict(kernels="plain", max_num_batched_tokens=8)])
def test_nan_ends_its_request_and_no_other(settings, overflowing):
    """Neither who stands beside it, nor who shares its beginning, nor who gets its blocks."""
    check_nan(settings, overflowing)


@pytest.mark.parametrize("budget", [100, 24])
def test_nan_and_products_in_tiles(budget, overflowing, tiles):
    check_nan(dict(attention_backend="cpu", max_num_batched_tokens=budget), overflowing)


def check_nan(settings, overflowing):
    """The request with token 145 ends; others have the tokens that they had without it."""
    common = list(range(10, 30))
    bad, others = [*common, 145, 3, 4], [[*common, 7], [5, 6]]
    with LLM(overflowing, **SETTINGS, **settings) as llm:
        right = [out["token_ids"] for out in llm.generate(others, GREEDY, use_tqdm=False)]
        assert [len(tokens) for tokens in right] == [NEW, NEW]
        used = llm.runner.backend.name          # the proof may have left out what was asked for
        assert used == settings.get("attention_backend", used)
    with LLM(overflowing, **SETTINGS, **settings) as llm:
        for _ in range(2):
            outs = llm.generate([bad, *others], [SamplingParams(max_tokens=NEW, logprobs=2),
                                                 GREEDY, GREEDY], use_tqdm=False)
            assert outs[0]["finish_reason"] == "nan" and "NaN" in outs[0]["error"]
            assert outs[0]["token_ids"] == outs[0]["logprobs"] == []
            assert [out["token_ids"] for out in outs[1:]] == right
        with pytest.raises(RuntimeError, match="no tokenizer|NaN"):
            list(llm._stream(llm._make_request(bad, GREEDY, is_private=True)))
        llm.add_request(bad, GREEDY)
        last = [out for _ in range(4) for out in llm.step()][-1]
        assert last.output["finish_reason"] == "nan" and last.token_ids == []
        assert not llm.block_manager.num_used_blocks
