"""example.py, the main job, as a user starts it."""

import json
import os
import re
import shutil
import sys

import pytest
import torch

import example
from tests.processes import ROOT, run_python

pytestmark = [pytest.mark.processes, pytest.mark.slow]
DATA = json.loads((ROOT / "tools" / "course_qa.json").read_text(encoding="utf-8"))
ANSWERS = {question: entry["answer"] for entry in DATA["entries"]
           for question in entry["questions"]}


def run(*args, cwd=ROOT):
    """The finished process of `python example.py ...`."""
    return run_python(ROOT / "example.py", *args, timeout=300, cwd=cwd)


def test_users_share_a_prompt_and_all_get_their_answers(tmp_path):
    done = run(cwd=tmp_path)  # from anywhere
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert example.SYSTEM_PROMPT == DATA["system_prompt"]
    for question in example.QUESTIONS.values():
        assert " ".join(ANSWERS[question].split()) in text, question
    computed, cached = map(int, re.search(r"(\d+) computed, (\d+) served", text).groups())
    assert cached > computed / 2            # the system prompt was computed once
    assert "preemptions 0" in text and "blocks in use at the peak" in text
    assert "prefill" in done.stderr and "decode" in done.stderr      # the progress bar


def test_little_memory_changes_no_answer():
    done = run("--num-kvcache-blocks", "20")
    text = " ".join(done.stdout.split())
    assert all(" ".join(ANSWERS[q].split()) in text for q in example.QUESTIONS.values())
    assert int(re.search(r"preemptions (\d+)", text)[1]) > 0


def test_prompts_of_ones_own_streamed_or_not():
    questions = ["What is a block table?", "What is top-p?"]
    args = [arg for question in questions for arg in ("--prompt", question)]
    for extra in ([], ["--stream"]):
        text = " ".join(run(*args, *extra).stdout.split())
        assert all(" ".join(ANSWERS[question].split()) in text for question in questions)


def test_another_model_gets_no_prompt_of_the_course_and_its_own_length(tmp_path):
    folder = shutil.copytree(ROOT / "nanovllm" / "demo_model", tmp_path / "mine")
    asked = ["--prompt", "What is a block table?"]
    tokens = [int(re.search(r"of (\d+) prompt tokens", run(*asked, *more).stdout)[1]) for more in
              ([], ["--model", str(folder)], ["--system", "Be brief.", "--model", str(folder)])]
    assert tokens[1] < tokens[2] < tokens[0]
    positions = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    assert example.own_length(folder) == positions


@pytest.mark.parametrize("args, complaint", [
    (["--top-p", "3"], "top_p"), (["--model", "no-such-folder"], "no-such-folder"),
    (["--device", "abacus"], "device"), (["--num-kvcache-blocks", "2"], "num_kvcache_blocks"),
])
def test_a_mistake_is_one_line_that_names_it(args, complaint):
    done = run(*args)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(rf"^error: .*{complaint}", done.stderr, re.MULTILINE)


def test_help_names_the_options():
    text = run("--help").stdout
    for option in ("--model", "--prompt", "--stream", "--temperature", "--top-k", "--top-p",
                   "--seed"):
        assert option in text


@pytest.mark.parametrize("args, env, load, threads", [
    ([], {}, 0.0, 1),                                          # the demo model
    (["--model", "m"], {}, 0.0, 4), (["--model", "m"], {}, 3.2, 4), (["--model", "m"], {}, 6.2, 2),
    (["--model", "m"], {}, 99.0, 1), (["--model", "m", "--threads", "3"], {}, 99.0, 3),
    (["--model", "m"], {"OMP_NUM_THREADS": "4"}, 99.0, None),  # the user has chosen
])
def test_threads_are_the_idle_cores(monkeypatch, args, env, load, threads):
    chosen = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(sys, "argv", ["example.py", *args, "--top-p", "3"])   # no model is loaded
    with pytest.raises(SystemExit, match="top_p"):
        example.main()
    assert chosen == ([] if threads is None else [threads])
