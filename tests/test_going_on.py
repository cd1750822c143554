"""What one request, one interrupt or one failed step must not do to the rest."""

import os
import signal

import pytest
from fixtures import make_checkpoint, random_prompts

from nanovllm import LLM, SamplingParams
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.scheduler import Scheduler

PROMPT = "What is PagedAttention?"
PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0)


def finish(llm):
    """Step to the end; the texts by request."""
    texts = {}
    while not llm.is_finished():
        texts.update({o.request_id: o.output["text"] for o in llm.step() if o.output})
    return texts


@pytest.mark.parametrize("owner, method", [(LLMEngine, "_report"), (Scheduler, "_add_row"),
                                           (Scheduler, "postprocess")])
@pytest.mark.parametrize("steps", [0, 3, 11])
def test_ctrl_c_while_the_books_are_written(owner, method, steps, monkeypatch):
    with LLM(device="cpu", num_kvcache_blocks=32) as llm:
        right = llm.generate(PROMPT, PARAMS, use_tqdm=False)[0]["text"]
        ids = [llm.add_request(PROMPT, PARAMS) for _ in range(2)]
        texts = {}
        for _ in range(steps):
            llm.step()
        inner, pressed = getattr(owner, method), []

        def press(self, *args):
            if not pressed:
                pressed.append(os.kill(os.getpid(), signal.SIGINT))
            return inner(self, *args)

        monkeypatch.setattr(owner, method, press)
        try:
            texts.update({o.request_id: o.output["text"] for o in llm.step() if o.output})
        except KeyboardInterrupt:
            pass
        texts.update(finish(llm))
        assert [texts[i] for i in ids] == [right, right]
        assert not llm.requests and llm.block_manager.num_used_blocks == 0


@pytest.mark.parametrize("bad", [dict(top_k=2**63), dict(temperature=10**400),
                                 dict(seed=10**5000), dict(temperature=1e31)])
def test_numbers_that_no_tensor_holds(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SamplingParams(**bad)


def test_a_tiny_top_p_keeps_the_likeliest():
    with LLM(device="cpu", num_kvcache_blocks=32) as llm:
        greedy = llm.generate(PROMPT, PARAMS, use_tqdm=False)[0]["token_ids"]
        tiny = SamplingParams(top_p=1e-50, max_tokens=12, ignore_eos=True)
        assert llm.generate(PROMPT, tiny, use_tqdm=False)[0]["token_ids"] == greedy


def test_a_failed_step_is_no_cache_hit(tmp_path, monkeypatch):
    folder, _ = make_checkpoint(folder=tmp_path)
    (prompt,) = random_prompts([20])
    with LLM(folder, device="cpu", kvcache_block_size=4, num_kvcache_blocks=32) as llm:
        llm.add_request(prompt, SamplingParams(temperature=0, max_tokens=20))
        for _ in range(9):
            llm.step()
        run = llm.runner.run
        monkeypatch.setattr(llm.runner, "run", lambda batch: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llm.step()
        monkeypatch.setattr(llm.runner, "run", run)
        outputs = []
        while not llm.is_finished():
            outputs += [o.output for o in llm.step() if o.output]
    assert outputs[0]["num_cached_tokens"] == 0


def test_nothing_is_left_to_do_after_close():
    llm = LLM(device="cpu", num_kvcache_blocks=32)
    llm.add_request(PROMPT)
    llm.close()
    assert llm.is_finished()


@pytest.mark.parametrize("content", ["[]", "{"])
def test_a_damaged_generation_config(content, tmp_path):
    folder, _ = make_checkpoint(folder=tmp_path)
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match="generation_config.json"):
        LLM(folder, device="cpu", num_kvcache_blocks=8)


def test_what_is_no_model_no_text_and_no_number():
    with pytest.raises(TypeError, match="model must be"):
        LLM(5)
    with pytest.raises(ValueError, match="max_tokens"):
        SamplingParams(max_tokens=True)
    with LLM(device="cpu", num_kvcache_blocks=8) as llm:
        with pytest.raises(ValueError, match="prompt"):
            llm.add_request("\ud800")
