"""Requests in, steps, outputs: what one request, one error or one abort must not do to the rest."""

import json
import threading

import pytest
from fixtures import hf_generate, make_checkpoint, random_prompts

from nanovllm import LLM, SamplingParams
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.utils.rooms import find_room
from tests.parity import finish

NEW = 8
SMALL = dict(num_kvcache_blocks=8, kvcache_block_size=4, max_model_len=40)
GREEDY = SamplingParams(temperature=0, max_tokens=NEW)


@pytest.fixture
def llm(good):
    with LLM(good[0], **SMALL) as llm:
        yield llm


def outputs_of(llm):
    """(request, its tokens) as they are finished."""
    return [(i, out["token_ids"]) for i, out in finish(llm).items()]


def is_right(llm, good):
    """No block is lost, nothing is left over, and the next answer is right."""
    assert llm.block_manager.num_free_blocks == llm.block_manager.num_blocks
    assert llm.is_finished()
    out, = llm.generate([good[1]], GREEDY, use_tqdm=False)
    assert out["token_ids"] == good[2]


def test_the_engine_alone(good):
    """LLM is LLMEngine and more; steps do not need the rest."""
    assert issubclass(LLM, LLMEngine) and not hasattr(LLMEngine, "generate")
    with LLMEngine(good[0], **SMALL) as engine:
        first, second = (engine.add_request(good[1], GREEDY) for _ in range(2))
        assert outputs_of(engine) == [(first, good[2]), (second, good[2])]


@pytest.mark.parametrize("prompt, error, complaint", [
    ([1] * 40, ValueError, "max_model_len=40.*shorten"),
    ([1] * 33, ValueError, "there are 8.*num_kvcache_blocks"),
    ([], ValueError, "prompt is empty"), ("text", ValueError, "no tokenizer.*token ids"),
    ([151], ValueError, "prompt.*151.*0 to 150"), ([-1], ValueError, "prompt.*-1.*0 to 150"),
    ([1.5], TypeError, "prompt must be"), (["5"], TypeError, "prompt must be"),
    (None, TypeError, "prompt must be")])
def test_bad_prompt_leaves_others_alone(prompt, error, complaint, llm, good):
    other = llm.add_request(good[1], GREEDY)
    llm.step()
    for call in (llm.add_request, llm.stream):
        with pytest.raises(error, match=complaint):
            call(prompt, GREEDY)
    with pytest.raises(error, match=complaint):  # the good one beside it is not queued either
        llm.generate([good[1], prompt], GREEDY, use_tqdm=False)
    assert outputs_of(llm) == [(other, good[2])]
    is_right(llm, good)


def test_a_text_with_a_token_that_the_model_does_not_have(demo):
    """One that was added to the tokenizer, and the embedding was not enlarged."""
    demo.tokenizer.add_tokens(["<tool>"])
    other = demo.add_request("What is RoPE?", GREEDY)
    for call in (demo.add_request, demo.stream, demo.generate):
        with pytest.raises(ValueError, match="token id 1024; the model has 0 to 1023"):
            call("call <tool> now", GREEDY)
    assert list(demo.requests) == [other] and finish(demo)[other]["finish_reason"] == "length"


def test_unknown_setting(good):
    with pytest.raises(TypeError, match="'max_num_seq'.*did you mean 'max_num_seqs'"):
        LLM(good[0], max_num_seq=3)


def test_closed_engine(llm):
    llm.close()
    llm.close()
    for call in (lambda: llm.generate([[1]]), lambda: llm.generate([]), llm.step,
                 lambda: llm.add_request([1]), lambda: llm.stream([1])):
        with pytest.raises(RuntimeError, match="closed; make a new one"):
            call()


def test_nothing_is_left_to_do_after_close():
    llm = LLM(device="cpu", num_kvcache_blocks=32)
    llm.add_request("What is PagedAttention?")
    llm.close()
    assert llm.is_finished()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_failing_step_is_rolled_back(at, error, llm, good, monkeypatch):
    run, calls = llm.runner.run, []

    def fail(batch):
        calls.append(batch)
        if len(calls) == at:
            raise error("injected")
        return run(batch)

    monkeypatch.setattr(llm.runner, "run", fail)
    other = llm.add_request(good[1], GREEDY)
    with pytest.raises(error):
        llm.generate([good[1][:5], good[1]], GREEDY, use_tqdm=False)
    assert list(llm.requests) == [other]
    # what was queued before goes on as if nothing had happened
    assert outputs_of(llm) == [(other, good[2])]
    is_right(llm, good)


def test_nobody_shares_what_a_failed_step_was_to_write(llm, good, monkeypatch):
    """The second prompt found the blocks of the first in the step that failed."""
    run = llm.runner.run
    monkeypatch.setattr(llm.runner, "run", lambda batch: 1 / 0)
    first, second = (llm.add_request(good[1], GREEDY) for _ in range(2))
    with pytest.raises(ZeroDivisionError):
        llm.step()
    monkeypatch.setattr(llm.runner, "run", run)
    llm.abort(first)
    assert outputs_of(llm) == [(second, good[2])]
    is_right(llm, good)


def test_a_failed_step_is_no_cache_hit(good, monkeypatch):
    prompt, = random_prompts([20])
    with LLM(good[0], device="cpu", kvcache_block_size=4, num_kvcache_blocks=32) as llm:
        llm.add_request(prompt, SamplingParams(temperature=0, max_tokens=20))
        for _ in range(9):
            llm.step()
        run = llm.runner.run
        monkeypatch.setattr(llm.runner, "run", lambda batch: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llm.step()
        monkeypatch.setattr(llm.runner, "run", run)
        output, = finish(llm).values()
    assert output["num_cached_tokens"] == 0


def test_abort(llm, good):
    first, second = (llm.add_request(good[1], GREEDY) for _ in range(2))
    llm.step()
    assert llm.abort(first)["finish_reason"] == "abort" and llm.abort(first) is None
    assert outputs_of(llm) == [(second, good[2])]
    is_right(llm, good)


def test_a_table_that_is_emptied_and_filled_again(good, monkeypatch):
    """The block manager may use a sequence's list again: nothing is kept by its identity."""
    allocate, free = BlockManager.allocate, BlockManager.free

    def into_the_same_list(self, seq):
        table = seq.block_table
        if (wanted := allocate(self, seq)) is None:
            table[:], seq.block_table = seq.block_table, table
        return wanted

    def emptied(self, seq):
        table = seq.block_table
        free(self, seq)
        table.clear()
        seq.block_table = table

    monkeypatch.setattr(BlockManager, "allocate", into_the_same_list)
    monkeypatch.setattr(BlockManager, "free", emptied)
    with LLM(good[0], **{**SMALL, "num_kvcache_blocks": 7}, enable_prefix_caching=False) as llm:
        outs = llm.generate([good[1]] * 5, GREEDY, use_tqdm=False)
        assert llm.stats.preemptions
    assert [out["token_ids"] for out in outs] == [good[2]] * 5


@pytest.mark.parametrize("look_ahead", [False, True])
def test_one_engine_asked_from_many_threads(look_ahead, good):
    if look_ahead and find_room("gpu") is None:
        pytest.skip("nanovllm/gpu is not there")
    found = {}
    with LLM(good[0], **SMALL, look_ahead=look_ahead) as llm:
        def ask(i):
            found[i] = [llm.generate([good[1]] * 2, GREEDY, use_tqdm=False) for _ in range(3)]

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert llm.block_manager.num_used_blocks == 0 and llm.is_finished()
    assert len(found) == 4
    assert all(out["token_ids"] == good[2] for outs in found.values() for o in outs for out in o)


def test_two_engines_in_two_threads(good, tmp_path):
    """Each sees the steps of its own."""
    other, model = make_checkpoint(folder=tmp_path, seed=9)
    right = {good[0]: good[2], other: hf_generate(model, good[1], NEW)}
    found = {}

    def serve(folder):
        with LLM(folder, **SMALL) as llm:
            found[folder] = [llm.generate([good[1]], GREEDY, use_tqdm=False)[0]["token_ids"]
                             for _ in range(10)]

    threads = [threading.Thread(target=serve, args=(folder,)) for folder in right]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {folder: [tokens] * 10 for folder, tokens in right.items()}


def test_a_step_ahead_changes_nothing(good):
    if find_room("gpu") is None:
        with pytest.raises(ValueError, match="look_ahead=True needs nanovllm/gpu"):
            LLM(good[0], **SMALL, look_ahead=True)
        pytest.skip("nanovllm/gpu is not there")
    with LLM(good[0], **SMALL, look_ahead=True) as llm:
        outs = llm.generate([good[1]] * 3, GREEDY, use_tqdm=False)
        assert llm.stepper.right > 0 and llm.stepper is not llm.runner
    assert [out["token_ids"] for out in outs] == [good[2]] * 3
    with LLM(good[0], **SMALL) as llm:
        assert llm.stepper is llm.runner            # it pays only where steps are recorded


@pytest.mark.parametrize("content", ["[]", "{"])
def test_a_damaged_generation_config(content, checkpoint):
    (checkpoint / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match="generation_config.json"):
        LLM(checkpoint, device="cpu", num_kvcache_blocks=8)


def test_every_end_of_text_counts(checkpoint, good):
    """Those of config.json and of generation_config.json."""
    file = checkpoint / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [150, good[2][2]]}))
    with LLM(checkpoint, **SMALL) as llm:
        out, = llm.generate([good[1]], GREEDY, use_tqdm=False)
        ignored, = llm.generate([good[1]], SamplingParams(temperature=0, max_tokens=NEW,
                                                          ignore_eos=True), use_tqdm=False)
    assert out["finish_reason"] == "stop" and ignored["token_ids"] == good[2]
    assert out["token_ids"] == good[2][:good[2].index(good[2][2]) + 1]


def test_statistics(llm, good):
    llm.generate([good[1]] * 2, GREEDY, use_tqdm=False)
    stats = llm.stats
    assert stats.generated_tokens == 2 * NEW and stats.cached_tokens == 8
    assert stats.computed_tokens == stats.prefill_tokens + stats.decode_tokens
    assert stats.prefill_tokens == 9 + 1 and stats.decode_tokens == 2 * (NEW - 1)
    assert stats.steps == NEW and 0 < stats.peak_blocks <= 8
    assert stats.prefill_throughput > 0 and stats.decode_throughput > 0
