"""tools/export.py on small notebooks made here: several days write into the same modules."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path.insert(0, str(TOOLS))
import export as exporter  # noqa: E402

DAY_1 = [
    '#| export config\n"""Settings."""\n\n'
    "from __future__ import annotations\nimport torch\nimport os",
    "#| export config\n#| echo: false\nclass Config:\n    size = os.sep",
    "assert 'this cell is not exported'",
    "#| export engine.sequence\nfrom enum import Enum\n\nclass Status(Enum):\n    WAITING = 1",
    "#| export engine.sequence\nfrom nanovllm.config import (\n    Config,\n)\n\n"
    "# Counts up.\n_ids = 0\n\n"
    "def make():\n    from nanovllm.config import Config as C\n    return C",
]
DAY_2 = [
    "#| export config\n# drawn from here\nimport random\nimport torch  # the library\n"
    "from os import sep, PathLike\n\ndef seed_all(n):\n    random.seed(n)",
    '#| export llm\n"""The API."""\nfrom nanovllm.config import Config\n'
    "try:\n    import flash_attn\nexcept ImportError:\n    flash_attn = None\n\nclass LLM: pass",
    '#| export __init__\n"""The package."""\nfrom nanovllm.llm import LLM',
]


@pytest.fixture
def days(tmp_path):
    """Writes notebooks from lists of cells, one list a day; returns their folder."""
    import nbformat

    def make(*cells_of_days):
        nbs = tmp_path / "nbs"
        nbs.mkdir(exist_ok=True)
        for day, cells in enumerate(cells_of_days, 1):
            cells = [nbformat.v4.new_code_cell(source) for source in cells]
            notebook = nbformat.v4.new_notebook(cells=cells)
            nbformat.write(notebook, nbs / f"{day:02}_day.ipynb")
        return nbs

    return make


def test_imports_of_all_days_stand_sorted_on_top(days):
    text = exporter.build(exporter.day_notebooks(days(DAY_1, DAY_2)))["config.py"]
    kinds = [type(node).__name__ for node in ast.parse(text).body]
    assert kinds == ["Expr", "ImportFrom", "Assign", *["Import"] * 2, "ImportFrom", "Import",
                     "ClassDef", "FunctionDef"]
    top = text[text.index("import os"):text.index("class Config")]
    assert top == ("import os\n# drawn from here\nimport random\nfrom os import PathLike, sep\n\n"
                   "import torch  # the library\n\n\n")
    assert "nbs/01_day.ipynb, nbs/02_day.ipynb" in text
    assert "echo" not in text and text.startswith('"""Settings."""\n')
    assert '__all__ = ["Config", "seed_all"]' in text


def test_own_imports_become_relative_wherever_they_stand(days):
    text = exporter.build(exporter.day_notebooks(days(DAY_1)))["engine/sequence.py"]
    assert "\nfrom ..config import Config\n" in text
    assert "    from ..config import Config as C\n" in text
    assert "# Counts up.\n_ids = 0\n\n" in text


def test_init_offers_what_it_imports(days):
    files = exporter.build(exporter.day_notebooks(days(DAY_1, DAY_2)))
    version = next(line for line in files["__init__.py"].splitlines() if "__version__" in line)
    assert version.startswith('__version__ = "')
    assert '__all__ = ["LLM"]' in files["__init__.py"]
    assert "from .llm import LLM\n" in files["__init__.py"]
    assert files["engine/__init__.py"] == ""
    # An import that may fail stays where its author has put it.
    assert "try:\n    import flash_attn\n" in files["llm.py"]


def test_two_exports_write_the_same_and_days_can_be_cut(days, tmp_path):
    nbs, lib = days(DAY_1, DAY_2), tmp_path / "nanovllm"
    (lib / "demo_model").mkdir(parents=True)
    (lib / "demo_model" / "config.json").write_text("{}")
    (lib / "by_hand.py").write_text("x = 1\n")
    files = exporter.export(lib, nbs=nbs)
    assert exporter.write(exporter.build(exporter.day_notebooks(nbs)), lib) == ([], [])
    assert "by_hand.py" in "".join(exporter.differences(files, lib))

    exporter.export(lib, upto=1, nbs=nbs)
    assert not (lib / "llm.py").exists() and (lib / "engine" / "sequence.py").exists()
    assert "seed_all" not in (lib / "config.py").read_text()
    assert (lib / "demo_model" / "config.json").exists() and (lib / "by_hand.py").exists()


def test_the_package_imports(days, tmp_path):
    exporter.export(tmp_path / "nanovllm", nbs=days(DAY_1, DAY_2))
    code = "import nanovllm.engine.sequence as s, nanovllm; print(s.make(), nanovllm.LLM)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.mark.parametrize("cell, complaint", [
    ("#| default_exp config", "default_exp"),
    ("#| export\nx = 1", "must name one module"),
    ("#| exporti config\nx = 1", "exporti"),
    ("#| export config\n%time x = 1", "not plain Python"),
    ("#| export config\nclass Config: pass", "defined twice"),
    ("#| export config\nfrom sys import os", "imported from two places"),
    ("#| export config\nfrom queue import Config", "both imported and defined"),
])
def test_what_cannot_be_exported_is_refused(days, cell, complaint):
    with pytest.raises(exporter.ExportError, match=complaint):
        exporter.build(exporter.day_notebooks(days(DAY_1, [cell])))


POOL = [
    "#| export pool\nclass Pool:\n    \"\"\"Blocks.\"\"\"\n\n"
    "    def take(self):\n        return self.free.pop()",
    "#| export pool\nimport torch\n\nclass Pool(Pool):\n    \"\"\"More.\"\"\"\n\n    # first in\n"
    "    @property\n    def size(self):\n        return 1  # one\n\n\ndef helper(): pass\n\n"
    "class Pool(Pool):\n    def give(self): pass",
]


def test_a_class_told_in_pieces_becomes_one(days):
    text = exporter.build(exporter.day_notebooks(days(POOL)))["pool.py"]
    assert text.endswith(
        'class Pool:\n    """Blocks."""\n\n    def take(self):\n        return self.free.pop()\n\n'
        "    # first in\n    @property\n    def size(self):\n        return 1  # one\n\n"
        "    def give(self): pass\n\n\ndef helper(): pass\n")


@pytest.mark.parametrize("days_of_cells, complaint", [
    ([POOL, ["#| export pool\nclass Pool(Pool):\n    def b(self): pass"]], "no class above it"),
    ([[*POOL, "#| export pool\nclass Pool(Pool):\n    def take(self): pass"]], "second time"),
    ([[*POOL, "#| export pool\nclass Pool(Pool):\n    def c(self): super().c()"]], "super"),
])
def test_pieces_that_would_not_fit_are_refused(days, days_of_cells, complaint):
    with pytest.raises(exporter.ExportError, match=complaint):
        exporter.build(exporter.day_notebooks(days(*days_of_cells)))


def test_overloads_and_late_imports_are_allowed(days):
    cell = ("#| export config\nfrom typing import overload\n@overload\ndef f(x: int): ...\n"
            "def f(x): return x\nos.environ['A'] = '1'\nimport triton  # noqa: E402")
    text = exporter.build(exporter.day_notebooks(days(DAY_1, [cell])))["config.py"]
    assert text.index("os.environ") < text.index("import triton")


# -----------------------------------------------------------------------------------------------
# Flagged cells run alone, with what they need
# -----------------------------------------------------------------------------------------------

def test_cells_that_a_flagged_cell_needs():
    from run_notebooks import needed
    cells = ["import math as m\nlimit = 3", "limit = 4", "print(limit)", "table = {}",
             "for i in range(2):\n    table[i] = i", "i = 'unused'", "class A:\n    x = 1",
             "class A(A):\n    def f(self): return table[limit]", "def unused(A): return A",
             "#| gpu\nA().f()"]
    assert needed(cells, {9}) == {1, 3, 4, 6, 7, 9}
    assert needed(cells, {2}) == {1, 2}
    assert needed(["x = 1", "x = x + 1", "y = [x for x in range(3)]", "y"], {3}) == {2, 3}
    assert needed(["x = 1", "x = x + 1", "x"], {2}) == {0, 1, 2}


def test_cells_by_id_side_by_side(tmp_path):
    import nbformat
    cells = {"base": "x = 2", "left": "#| gpu\nx + 1", "right": "#| gpu\nx + 2",
             "bad": "#| gpu\n1/0"}
    path = tmp_path / "two.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_code_cell(source, id=name) for name, source in cells.items()]), path)
    run = [sys.executable, str(TOOLS / "run_notebooks.py"), str(path), "--flags", "gpu",
           "--only-flagged", "--cells"]
    running = [subprocess.Popen([*run, name]) for name in ("left", "right")]
    assert [process.wait() for process in running] == [0, 0]
    shown = {cell.id: [out["data"]["text/plain"] for out in cell.outputs]
             for cell in nbformat.read(path, 4).cells}
    assert shown == {"base": [], "left": ["3"], "right": ["4"], "bad": []}
    wrong = subprocess.run([*run, "base"], capture_output=True, text=True)
    assert wrong.returncode and "no such cell with these flags: ['base']" in wrong.stderr


def test_the_gpu_script_runs_every_gpu_cell():
    import gpu_run
    from run_notebooks import directives
    named = [(day, ids) for day, *ids in (
        *gpu_run.CELLS, gpu_run.TIMED_CELLS, (7, gpu_run.BENCH_CELL))]
    for path in exporter.day_notebooks():
        day, flagged = exporter.day_of(path), set()
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "code" and "gpu" in directives("".join(cell["source"])):
                flagged.add(cell["id"])
        here = [ids for of, ids in named if of == day]
        assert [] in here or {name for ids in here for name in ids} == flagged, path.name
