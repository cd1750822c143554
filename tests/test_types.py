"""What users call says its types: mypy checks the public files and a user's script, strictly."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.processes import ROOT, run_python

pytestmark = [pytest.mark.processes, pytest.mark.slow,
              pytest.mark.skipif(not find_spec("mypy"), reason="needs mypy")]

SCRIPT = """
from nanovllm import LLM, Config, SamplingParams

limits: int = Config.max_model_len
with LLM(device="cpu", num_kvcache_blocks=64) as llm:
    two = SamplingParams(n=2, max_tokens=3, stop=["."], stop_token_ids=[3], logit_bias={5: 1.0})
    texts: list[str] = [output["text"] for output in llm.generate(["Hi", [1, 2]], two)]
    texts += [llm.generate("Hi", [llm.default_sampling_params()])[0]["text"]]
    messages = [{"role": "user", "content": "Hi"}]
    texts += [output["text"] for output in llm.chat(messages, two, use_tqdm=False)]
    texts += list(llm.stream("Hi", SamplingParams(temperature=0.0)))
    number: int = llm.add_request([1, 2])
    while not llm.is_finished():
        texts += [news.text for news in llm.step()]
    llm.abort(number)
    rate: float = llm.stats.decode_throughput
"""
MISTAKES = ["SamplingParams(temprature=0.5)", "SamplingParams(n='2')", "LLM(model=3)",
            "LLM().generate(3)", "LLM().generate('Hi', {'n': 2})", "LLM().generate('Hi')[0].text",
            "LLM().chat('Hi')", "LLM().stream('Hi').text", "LLM().stats.tokens",
            "LLM().__enter__().tokens"]


@pytest.fixture(scope="module")
def mypy(tmp_path_factory):
    """A function: what mypy prints, as a user calls it at the top of the repository."""
    command = [sys.executable, "-m", "mypy", "--cache-dir", tmp_path_factory.mktemp("cache")]

    def check(*args):
        done = subprocess.run([*command, *args], cwd=ROOT, text=True, capture_output=True,
                              timeout=300, env={**os.environ, "MYPYPATH": str(ROOT)})
        assert not done.stderr
        return done.stdout
    return check


def test_public_files_are_strictly_typed(mypy):
    assert mypy() == "Success: no issues found in 5 source files\n"


def test_a_users_script_is_understood_and_runs(mypy, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    assert mypy(script) == "Success: no issues found in 1 source file\n"
    done = run_python(script)
    assert done.returncode == 0, done.stderr


def test_a_users_mistakes_are_found(mypy, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("\n".join(["from nanovllm import LLM, SamplingParams", *MISTAKES]) + "\n",
                      encoding="utf-8")
    found = mypy(script)
    assert [mistake for line, mistake in enumerate(MISTAKES, 2)
            if f"script.py:{line}: error:" not in found] == []
