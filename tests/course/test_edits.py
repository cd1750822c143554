"""What a reader changes in an export cell is what the package runs (nbs/edits.py)."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "scripts" / "edit_cells.py"
NOTEBOOKS = sorted([*ROOT.glob("nbs/0*.ipynb"), *ROOT.glob("nbs/appendix/*.ipynb")])


def code_cells(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.fixture(scope="module")
def said():
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, SCRIPT], env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout), done.stderr


@pytest.mark.processes
def test_a_changed_norm_is_what_the_model_runs(said):
    said, printed = said
    assert said["the same cell"] == said["before"] == said["the norm is back"]
    assert said["another norm"] == said["another norm, plain"]
    assert said["another norm"][0] != said["before"][0]
    assert "now runs your RMSNorm.forward" in printed


@pytest.mark.processes
def test_a_changed_scheduler_is_what_the_engine_runs(said):
    said, _ = said
    assert (said["before"][1], said["one at a time"][1]) == (8, 24)    # steps
    assert said["one at a time"][0] == said["before"][0] == said["the scheduler is back"][0]
    assert said["the scheduler is back"][1] == 8


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_each_notebook_counts_edits_before_its_first_export(notebook):
    cells = code_cells(notebook)
    first = next((i for i, cell in enumerate(cells) if cell.startswith("#| export")
                  and any(not isinstance(node, (ast.Import, ast.ImportFrom, ast.Expr))
                          for node in ast.parse(cell).body)), len(cells))
    assert any("edits.count()" in cell for cell in cells[:first])


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_each_notebook_looks_first_whose_package_it_is(notebook):
    """`edits` is imported before the package, and before what may import it."""
    imports = [node for cell in code_cells(notebook) if not cell.startswith("%")
               for node in ast.walk(ast.parse(cell))
               if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = [alias.name if isinstance(node, ast.Import) else node.module
             for node in imports for alias in node.names]
    tops = [name.partition(".")[0] for name in names]
    ours = [top for top in tops if any((folder / end).exists() for folder in (ROOT, ROOT / "nbs")
                                       for end in (top, f"{top}.py"))]
    assert ours[0] == "edits"


@pytest.mark.processes
@pytest.mark.parametrize("file, text, said", [
    ("__init__.py", "from nanovllm.llm import LLM\n", ["nano-vllm has the same import name",
                                                       "pip uninstall nano-vllm"]),
    ("llm.py", "", ["nanovllm is not installed for this kernel"]),      # a folder of that name
])
def test_another_nanovllm_is_noticed_and_there_is_a_remedy(tmp_path, file, text, said):
    (tmp_path / "nanovllm").mkdir()
    (tmp_path / "nanovllm" / file).write_text(text)
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT / 'nbs')!r}]; import edits"
    done = subprocess.run([sys.executable, "-S", "-E", "-c", code], cwd=tmp_path, text=True,
                          capture_output=True)
    assert done.returncode == 1
    for words in [*said, "pip install -e .", "restart the kernel"]:
        assert words in done.stderr
    assert file != "__init__.py" or str(tmp_path) in done.stderr


def test_what_was_not_changed_is_not_touched():
    import edits
    for notebook in NOTEBOOKS:
        for cell in code_cells(notebook):
            if cell.startswith("#| export layers.") and "triton" not in cell.partition("\n")[0]:
                name = "nanovllm." + cell.partition("\n")[0].split()[-1]
                module = __import__(name, fromlist=["x"])
                assert edits.apply(cell, module) == []
