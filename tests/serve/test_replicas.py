"""Two replicas of the demo engine behind one address, by Ray Serve."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from nanovllm import LLM, SamplingParams
from tools.export import ROOT

pytest.importorskip("ray.serve")
PROMPTS = ["A block", "TTFT", "The scheduler", "Decode is"] * 8


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    log = tmp_path_factory.mktemp("ray") / "log"
    command = [sys.executable, "-m", "tools.replicas", "--replicas", "2", "--port", "8765"]
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT,
                                   env={**os.environ, "PYTHONUNBUFFERED": "1"})
        until = time.monotonic() + 240
        while "2 replicas on" not in log.read_text():
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(1)
        yield "http://127.0.0.1:8765"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


def ask(address, prompt):
    httpx = pytest.importorskip("httpx")
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 12}
    answer = httpx.post(f"{address}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def replica_processes():
    found = subprocess.run(["pgrep", "-f", "^ray::ServeReplica"], capture_output=True, text=True)
    return {int(pid) for pid in found.stdout.split()}


@pytest.mark.slow
def test_answers_are_those_of_the_library_and_a_dead_replica_is_replaced(address):
    params = SamplingParams(temperature=0, max_tokens=12)
    with LLM() as llm:
        want = [output["text"] for output in llm.generate(PROMPTS, params, use_tqdm=False)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda prompt: ask(address, prompt), PROMPTS)) == want
    before = replica_processes()
    assert len(before) == 2
    os.kill(min(before), signal.SIGKILL)
    until = time.monotonic() + 120
    while len(replica_processes() - {min(before)}) < 2:
        assert time.monotonic() < until
        time.sleep(1)
    time.sleep(5)
    assert [ask(address, prompt) for prompt in PROMPTS[:4]] == want[:4]
