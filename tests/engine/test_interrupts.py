"""Ctrl-C waits while the books are written."""

import os
import signal
import threading

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.engine.interrupts import interrupt_afterwards
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.scheduler import Scheduler
from tests.parity import finish

PROMPT = "What is PagedAttention?"
PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0)


@pytest.fixture(autouse=True)
def ctrl_c():
    """Ctrl-C raises, also where pytest was told to ignore it (nohup)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_it_comes_after_the_block(ctrl_c):
    done = []
    with pytest.raises(KeyboardInterrupt):
        with interrupt_afterwards():
            ctrl_c()
            done.append("the rest")
    assert done == ["the rest"]


def test_the_handler_is_put_back_after_an_error():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError):
        with interrupt_afterwards():
            1 / 0
    assert signal.getsignal(signal.SIGINT) is before


def test_who_ignores_it_goes_on(ctrl_c):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interrupt_afterwards():
        ctrl_c()


def test_in_another_thread_nothing_changes():
    seen = []

    def work():
        with interrupt_afterwards():
            seen.append("done")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert seen == ["done"]


@pytest.mark.parametrize("owner, method", [(LLMEngine, "_report"), (Scheduler, "_add_row"),
                                           (Scheduler, "postprocess")])
@pytest.mark.parametrize("steps", [0, 3, 11])
def test_ctrl_c_while_the_books_are_written(owner, method, steps, monkeypatch, ctrl_c):
    with LLM(device="cpu", num_kvcache_blocks=32) as llm:
        right = llm.generate(PROMPT, PARAMS, use_tqdm=False)[0]["text"]
        ids = [llm.add_request(PROMPT, PARAMS) for _ in range(2)]
        texts = {}
        for _ in range(steps):
            llm.step()
        inner, pressed = getattr(owner, method), []

        def press(self, *args):
            if not pressed:
                pressed.append(ctrl_c())
            return inner(self, *args)

        monkeypatch.setattr(owner, method, press)
        try:
            texts.update({o.request_id: o.output["text"] for o in llm.step() if o.output})
        except KeyboardInterrupt:
            pass
        texts.update({i: output["text"] for i, output in finish(llm).items()})
        assert [texts[i] for i in ids] == [right, right]
        assert not llm.requests and llm.block_manager.num_used_blocks == 0
