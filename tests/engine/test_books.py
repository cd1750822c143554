"""A turn leaves the books right, whatever ends it: errors, signals, finalizers, at any line."""

import gc
import random
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from tqdm import tqdm

import nanovllm
from nanovllm import LLM, SamplingParams
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.scheduler import Scheduler
from nanovllm.utils.context import get_context, set_context
from tests.parity import finish

PACKAGE = str(Path(nanovllm.__file__).parent)
GREEDY = SamplingParams(temperature=0, max_tokens=8)
SMALL = dict(device="cpu", num_kvcache_blocks=12, kvcache_block_size=4, max_model_len=40,
             max_num_batched_tokens=24, check_books=True)


class Boom(BaseException):
    """What no part of the engine expects."""


@pytest.fixture
def llm(good):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with LLM(good[0], **SMALL) as llm:
        yield llm
    signal.signal(signal.SIGINT, before)


def is_right(llm, good):
    """Nothing is left, no block is lost, and the next answers are right."""
    assert llm.is_finished() and not llm.requests and not llm.block_manager.num_used_blocks
    llm.check_books()
    outs = llm.generate([good[1]] * 2, GREEDY, use_tqdm=False)
    assert [out["token_ids"] for out in outs] == [good[2]] * 2


class Strike:
    """`act` is called in front of line number `at` of the package, counted as they are run."""

    def __init__(self, act, *at):
        self.act, self.at, self.count = act, set(at), 0

    def _in_package(self, frame, event, arg):
        return self._at_line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _at_line(self, frame, event, arg):
        if event == "line":
            self.count += 1
            # no error begins in the turn's own lines, which only set flags; signals wait there
            is_flag = self.act is boom and frame.f_code.co_name == "_turn"
            if self.count in self.at and not is_flag:
                self.act()
        return self._at_line

    def __enter__(self):
        sys.settrace(self._in_package)
        return self

    def __exit__(self, *exception):
        sys.settrace(None)


def boom():
    raise Boom


def interrupt():
    signal.raise_signal(signal.SIGINT)


def generate(llm, prompt):
    llm.generate([prompt, prompt[:6]], GREEDY, use_tqdm=False)


def leave(llm, prompt):
    request_id = llm.add_request(prompt, GREEDY)
    llm.step()
    llm.abort(request_id)


def step(llm, prompt):
    llm.add_request(prompt[:6], GREEDY)
    llm.step()


def strike(llm, good, work, act, *at):
    """`act` in the midst of `work`; a request from before must not notice. Lines that were run."""
    other, found = llm.add_request(good[1], GREEDY), []
    with Strike(act, *at) as lines:
        try:
            work(llm, good[1])
        except (Boom, KeyboardInterrupt):
            pass
    if act is interrupt:
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, signal.default_int_handler)
    llm.check_books()
    outputs = finish(llm)
    if other in outputs:
        found = outputs[other]["token_ids"]
    assert found == good[2]
    is_right(llm, good)
    with pytest.raises(RuntimeError, match="no step in flight"):
        get_context()
    return lines.count


@pytest.mark.parametrize("work", [generate, leave, step])
@pytest.mark.parametrize("act, times", [(interrupt, 1), (interrupt, 2), (boom, 1)],
                         ids=["signal", "two", "error"])
def test_anything_at_any_line(work, act, times, llm, good):
    rng = random.Random(1)
    lines = strike(llm, good, work, boom, 10**9)
    for _ in range(25):
        first = rng.randrange(lines)
        strike(llm, good, work, act, *[first + rng.randrange(40) * i for i in range(times)])


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("work", [generate, leave, step])
@pytest.mark.parametrize("act", [interrupt, boom])
def test_anything_at_every_line(work, act, llm, good):
    lines = strike(llm, good, work, boom, 10**9)
    for at in range(1, lines, 3):
        strike(llm, good, work, act, at)


def test_an_error_in_a_steps_last_line_leaves_no_step_in_flight(llm, good, monkeypatch):
    @contextmanager
    def left_open(context):
        set_context(context)
        yield context
        raise Boom

    monkeypatch.setattr("nanovllm.engine.model_runner.use_context", left_open)
    with pytest.raises(Boom):
        llm.generate([good[1]], GREEDY, use_tqdm=False)
    with pytest.raises(RuntimeError, match="no step in flight"):
        get_context()
    monkeypatch.undo()
    is_right(llm, good)


def test_an_interrupt_leaves_no_progress_bar_locked(llm, good, monkeypatch):
    """All bars of a process share a lock; those of other threads would wait for ever."""
    def can_take_lock():
        taken = [lock for lock in tqdm.get_lock().locks if lock.acquire(timeout=5)]
        for lock in taken:
            lock.release()
        return len(taken) == len(tqdm.get_lock().locks)

    display = tqdm.display
    monkeypatch.setattr(tqdm, "display", lambda *args, **kwargs: (interrupt(), display(*args)))
    with pytest.raises(KeyboardInterrupt):
        llm.generate([good[1]], GREEDY)
    monkeypatch.undo()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(can_take_lock).result()
    is_right(llm, good)


@pytest.mark.parametrize("owner, method", [
    (BlockManager, "_take"), (BlockManager, "_release"), (BlockManager, "publish"),
    (Scheduler, "_add_row"), (Scheduler, "finish"), (LLMEngine, "_report"),
    (LLMEngine, "_forget")])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_error_in_the_books(owner, method, when, llm, good, monkeypatch):
    inner, calls = getattr(owner, method), []

    def fail(self, *args):
        calls.append(args)
        if when == "before" and len(calls) == 3:
            raise Boom
        result = inner(self, *args)
        if when == "after" and len(calls) == 3:
            raise Boom
        return result

    monkeypatch.setattr(owner, method, fail)
    ids, outputs = [llm.add_request(good[1], GREEDY) for _ in range(3)], {}
    while not llm.is_finished():
        try:
            outputs.update({out.request_id: out.output for out in llm.step() if out.output})
        except Boom:
            llm.check_books()
    assert len(calls) >= 3
    assert [outputs[i]["token_ids"] for i in ids] == [good[2]] * 3
    is_right(llm, good)


def test_recovery_that_is_cut_short(llm, good, monkeypatch):
    """Two errors: in the step, and while the books are put right. The next turn begins with it."""
    ids, reset, calls = [llm.add_request(good[1], GREEDY) for _ in range(2)], BlockManager.reset, []

    def fail_once(self):
        calls.append(reset(self))
        if len(calls) == 1:
            raise Boom

    llm.step()
    monkeypatch.setattr(BlockManager, "reset", fail_once)
    with monkeypatch.context() as patch:
        patch.setattr(llm.runner, "run", lambda batch: boom())
        with pytest.raises(Boom):
            llm.step()
    outputs = finish(llm)
    assert len(calls) == 2 and [outputs[i]["token_ids"] for i in ids] == [good[2]] * 2
    is_right(llm, good)


def test_what_was_reported_reaches_somebody(llm, good, monkeypatch):
    """A signal between a step and its caller: the outputs come with the next one."""
    llm.add_request(good[1], SamplingParams(temperature=0, max_tokens=1))

    class Lock:
        def __enter__(self):
            lock.__enter__()

        def __exit__(self, *exception):
            lock.__exit__(*exception)
            raise KeyboardInterrupt

    lock = llm._lock
    llm._lock = Lock()
    with pytest.raises(KeyboardInterrupt):
        llm.step()
    llm._lock = lock
    assert [out.output["token_ids"] for out in llm.step()] == [good[2][:1]]


def in_the_middle(llm, monkeypatch, call):
    """Call something in the middle of the next step; what it returned or raised."""
    run, found = llm.runner.run, []

    def busy(batch):
        if not found:
            try:
                found.append(call())
            except RuntimeError as error:
                found.append(str(error))
        return run(batch)

    monkeypatch.setattr(llm.runner, "run", busy)
    return found


def test_an_abort_in_the_middle_of_a_step(llm, good, monkeypatch):
    """As a finalizer or a signal handler does: the request ends with the step."""
    gone, other = (llm.add_request(good[1], GREEDY) for _ in range(2))
    found = in_the_middle(llm, monkeypatch, lambda: llm.abort(gone))
    llm.step()
    assert found == [None] and list(llm.requests) == [other]
    assert finish(llm)[other]["token_ids"] == good[2]
    is_right(llm, good)


@pytest.mark.parametrize("call", ["step", "add_request", "generate"])
def test_a_call_in_the_middle_of_a_step(call, llm, good, monkeypatch):
    other = llm.add_request(good[1], GREEDY)
    ask = {"step": llm.step, "add_request": lambda: llm.add_request(good[1]),
           "generate": lambda: llm.generate([good[1]], use_tqdm=False)}[call]
    found = in_the_middle(llm, monkeypatch, ask)
    llm.step()
    assert "in the middle of a step" in found[0]
    assert finish(llm)[other]["token_ids"] == good[2]
    is_right(llm, good)


def test_close_in_the_middle_of_a_step(llm, good, monkeypatch):
    llm.add_request(good[1], GREEDY)
    in_the_middle(llm, monkeypatch, llm.close)
    llm.step()
    assert llm.is_finished() and not hasattr(llm, "runner")
    with pytest.raises(RuntimeError, match="closed"):
        llm.step()


class Reader:
    """Knows itself, so that only the garbage collector ends it."""

    def __init__(self, stream):
        self.stream, self.me = stream, self


@pytest.mark.parametrize("owner, method", [
    (Scheduler, "_add_row"), (Scheduler, "postprocess"), (BlockManager, "_take"),
    (LLMEngine, "_report"), (LLMEngine, "_recover")])
def test_a_stream_that_is_collected_in_the_middle_of_a_step(owner, method, demo, monkeypatch):
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    right = demo.generate("What is RoPE?", params, use_tqdm=False)[0]["token_ids"]
    streams = [demo.stream(text, params) for text in ("What is RoPE?", "What is prefill?")]
    for stream in streams:
        next(stream)
    del stream
    other, inner = demo.add_request("What is RoPE?", params), getattr(owner, method)

    def collect(self, *args):
        monkeypatch.setattr(owner, method, inner)
        gc.collect(0)
        return inner(self, *args)

    gc.collect()
    gc.freeze()                        # what is there now is looked at no more, but for readers
    readers = [Reader(stream) for stream in streams]
    del streams, readers
    monkeypatch.setattr(owner, method, collect)
    if method == "_recover":
        with monkeypatch.context() as patch:
            patch.setattr(demo.runner, "run", lambda batch: boom())
            with pytest.raises(Boom):
                demo.step()
    outputs = finish(demo)
    gc.unfreeze()
    assert list(outputs) == [other] and outputs[other]["token_ids"] == right
    assert not demo.requests and not demo.block_manager.num_used_blocks
    demo.check_books()


def test_a_constructor_that_fails_behind_its_runner(good, monkeypatch):
    closed = []
    monkeypatch.setattr(LLMEngine, "_make_stepper", lambda self: boom())
    monkeypatch.setattr(ModelRunner, "close", lambda self: closed.append(self))
    with pytest.raises(Boom):
        LLM(good[0], **SMALL)
    assert len(closed) == 1


def test_books_that_are_wrong_are_seen_at_once(llm, good, monkeypatch):
    free = BlockManager.free
    monkeypatch.setattr(BlockManager, "free", lambda self, seq: None)
    llm.add_request(good[1], SamplingParams(temperature=0, max_tokens=1))
    with pytest.raises(RuntimeError, match="the books are wrong: .*held by 0"):
        llm.step()
    monkeypatch.setattr(BlockManager, "free", free)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGALRM])
def test_signals_at_random_times(number, llm, good, monkeypatch):
    """Each raises; after each the books are right, and later answers too.

    Python itself drops what a handler raises in the middle of a finalizer or of a callback of the
    garbage collector (hypothesis has one): it tells sys.unraisablehook.
    """
    def handler(*args):
        raise Boom

    before, rng = signal.signal(signal.SIGALRM, handler), random.Random(3)
    if number == signal.SIGINT:
        signal.signal(signal.SIGALRM, lambda *args: interrupt())
    hits, swallowed = 0, []
    monkeypatch.setattr(sys, "unraisablehook", lambda about: swallowed.append(about.exc_type))
    for trial in range(1000):
        try:
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 0.02))
            while len(swallowed) + hits == trial:
                generate(llm, good[1])
        except (Boom, KeyboardInterrupt):
            hits += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        is_right(llm, good)
    signal.signal(signal.SIGALRM, before)
    assert hits + len(swallowed) == 1000 and len(swallowed) < 20
