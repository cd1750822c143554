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


@pytest.fixture
def alarm():
    """SIGALRM raises TimeoutError, as a user's time limit may."""
    def handler(*args):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, handler)
    yield lambda: signal.raise_signal(signal.SIGALRM)
    signal.signal(signal.SIGALRM, before)


def test_any_signal_waits_and_each_does_what_it_does(ctrl_c, alarm):
    def handler(*args):
        done.append("Ctrl-C")
        raise KeyboardInterrupt

    done = []
    signal.signal(signal.SIGINT, handler)
    with pytest.raises(TimeoutError):
        with interrupt_afterwards():
            ctrl_c()
            alarm()
            done.append("the rest")
    assert done == ["the rest", "Ctrl-C"]


def test_they_come_at_once_where_they_may(ctrl_c, alarm):
    done = []
    with pytest.raises(TimeoutError):
        with interrupt_afterwards() as signals:
            ctrl_c()
            try:
                signals.let_in()
            except KeyboardInterrupt:
                done.append(signals.has_raised)
            alarm()                            # after one that raised, the next one waits
            done.append("the rest")
    assert done == [True, "the rest"]


def test_one_that_does_not_raise_changes_nothing(alarm):
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda *args: seen.append(args[0]))
    with pytest.raises(TimeoutError):
        with interrupt_afterwards() as signals:
            signal.raise_signal(signal.SIGUSR1)
            assert not seen
            signals.let_in()
            signal.raise_signal(signal.SIGUSR1)
            assert seen == [signal.SIGUSR1] * 2 and not signals.has_raised
            alarm()
    signal.signal(signal.SIGUSR1, before)


def test_a_handler_that_exchanges_itself(ctrl_c):
    """The usual way to make the second Ctrl-C end the program."""
    signal.signal(signal.SIGINT, lambda *args: signal.signal(signal.SIGINT, signal.SIG_DFL))
    with interrupt_afterwards() as signals:
        signals.let_in()
        ctrl_c()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL


def test_what_is_no_python_function_stays(ctrl_c):
    for handler in (signal.SIG_DFL, signal.SIG_IGN):
        signal.signal(signal.SIGINT, handler)
        with interrupt_afterwards():
            assert signal.getsignal(signal.SIGINT) is handler


def test_one_in_another(ctrl_c):
    done = []
    with pytest.raises(KeyboardInterrupt):
        with interrupt_afterwards():
            with interrupt_afterwards():
                ctrl_c()
            done.append("the rest")
    assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler


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
