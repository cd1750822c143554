"""nanovllm/serve/live.py and page.html: what the page is told, and what it shows in a browser."""

import asyncio
import http.client
import json
import shutil
from functools import partial
from urllib.parse import urlsplit

import pytest

from nanovllm import LLM

from .conftest import demo_engine, serving, until
from .test_api import ASK, send

SMALL = {**demo_engine, "num_kvcache_blocks": 16, "max_num_seqs": 8, "max_num_batched_tokens": 64}


def pictures(url):
    """What GET /live tells, one by one."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    connection.request("GET", "/live")
    response = connection.getresponse()
    try:
        while line := response.readline():
            if line.startswith(b"data: "):
                yield json.loads(line[6:])
    finally:
        connection.close()


def ask_all(url, count):
    """So many endless requests, which nobody reads; returns their connections."""
    connections = []
    for i in range(count):
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
        connection.request("POST", "/v1/completions", json.dumps({
            "prompt": f"{i} asks", "max_tokens": 100, "ignore_eos": True, "temperature": 0}),
            {"Content-Type": "application/json"})
        connections.append(connection)
    return connections


def test_pictures_agree_with_themselves():
    with serving(partial(LLM, **SMALL)) as server:
        assert not server.engine.after_step.__self__.watchers
        seen = pictures(server.url)
        assert next(seen)["blocks"] == [-1] * 16
        connections = ask_all(server.url, 6)
        steps = []
        for now in seen:
            held = sum(holder >= 0 for holder in now["blocks"])
            assert held == now["used"] and now["num_blocks"] == 16
            assert {h for h in now["blocks"] if h >= 0} <= {r["id"] for r in now["running"]}
            steps += now["rows"]
            assert all(sum(n for _, n in rows) <= 64 for rows in now["rows"])
            if now["generated"] >= 600 and not now["running"] and not now["waiting"]:
                break
        assert now["preemptions"] > 0 and max(map(len, steps)) > 2
        assert any(holder == -2 for holder in now["blocks"])
        for connection in connections:
            assert connection.getresponse().status == 200
            connection.close()
        seen.close()
        until(lambda: not server.engine.after_step.__self__.watchers)


def test_who_watches_misses_no_step_because_of_another():
    from nanovllm.serve import AsyncEngine, EngineDead
    from nanovllm.serve.live import Live

    async def run():
        async with AsyncEngine(partial(LLM, **SMALL)) as engine:
            live, rows = Live(engine, False), [[[7, 1]]]
            first, second = live.pictures(), live.pictures()
            await anext(first)
            live.rows = list(rows)                   # a step, since the first one's picture
            assert json.loads((await anext(second))[6:])["rows"] == rows
            assert json.loads((await anext(first))[6:])["rows"] == rows
            live.rows = list(rows)
            assert json.loads((await anext(second))[6:])["rows"] == rows     # after 0.3 s
            assert json.loads((await anext(first))[6:])["rows"] == rows

            async def dead(function):
                raise EngineDead("the engine has stopped")

            engine.call = dead                       # it dies while a picture is asked for
            assert [seen async for seen in first] == []
            await second.aclose()
            assert not live.watchers

    asyncio.run(run())


def test_a_playground_is_paused_stepped_and_changed():
    with serving(partial(LLM, **SMALL), playground=True) as server:
        assert send(server.url, "/live", {"pause": True, "max_num_seqs": 2, "budget": 3})[0] == 204
        connections = ask_all(server.url, 4)
        until(lambda: len(server.engine.llm.scheduler.waiting) == 4)
        assert server.engine.llm.stats.steps == 0
        send(server.url, "/live", {"step": 2})
        until(lambda: server.engine.llm.stats.steps == 2)
        now = next(pictures(server.url))
        assert (now["paused"], now["steps"], now["num_waiting"]) == (True, 2, 2)
        assert (now["budget"], now["max_num_seqs"]) == (3, 2)
        for wrong in ({"budget": 0}, {"max_num_seqs": "x"}, {"step": -1}):
            assert send(server.url, "/live", wrong)[0] == 400
        send(server.url, "/live", {"pause": False})
        for connection in connections:
            assert connection.getresponse().status == 200
            connection.close()


def test_without_a_playground_nobody_may_change_anything(server):
    assert send(server.url, "/live", {"pause": True})[0] == 405
    status, headers, text = send(server.url, "/")
    assert status == 200 and headers["content-type"].startswith("text/html")
    assert "connect-src 'self'" in headers["content-security-policy"]
    assert "http://" not in text and "https://" not in text      # no foreign host


def test_the_server_does_not_wait_for_who_only_watches():
    with serving(partial(LLM, **SMALL)) as server:
        app = server.server.config.app
        app.state.live.is_over = lambda: server.server.should_exit
        seen = pictures(server.url)
        next(seen)
        server.server.should_exit = True
        assert len(list(seen)) < 5


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("width, scheme", [(1280, "light"), (390, "dark")])
def test_in_a_browser(width, scheme):
    """Chromium: conversations are answered, blocks are drawn, pause and step work, nothing is
    wider than the window."""
    api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("there is no Chromium")
    with serving(partial(LLM, **SMALL), playground=True) as server, api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_context(viewport={"width": width, "height": 800},
                                   color_scheme=scheme).new_page()
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda said: said.type == "error" and errors.append(said.text))
        page.goto(server.url)
        page.wait_for_selector('#state:text-is("idle")')
        page.click("#pause")
        page.wait_for_selector('#state:text-is("paused")')
        while page.locator(".talk").count() < 8:
            page.click("#more")
        page.fill("#question", ASK["messages"][0]["content"])
        page.click("#all button.main")
        page.wait_for_selector("#requests tr:nth-child(4)")
        assert "waits" in page.inner_text("#requests")
        page.click("#step")
        page.wait_for_selector("#steps .prefill")
        assert server.engine.llm.stats.steps == 1
        page.click("#pause")
        until(lambda: all(said.strip().endswith("may lie anywhere.")
                          for said in page.locator(".said").all_inner_texts()), 60)
        assert int(page.locator("#facts b").last.inner_text()) > 0           # preemptions
        assert page.locator("#pool i").count() == 16
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert not errors
        browser.close()
