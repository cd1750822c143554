"""tools/export.py on small notebooks made here: several days write into the same modules."""

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tools import export as exporter
from tools.run_notebooks import directives, needed, select

ROOT = exporter.ROOT

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
CARD = "# A room\n\n| | |\n|---|---|\n| **Needs** | days 1 to 1 · an hour |"
ROOM = [
    "from cmagic import register\nfolder = register(FOLDER)",
    "%%c common.h\n// What all kernels share\n#define N 4",
    "%%c sum.c\n// A sum\n#include \"common.h\"\nint sum(int x) { return x + N; }\n",
    "%%c sum.c\n/* And a product */\nint product(int x) { return x * N; }",
    '#| export cpu.__init__\n"""The room."""\nfrom nanovllm.config import Config\n\nBACKENDS = ()',
]


def notebook(path: Path, cells: list[str], first: str = "") -> Path:
    """Write a notebook of code cells, after a markdown cell where there is a `first`."""
    import nbformat
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [nbformat.v4.new_code_cell(source) for source in cells]
    if first:
        cells.insert(0, nbformat.v4.new_markdown_cell(first))
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


@pytest.fixture
def days(tmp_path):
    """Writes notebooks from lists of cells, one list a day, and an appendix; returns the folder."""
    def make(*cells_of_days, room=None, card=CARD):
        nbs = tmp_path / "nbs"
        for day, cells in enumerate(cells_of_days, 1):
            notebook(nbs / f"{day:02}_day.ipynb", cells)
        if room is not None:
            notebook(nbs / "appendix" / "A_cpu.ipynb", room, card)
        return nbs

    return make


def build(nbs: Path, **part) -> dict[str, str]:
    return exporter.build(exporter.select(nbs, **part))


# -----------------------------------------------------------------------------------------------
# Modules
# -----------------------------------------------------------------------------------------------

@pytest.mark.processes
@pytest.mark.slow
def test_imports_of_all_days_stand_sorted_on_top(days):
    text = build(days(DAY_1, DAY_2))["config.py"]
    kinds = [type(node).__name__ for node in ast.parse(text).body]
    assert kinds == ["Expr", "ImportFrom", "Assign", *["Import"] * 2, "ImportFrom", "Import",
                     "ClassDef", "FunctionDef"]
    top = text[text.index("import os"):text.index("class Config")]
    assert top == ("import os\n# drawn from here\nimport random\nfrom os import PathLike, sep\n\n"
                   "import torch  # the library\n\n\n")
    assert "nbs/01_day.ipynb, nbs/02_day.ipynb" in text
    assert "echo" not in text and "# %%" not in text and text.startswith('"""Settings."""\n')
    assert '\n__all__ = ["Config", "seed_all"]\n' in text


def test_many_names_share_lines(days):
    names = [f"a_rather_long_name_{i}" for i in range(8)]
    cell = (f"#| export config\nfrom nanovllm.x import ({', '.join(names)})\n"
            + "\n".join(f"def {name}_too(): pass" for name in names))
    text = build(days(DAY_1, [cell]))["config.py"]
    assert "from .x import (\n    a_rather_long_name_0, a_rather_long_name_1, " in text
    assert '__all__ = ["Config", "a_rather_long_name_0_too", ' in text
    assert max(map(len, text.splitlines())) <= exporter.WIDTH


def test_own_imports_become_relative_wherever_they_stand(days):
    text = build(days(DAY_1))["engine/sequence.py"]
    assert "\nfrom ..config import Config\n" in text
    assert "    from ..config import Config as C\n" in text
    assert "# Counts up.\n_ids = 0\n\n" in text


def test_init_offers_what_it_imports(days):
    files = build(days(DAY_1, DAY_2))
    version = next(line for line in files["__init__.py"].splitlines() if "__version__" in line)
    assert version.startswith('__version__ = "')
    assert '__all__ = ["LLM"]' in files["__init__.py"]
    assert "from .llm import LLM\n" in files["__init__.py"]
    assert files["engine/__init__.py"] == ""
    # An import that may fail stays where its author has put it.
    assert "try:\n    import flash_attn\n" in files["llm.py"]


def test_two_exports_write_the_same_and_days_can_be_cut(days, tmp_path):
    nbs, lib = days(DAY_1, DAY_2, room=ROOM), tmp_path / "nanovllm"
    (lib / "demo_model").mkdir(parents=True)
    (lib / "demo_model" / "config.json").write_text("{}")
    (lib / "by_hand.py").write_text("x = 1\n")
    files = build(nbs)
    exporter.write(files, lib)
    assert exporter.write(build(nbs), lib) == ([], [])
    assert "by_hand.py" in "".join(exporter.differences(files, lib))

    exporter.write(build(nbs, upto=1), lib)
    assert not (lib / "llm.py").exists() and (lib / "engine" / "sequence.py").exists()
    assert not list(lib.rglob("*.c"))
    assert "seed_all" not in (lib / "config.py").read_text()
    assert (lib / "demo_model" / "config.json").exists() and (lib / "by_hand.py").exists()


@pytest.mark.processes
@pytest.mark.slow
def test_the_package_imports(days, tmp_path):
    exporter.write(build(days(DAY_1, DAY_2, room=ROOM)), tmp_path / "nanovllm")
    code = ("import nanovllm.cpu, nanovllm.engine.sequence as s; "
            "print(s.make(), nanovllm.LLM, nanovllm.cpu.BACKENDS)")
    env = dict(os.environ, PYTHONPATH=str(tmp_path))
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)


def test_the_index_names_the_package(days):
    index = {}
    exec(build(days(DAY_1))["_modidx.py"], index)
    assert index["d"]["settings"]["lib_path"] == "nanovllm"
    assert "nanovllm.config.Config" in index["d"]["syms"]["nanovllm.config"]


@pytest.mark.parametrize("cell, complaint", [
    ("#| export\nx = 1", "export` without"),
    ("#| default_exp config\n#| export\nx = 1", "must name one module"),
    ("#| export config\n%time x = 1", "02_day.ipynb: invalid syntax"),
    ("#| export config\nx = 1; y = 2", "two statements on one line"),
    ("#| export config\nclass Config: pass", "`Config` is defined twice"),
    ("#| export config\nfrom sys import os", "`os` is defined twice"),
    ("#| export config\nfrom queue import Config", "`Config` is defined twice"),
    ("#| export engine.sequence\n_ids = 1", "`_ids` is defined twice"),
    ("%%c sum.c\n// A sum\nint x;", "C belongs in an appendix"),
])
def test_what_cannot_be_exported_is_refused(days, cell, complaint):
    with pytest.raises(exporter.ExportError, match=complaint):
        build(days(DAY_1, [cell]))


def test_overloads_and_late_imports_are_allowed(days):
    cell = ("#| export config\nfrom typing import overload\n@overload\ndef f(x: int): ...\n"
            "def f(x): return x\nos.environ['A'] = '1'\nimport triton  # noqa: E402")
    text = build(days(DAY_1, [cell]))["config.py"]
    assert text.index("os.environ") < text.index("import triton")


# -----------------------------------------------------------------------------------------------
# Classes told in pieces
# -----------------------------------------------------------------------------------------------

POOL = [
    "#| export pool\nclass Pool(list):\n    \"\"\"Blocks.\"\"\"\n    kind = 1\n\n"
    "    def take(self):\n        return self.free.pop()",
    "#| export pool\nimport torch\n\nclass Pool(Pool):\n    \"\"\"More.\"\"\"\n\n    # first in\n"
    "    @property\n    def size(self):\n        return 1  # one\n\n\ndef helper(): pass\n\n"
    "class Pool(Pool):\n    def give(self): pass",
]
LATER = ["#| export pool\nclass Pool(Pool):\n    def __len__(self):\n"
         "        return super().__len__() + 1"]


def test_a_class_told_in_pieces_becomes_one(days):
    text = build(days(POOL, LATER))["pool.py"]
    assert text.endswith(
        'class Pool(list):\n    """Blocks."""\n    kind = 1\n\n'
        "    def take(self):\n        return self.free.pop()\n\n"
        "    # first in\n    @property\n    def size(self):\n        return 1  # one\n\n"
        "    def give(self): pass\n\n    def __len__(self):\n        return super().__len__() + 1\n"
        "\n\ndef helper(): pass\n")


def test_super_means_the_same_in_the_notebook_and_in_the_package(days):
    in_notebook, in_package = {}, {}
    exec("\n".join([*POOL, *LATER]), in_notebook)
    exec(build(days(POOL, LATER))["pool.py"], in_package)
    assert len(in_notebook["Pool"]("ab")) == len(in_package["Pool"]("ab")) == 3


@pytest.mark.parametrize("piece, complaint", [
    ("class Tool(Tool):\n    def b(self): pass", "adds to no class above it"),
    ("class Pool(Pool):\n    def take(self): pass", "`take` is defined twice in the class `Pool`"),
    ("class Pool(Pool):\n    def kind(self): pass", "`kind` is defined twice in the class `Pool`"),
    ("class Pool(Pool):\n    kind = 2", "holds more than methods"),
    ("@final\nclass Pool(Pool):\n    def c(self): pass", "holds more than methods"),
    ("class Pool(Pool):\n    def c(self): super().take()", r"calls super\(\).take"),
    ("class Pool(Pool):\n    def c(self): super(Pool, self).c()", "write super"),
])
def test_pieces_that_would_not_fit_are_refused(days, piece, complaint):
    with pytest.raises(exporter.ExportError, match=complaint):
        build(days(POOL, [f"#| export pool\n{piece}"]))


# -----------------------------------------------------------------------------------------------
# Appendices and C
# -----------------------------------------------------------------------------------------------

def test_c_cells_become_files(days, tmp_path):
    files = build(days(DAY_1, DAY_2, room=ROOM))
    assert files["cpu/sum.c"] == (
        "// AUTOGENERATED! DO NOT EDIT! File to edit: nbs/appendix/A_cpu.ipynb.\n\n"
        "// A sum\n#include \"common.h\"\nint sum(int x) { return x + N; }\n\n"
        "/* And a product */\nint product(int x) { return x * N; }\n")
    assert "nbs/appendix/A_cpu.ipynb" in files["cpu/__init__.py"] and "cpu/common.h" in files
    assert "from ..config import Config\n" in files["cpu/__init__.py"]
    assert '__all__ = ["BACKENDS"]' in files["cpu/__init__.py"]
    exporter.write(files, tmp_path / "lib")
    assert not exporter.differences(files, tmp_path / "lib")
    (tmp_path / "lib" / "cpu" / "sum.c").write_text("int other;\n")
    assert "-int other;" in exporter.differences(files, tmp_path / "lib")[0]


def test_an_appendix_goes_with_the_days_that_it_names(days):
    nbs = days(DAY_1, DAY_2, room=ROOM)
    names = [nb.name for nb in exporter.select(nbs, appendix="A")]
    assert names == ["01_day.ipynb", "A_cpu.ipynb"]
    assert [nb.name for nb in exporter.select(nbs, upto=2, appendix="A")] == [
        "01_day.ipynb", "02_day.ipynb", "A_cpu.ipynb"]
    assert "A_cpu.ipynb" not in [nb.name for nb in exporter.select(nbs, upto=2)]
    with pytest.raises(exporter.ExportError, match="first cell has no"):
        exporter.select(days(DAY_1, room=ROOM, card="# A room"), appendix="A")


@pytest.mark.parametrize("cell, complaint", [
    ("%%c sum.c\n// A sum\nint again;", "must be a comment that no other cell"),
    ("%%c sum.c\nint bare;", "must be a comment"),
    ("#| export config\nx = 1", "writes its own folder only"),
])
def test_what_an_appendix_may_not_do(days, cell, complaint):
    with pytest.raises(exporter.ExportError, match=complaint):
        build(days(DAY_1, room=[*ROOM, cell]))


def test_the_magic_writes_what_the_exporter_writes(days, tmp_path):
    """Run by nbdev_test's own shell; a cell that is changed and run again keeps its place."""
    code = [cell.replace("FOLDER", repr(str(tmp_path / "c"))) for cell in ROOM[:4]]
    again = ("get_ipython().run_cell_magic('c', 'sum.c', '// A sum\\nint other;\\n')\n"
             "text = (folder / 'sum.c').read_text()\n"
             "assert text.startswith('// A sum\\nint other;\\n\\n/* And'), text\n"
             "get_ipython().run_cell_magic('c', 'sum.c', " + repr(ROOM[2].partition("\n")[2]) + ")")
    nbs = days(DAY_1, room=[*code, again])
    files, path = build(nbs), nbs / "appendix" / "A_cpu.ipynb"
    run = ("import sys; from pathlib import Path; from nbdev.test import test_nb; "
           "sys.exit(not test_nb(Path(sys.argv[1]))[0])")
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "nbs"),
                                                       os.environ.get("PYTHONPATH", "")]))
    subprocess.run([sys.executable, "-c", run, path], cwd=ROOT, env=env, check=True)
    for name in ("common.h", "sum.c"):
        head, _, body = files[f"cpu/{name}"].partition("\n\n")
        assert (tmp_path / "c" / name).read_text() == body
    from nbdev.clean import nbdev_clean
    before = [cell["source"] for cell in json.loads(path.read_text())["cells"]]
    nbdev_clean(str(path))
    assert [cell["source"] for cell in json.loads(path.read_text())["cells"]] == before


# -----------------------------------------------------------------------------------------------
# The stock commands
# -----------------------------------------------------------------------------------------------

@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("command", ["nbdev_export", "nbdev_docs", "nbdev_preview"])
def test_stock_commands_leave_the_package_alone(command, tmp_path):
    """They would append to modules and lose the index; they stop, and say what to run."""
    (tmp_path / "nbs").mkdir()
    shutil.copy(exporter.day_notebooks()[0], tmp_path / "nbs")
    shutil.copy(ROOT / "settings.ini", tmp_path)
    shutil.copytree(exporter.LIB, tmp_path / "nanovllm")
    quarto = tmp_path / "bin" / "quarto"
    quarto.parent.mkdir()
    quarto.write_text("#!/bin/sh\nexit 1\n")     # so that nbdev installs none
    quarto.chmod(0o755)

    def state():
        return {path: hashlib.sha256(path.read_bytes()).digest()
                for path in (tmp_path / "nanovllm").rglob("*") if path.suffix != ".pyc"
                and path.is_file()}

    before = state()
    env = {key: value for key, value in os.environ.items() if key != "IN_TEST"}
    env["PATH"] = os.pathsep.join([str(quarto.parent), env["PATH"]])
    done = subprocess.run([Path(sysconfig.get_path("scripts")) / command], cwd=tmp_path, env=env,
                          text=True, capture_output=True, timeout=300)
    assert state() == before and done.returncode
    if command == "nbdev_export":
        assert "run_python_tools_export.py_instead" in done.stderr, done.stderr


# -----------------------------------------------------------------------------------------------
# Flagged cells run alone, with what they need
# -----------------------------------------------------------------------------------------------

def test_cells_that_a_flagged_cell_needs():
    cells = ["import math as m\nlimit = 3", "limit = 4", "print(limit)", "table = {}",
             "for i in range(2):\n    table[i] = i", "i = 'unused'", "class A:\n    x = 1",
             "class A(A):\n    def f(self): return table[limit]", "def unused(A): return A",
             "#| gpu\nA().f()"]
    assert needed(cells, {9}) == {1, 3, 4, 6, 7, 9}
    assert needed(cells, {2}) == {1, 2}
    assert needed(["x = 1", "x = x + 1", "y = [x for x in range(3)]", "y"], {3}) == {2, 3}
    assert needed(["x = 1", "x = x + 1", "x"], {2}) == {0, 1, 2}
    assert needed(["x = 1", "%%c sum.c\n// C\nint y;", "x"], {2}) == {0, 2}


def test_notebooks_by_name():
    assert [nb.name[:2] for nb in select(["3", "nbs/05_engine.ipynb"])] == ["03", "05"]
    assert select([]) == exporter.select()
    with pytest.raises(SystemExit, match="no such notebook: 12"):
        select(["12"])


@pytest.mark.processes
@pytest.mark.slow
def test_cells_by_id_side_by_side(tmp_path):
    import nbformat
    cells = {"base": "x = 2", "left": "#| gpu\nx + 1", "right": "#| gpu\nx + 2",
             "bad": "#| gpu\n1/0"}
    path = tmp_path / "two.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_code_cell(source, id=name) for name, source in cells.items()]), path)
    run = [sys.executable, "-m", "tools.run_notebooks", str(path), "--flags", "gpu",
           "--only-flagged", "--cells"]
    running = [subprocess.Popen([*run, name], cwd=ROOT) for name in ("left", "right")]
    assert [process.wait() for process in running] == [0, 0]
    shown = {cell.id: [out["data"]["text/plain"] for out in cell.outputs]
             for cell in nbformat.read(path, 4).cells}
    assert shown == {"base": [], "left": ["3"], "right": ["4"], "bad": []}
    wrong = subprocess.run([*run, "base"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode and "no such cell with these flags: ['base']" in wrong.stderr


def test_the_gpu_script_runs_every_gpu_cell():
    from tools.gpu_run import STAGES
    run = {arguments.split()[2] for stages in STAGES.values() for arguments, *_ in stages.values()
           if arguments.startswith("-m tools.run_notebooks ")}
    assert [path for name in run for path in select([name])]
    for path in select([]):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        if any(cell["cell_type"] == "code" and "gpu" in directives("".join(cell["source"]))
               for cell in cells):
            assert any(select([name]) == [path] for name in run), path.name
