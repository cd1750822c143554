"""Each stub is refused with a word that helps, each answer accepted, each wrong answer named."""

import ast
import dis
import importlib
import importlib.util
import json
import linecache
import os
import re
from collections import Counter
from pathlib import Path

import pytest
import turns

from tests.processes import environment, run_python

# The kernels of appendix B need Triton's interpreter, chosen before any import of Triton: they run
# in a process of their own (the last test here).
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = {path.stem: path for path in [*sorted(ROOT.glob("nbs/0*.ipynb")),
                                          *sorted(ROOT.glob("nbs/appendix/*.ipynb"))]}


def module_of(stem):
    """01_foundations → day1, B_gpu → appendix_b."""
    return f"day{int(stem[:2])}" if stem[0] == "0" else f"appendix_{stem[0].lower()}"


def name_in(source):
    """The function that a stub defines."""
    return re.search(r"^(?:async )?def (\w+)", source, re.M)[1]


def is_for_here(module):
    """Whether the turns of this module are tried in this process."""
    return (module == "appendix_b") == INTERPRETED


def stubs():
    """(source, name) of each cell tagged `your-turn`."""
    for stem, path in NOTEBOOKS.items():
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if "your-turn" in cell["metadata"].get("tags", []):
                source = "".join(cell["source"])
                name = name_in(source)
                yield pytest.param(source, name, id=f"{module_of(stem)}-{name}", marks=[] if
                                   is_for_here(module_of(stem)) else pytest.mark.skip)


def wrong_answers():
    """(name, function, word) of each typical wrong answer."""
    for path in sorted((ROOT / "tests" / "course" / "wrong").glob("[a-z]*.py")):
        if not is_for_here(path.stem):
            continue
        module = importlib.import_module(f"tests.course.wrong.{path.stem}")
        for name, function, word in module.WRONG:
            said = getattr(function, "__name__", "a class")
            yield pytest.param(name, function, word, id=f"{path.stem}-{name}-{said}")


STUBS, WRONG = list(stubs()), list(wrong_answers())


@pytest.mark.parametrize("source, name", STUBS)
def test_a_stub_is_refused_and_its_answer_accepted(source, name):
    space, file = {"__name__": "learner"}, f"<{name}>"
    linecache.cache[file] = len(source), None, source.splitlines(True), file    # Triton reads it
    exec(compile(source, file, "exec"), space)
    defined = [node for node in ast.parse(source).body
               if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert ast.get_docstring(defined[-1]), "a stub says in its docstring what is to be written"
    assert turns.verdict(space[name]) == "not written yet"
    grader = turns.grader_of(name)
    answers = importlib.import_module(f"turns.answers.{grader.__module__.removeprefix('turns.')}")
    assert turns.verdict(getattr(answers, name)) == "right"
    assert len([param for param in WRONG if param.values[0] == name]) >= 3


@pytest.mark.parametrize("name, function, word", WRONG)
def test_a_wrong_answer_is_named(name, function, word):
    grader = turns.grader_of(name)
    with pytest.raises(turns.Wrong) as wrong:
        grader(function)
    assert word in f"{wrong.value.what} {wrong.value.hint}"


def test_every_grader_has_its_stub():
    for module in turns.modules():
        importlib.import_module(f"turns.{module}")
    assert set(turns.GRADERS) == {param.values[1] for param in STUBS}


@pytest.mark.parametrize("path", NOTEBOOKS.values(), ids=lambda path: path.stem)
def test_every_stub_is_graded_in_the_next_cell(path):
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
             if cell["cell_type"] == "code"]
    for cell, after in zip(cells, cells[1:]):
        if "your-turn" in cell["metadata"].get("tags", []):
            name = name_in("".join(cell["source"]))
            assert f"grade({name})" in "".join(after["source"])


@pytest.mark.parametrize("path", NOTEBOOKS.values(), ids=lambda path: path.stem)
def test_no_cell_overwrites_what_turns_gave(path):
    """`answer("…")` and `grade` must work to the end of a notebook."""
    given, stored = Counter(), Counter()
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or source.startswith("%%"):
            continue
        source = re.sub(r"^\s*[%!].*$", "pass", source, flags=re.M)
        given.update(name.asname or name.name for node in ast.walk(ast.parse(source))
                     if isinstance(node, ast.ImportFrom) and node.module == "turns"
                     for name in node.names)
        top = compile(source, path.name, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        stored.update(part.argval for part in dis.get_instructions(top)
                      if part.opname in ("STORE_NAME", "STORE_GLOBAL"))
    assert given and {name: stored[name] for name in given} == given


def test_the_verdicts(capsys):
    def attention(x):                        # no turn has this name
        return x
    with pytest.raises(KeyError, match="no turn is named"):
        turns.grade(attention)
    with pytest.raises(KeyError, match="no answer is named"):
        turns.answer("attention")


def exercises():
    """The answers to exercises that are code: functions that hold their own check."""
    for module in filter(is_for_here, turns.modules(turns.HERE / "answers")):
        for name, thing in vars(importlib.import_module(f"turns.answers.{module}")).items():
            if name.startswith("exercise_"):
                yield pytest.param(thing, id=name)


@pytest.mark.parametrize("exercise", list(exercises()))
def test_the_answer_to_an_exercise_is_right(exercise):
    assert exercise.__doc__
    exercise()


@pytest.mark.skipif(INTERPRETED, reason="they run in this process")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.processes
def test_the_kernels_of_appendix_b():
    done = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", __file__,
                      env=environment(TRITON_INTERPRET="1"), timeout=300)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
