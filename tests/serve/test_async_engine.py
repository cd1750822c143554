"""nanovllm/serve/async_engine.py: one thread owns the engine, and nobody waits for ever."""

import asyncio
import time
from functools import partial

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.engine.outputs import StepOutput

from .conftest import QUESTION, demo_engine

GREEDY = SamplingParams(temperature=0, max_tokens=24)


def with_engine(work, make=None, **options):
    """What `await work(engine)` returns; the engine is closed afterwards."""
    from nanovllm.serve import AsyncEngine

    async def run():
        async with AsyncEngine(make or partial(LLM, **demo_engine), **options) as engine:
            return await asyncio.wait_for(work(engine), 60)

    return asyncio.run(run())


async def text_of(engine, prompt, params=GREEDY):
    return "".join([output.text async for output in engine.generate(prompt, params)])


async def idle(engine):
    """Wait until nothing runs; all blocks must be free."""
    while not await engine.call(lambda llm: llm.is_finished()):
        await asyncio.sleep(0.01)
    assert not engine._owners and not engine.streams
    assert engine.llm.block_manager.num_used_blocks == 0


def test_many_at_once_say_what_generate_says(llm):
    prompts = [QUESTION, "What is TTFT?", "The KV cache", "paged"] * 4
    want = [output["text"] for output in llm.generate(prompts, GREEDY, use_tqdm=False)]

    async def work(engine):
        return await asyncio.gather(*(text_of(engine, prompt) for prompt in prompts))

    assert with_engine(work) == want


def test_who_leaves_early_gives_the_blocks_back():
    async def work(engine):
        endless = SamplingParams(temperature=0, max_tokens=2000, ignore_eos=True)
        outputs = engine.generate(QUESTION, endless)
        async for _ in outputs:
            break
        assert await engine.call(lambda llm: llm.block_manager.num_used_blocks) > 0
        steps = engine.llm.stats.steps
        await outputs.aclose()
        await idle(engine)
        assert engine.llm.stats.steps <= steps + 2
        assert engine.metrics.finished["abort"] == 1

    with_engine(work)


def test_a_cancelled_task_is_aborted_wherever_it_stands():
    async def work(engine):
        params = SamplingParams(max_tokens=500, ignore_eos=True)
        for turns in range(12):                      # so many turns of the event loop
            task = asyncio.create_task(text_of(engine, QUESTION, params))
            for _ in range(turns):
                await asyncio.sleep(0)
            if turns == 11:
                await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await idle(engine)

    with_engine(work)


def test_an_error_reaches_its_own_sender_alone(llm):
    want = llm.generate(QUESTION, GREEDY, use_tqdm=False)[0]["text"]

    async def work(engine):
        good = asyncio.create_task(text_of(engine, QUESTION))
        for wrong in ([], [10**9], "x " * 9000):
            with pytest.raises(ValueError, match="prompt"):
                await text_of(engine, wrong)
        with pytest.raises(ValueError):              # the good one of the two goes too
            await engine.add([(QUESTION, GREEDY), ([], GREEDY)])
        assert await good == want
        await idle(engine)

    with_engine(work)


def test_a_refused_request_takes_the_others_of_its_stream_along_before_any_step():
    async def work(engine):
        for _ in range(5):
            with pytest.raises(ValueError):
                await engine.add([(QUESTION, GREEDY), ([], GREEDY)])
        await idle(engine)
        assert engine.llm.stats.steps == 0 and engine.metrics.finished["abort"] == 5

    with_engine(work)


def test_what_came_before_an_error_is_read_before_it():
    from nanovllm.engine.outputs import StepOutput
    from nanovllm.serve.async_engine import Stream

    async def run():
        stream, seen = Stream(2, wants_pieces=True), []
        stream.put(0, StepOutput(1, "a", [1], None))
        with pytest.raises(TimeoutError):
            async for _, output in stream:
                if not seen:                         # while the reader is busy with the first
                    stream.put(1, StepOutput(2, "b", [2], None))
                    stream.fail(TimeoutError())
                seen.append(output.text)
        assert seen == ["a", "b"]

    asyncio.run(run())


def test_the_queue_is_bounded():
    from nanovllm.serve import QueueFull

    async def work(engine):
        stream = await engine.add([(QUESTION, SamplingParams(max_tokens=300))] * 3, False)
        with pytest.raises(QueueFull, match="3 requests are unfinished and at most 3"):
            await engine.add([(QUESTION, GREEDY)])
        engine.drop(stream)
        assert await text_of(engine, QUESTION)
        assert engine.metrics.refused == 1

    with_engine(work, partial(LLM, **demo_engine, max_num_seqs=2), max_waiting=1)


def test_an_answer_that_takes_too_long_is_an_error():
    async def work(engine):
        params = SamplingParams(max_tokens=4000, ignore_eos=True)
        stream = await engine.add([(QUESTION, params)], wants_pieces=False, timeout=0.1)
        with pytest.raises(TimeoutError, match="0.1 seconds"):
            await stream.results()
        engine.drop(stream)
        await idle(engine)

    with_engine(work)


def test_the_time_runs_while_a_request_waits_for_the_thread():
    async def work(engine):
        busy = asyncio.create_task(engine.call(lambda llm: time.sleep(1)))
        await asyncio.sleep(0)
        params = SamplingParams(max_tokens=4000, ignore_eos=True)
        stream = await engine.add([(QUESTION, params)], timeout=0.5)     # it takes a second
        with pytest.raises(TimeoutError):
            async for _ in stream:
                raise AssertionError("half a second was over before the first token")
        engine.drop(stream)
        await busy

    with_engine(work)


def test_after_an_error_a_stream_gives_nothing():
    """A step's outputs may be under way when the time is over."""
    from nanovllm.serve.async_engine import Stream

    async def work():
        stream = Stream(1, wants_pieces=True)
        stream.fail(TimeoutError())
        stream.put(0, StepOutput(0, "late", [5]))
        with pytest.raises(TimeoutError):
            async for _ in stream:
                raise AssertionError("it came after the error")

    asyncio.run(work())


def test_an_error_that_is_no_exception_reaches_who_asked():
    """A panic of Rust code, as in a tokenizer, is none; the engine goes on."""
    class Panic(BaseException):
        pass

    def fail(llm):
        raise Panic

    async def work(engine):
        with pytest.raises(Panic):
            await engine.call(fail)
        assert engine.is_alive and await text_of(engine, QUESTION)

    with_engine(work)


def test_a_dead_engine_tells_all_who_wait():
    from nanovllm.serve import EngineDead

    async def work(engine):
        def fail():
            raise RuntimeError("a worker died")

        deaths = []
        engine.on_death = lambda: deaths.append(engine.error)
        params = SamplingParams(max_tokens=4000, ignore_eos=True)
        tasks = [asyncio.create_task(text_of(engine, QUESTION, params)) for _ in range(3)]
        await asyncio.sleep(0.2)
        await engine.call(lambda llm: setattr(llm, "step", fail))
        for task in tasks:
            with pytest.raises(EngineDead):
                await task
        assert not engine.is_alive and [str(error) for error in deaths] == ["a worker died"]
        with pytest.raises(EngineDead):
            await text_of(engine, QUESTION)

    with_engine(work)


def test_closing_ends_what_runs():
    from nanovllm.serve import AsyncEngine, EngineDead

    async def run():
        engine = await AsyncEngine(partial(LLM, **demo_engine)).start()
        task = asyncio.create_task(text_of(engine, QUESTION, SamplingParams(
            max_tokens=4000, ignore_eos=True)))
        await asyncio.sleep(0.2)
        await engine.close()
        with pytest.raises(EngineDead):
            await task
        assert engine.error is None
        await engine.close()                         # a second time does nothing

    asyncio.run(run())


def test_a_model_that_cannot_be_loaded_is_an_error_of_start():
    from nanovllm.serve import AsyncEngine
    engine = AsyncEngine(partial(LLM, "/nowhere"))
    with pytest.raises(ValueError, match="nowhere"):
        asyncio.run(engine.start())


class Closed:
    """In place of an LLM: is it closed?"""

    def __init__(self):
        self.is_open = self.was_closed = False

    def __enter__(self):
        self.is_open = True

    def __exit__(self, *exception):
        self.was_closed = self.is_open


def test_who_no_longer_waits_for_the_model_leaves_no_engine_behind():
    from nanovllm.serve import AsyncEngine
    llm = Closed()
    engine = AsyncEngine(lambda: time.sleep(0.5) or llm)

    async def run():
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(engine.start(), 0.1)
        engine._thread.join(10)

    asyncio.run(run())
    assert llm.was_closed and engine.error is None


def test_a_server_that_cannot_be_made_closes_its_engine(monkeypatch):
    pytest.importorskip("uvicorn")
    from nanovllm.serve import server
    llm = Closed()
    llm.is_finished = lambda: True
    monkeypatch.setattr(server, "create_app", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(server.run_server(lambda: llm))
    assert llm.was_closed


def test_a_paused_engine_takes_the_steps_that_it_is_allowed():
    async def work(engine):
        await engine.call(lambda llm: setattr(engine, "is_paused", True))
        stream = await engine.add([(QUESTION, GREEDY)])
        await asyncio.sleep(0.1)
        assert engine.llm.stats.steps == 0
        await engine.call(lambda llm: setattr(engine, "steps_allowed", 2))
        while engine.llm.stats.steps < 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert engine.llm.stats.steps == 2
        await engine.call(lambda llm: setattr(engine, "is_paused", False))
        assert len(await stream.results()) == 1

    with_engine(work)


def test_an_idle_engine_does_not_spin():
    async def work(engine):
        await text_of(engine, QUESTION)
        before = time.process_time()
        await asyncio.sleep(0.5)
        return time.process_time() - before

    assert with_engine(work) < 0.2
