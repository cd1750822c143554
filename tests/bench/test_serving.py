"""bench/serving.py: what HTTP costs."""

import re

import pytest

from tests.processes import ROOT, run_python

pytest.importorskip("uvicorn", reason="nanovllm/serve is an extra")
pytest.importorskip("nanovllm.serve", reason="nanovllm/serve is not there")


@pytest.mark.processes
def test_the_same_requests_both_ways():
    done = run_python("-m", "bench.serving", "--requests", "6", "--runs", "2", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for name in ("generate", "whole answers", "streams"):
        assert re.search(rf"^{name} +[\d,]+ tokens/s +\d+% \(\d+% to \d+%\)$", done.stdout, re.M)
    assert re.search(r"[\d.]+ ms by the library, [\d.]+ ms over HTTP", done.stdout)


@pytest.mark.processes
def test_a_server_that_does_not_start_says_why():
    done = run_python("-c", "from bench.serving import server\nwith server(['--port', 'x']): pass",
                      cwd=ROOT)
    assert "RuntimeError: the server did not start" in done.stderr and "--port" in done.stderr


def test_numbers_that_cannot_be_meant():
    done = run_python("-m", "bench.serving", "--runs", "0", cwd=ROOT)
    assert done.returncode == 2 and "--runs must be at least 1" in done.stderr
