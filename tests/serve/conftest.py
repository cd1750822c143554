"""A server in this process: a thread with an event loop, the engine's thread, a free port."""

import asyncio
import socket
import threading
import time
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
pytest.importorskip("nanovllm.serve", reason="the room was removed")
pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")

QUESTION = "What is a block table?"
demo_engine = dict(device="cpu", dtype="float32", num_kvcache_blocks=128)


def until(condition, seconds=20.0):
    """Wait for what other threads do; AssertionError if it does not come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


@contextmanager
def serving(make, max_waiting=256, **options):
    """A server around the LLM that `make` makes: its url, its engine, its loop."""
    import uvicorn

    from nanovllm.serve import AsyncEngine
    from nanovllm.serve.api import create_app
    found, ready = SimpleNamespace(), threading.Event()

    async def run():
        async with AsyncEngine(make, max_waiting) as engine:
            app = create_app(engine, **options)
            found.engine, found.loop = engine, asyncio.get_running_loop()
            found.server = uvicorn.Server(uvicorn.Config(
                app, log_level="error", lifespan="off", timeout_graceful_shutdown=2))
            ready.set()
            await found.server.serve([sock])

    with socket.create_server(("127.0.0.1", 0)) as sock:
        found.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        thread = threading.Thread(target=asyncio.run, args=(run(),))
        thread.start()
        assert ready.wait(60)
        until(lambda: found.server.started)
        try:
            yield found
        finally:
            found.server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture(scope="session")
def llm():
    """The same engine without a server: what it says is right."""
    from nanovllm import LLM
    with LLM(**demo_engine) as engine:
        yield engine


@pytest.fixture(scope="module")
def server():
    """A server of the demo model."""
    from nanovllm import LLM
    with serving(partial(LLM, **demo_engine)) as found:
        yield found


@pytest.fixture
def client(server):
    """The real client, without retries."""
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    """After each test that uses the server no request is unfinished and every block is free."""
    yield
    if "server" in request.fixturenames:
        engine = request.getfixturevalue("server").engine
        if engine.is_alive:
            until(lambda: engine.llm.is_finished() and not engine.streams
                  and not engine._owners and not engine.llm.block_manager.num_used_blocks)
