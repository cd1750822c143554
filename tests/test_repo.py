"""What must hold for every file of the repository: notebooks, exported package, text, wheel."""

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import pytest

from tools import export as exporter

ROOT = exporter.ROOT
NOTEBOOKS = exporter.select()
MODULES = sorted(path for path in exporter.LIB.rglob("*.py") if path.name != "_modidx.py")
MEGABYTE = 1_000_000
# A path that only makes sense on the machine of whoever wrote it. What may precede: a quote, a
# space, an equals sign; not a word, as in the address of a web page.
MACHINE_PATH = re.compile(r"(?<![\w.~+/:-])/(?:(?:home|root|Users|work|workspace|mnt|opt)/[\w.-]+"
                          r"|tmp/(?:tmp|ipykernel)\w+)")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


PRODUCED = re.compile(  # what .gitignore names, and what an sdist adds
    r"(^|/)(\.venv|\.git|__pycache__|[^/]*\.egg-info|build|dist|_book|_docs|_proc|\.[a-z]+_cache|"
    r"\.hypothesis|\.triton|\.ipynb_checkpoints|\.last_checked|PKG-INFO|setup\.cfg|uv\.lock)(/|$)"
    r"|\.py[co]$")


def repository_files() -> list[Path]:
    """Files that are tracked, or would be: not the ignored ones.

    Without git, as in an unpacked source distribution, all that is not known to be produced.
    """
    if not (ROOT / ".git").exists():
        return [path for path in sorted(ROOT.rglob("*"))
                if path.is_file() and not PRODUCED.search(name_of(path))]
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others",
               "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def text_of(path: Path) -> str:
    """What a reader sees of a file; of a notebook cells and outputs, without the images."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""
    if path.suffix != ".ipynb":
        return text
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            output["data"] = {kind: value for kind, value in data.items() if "image/" not in kind}
    return json.dumps(notebook, indent=1, ensure_ascii=False)


def copy_repository(dest: Path) -> None:
    for path in repository_files():
        (dest / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, dest / path.relative_to(ROOT))


# -----------------------------------------------------------------------------------------------
# Notebooks
# -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_notebook_is_executed_without_errors(path):
    outputs = [out for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
               if cell["cell_type"] == "code" for out in cell["outputs"]]
    assert outputs, "no cell has an output: run tools/run_notebooks.py"
    errors = [out for out in outputs if out["output_type"] == "error"]
    assert not errors, f"{errors[0]['ename']}: {errors[0]['evalue']}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_notebook_is_clean(path, tmp_path, monkeypatch):
    from nbdev.clean import nbdev_clean

    monkeypatch.chdir(ROOT)
    copy = Path(shutil.copy(path, tmp_path))
    nbdev_clean(str(copy))
    assert copy.read_bytes() == path.read_bytes(), "run nbdev_clean"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_notebook_is_small(path):
    assert path.stat().st_size <= MEGABYTE


# -----------------------------------------------------------------------------------------------
# The package
# -----------------------------------------------------------------------------------------------

def test_package_is_what_the_notebooks_export():
    files = exporter.build(exporter.select())
    assert not exporter.differences(files, exporter.LIB), "run tools/export.py"


def test_imports_run_one_way():
    """Scheduling knows no tensors; layers and models know no engine."""
    def imported(path):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield "." * node.level + (node.module or "")

    for path in MODULES:
        if path.stem in ("sequence", "block_manager", "scheduler"):
            assert not [name for name in imported(path) if name.split(".")[0] == "torch"], path
        if path.parent.name in ("layers", "models", "utils"):
            assert not [name for name in imported(path) if "engine" in name.split(".")], path


NAMES = {  # what the course promises: module, and what a reader finds in it
    "config": "Config", "sampling_params": "SamplingParams", "llm": "LLM",
    "engine.sequence": "Sequence SequenceStatus", "engine.block_manager": "Block BlockManager",
    "engine.scheduler": "Scheduler", "engine.model_runner": "ModelRunner",
    "engine.llm_engine": "LLMEngine", "layers.layernorm": "RMSNorm",
    "layers.activation": "SiluAndMul",
    "layers.rotary_embedding": "RotaryEmbedding apply_rotary_emb",
    "layers.attention": "Attention store_kvcache",
    "layers.linear": "ColumnParallelLinear RowParallelLinear", "layers.sampler": "Sampler",
    "models.qwen3": "Qwen3Attention Qwen3MLP Qwen3DecoderLayer Qwen3Model Qwen3ForCausalLM",
    "utils.context": "Context get_context set_context reset_context",
}
METHODS = {
    ("engine.block_manager", "BlockManager"): "allocate append_slot free",
    ("engine.scheduler", "Scheduler"): "add_sequence schedule postprocess",
    ("engine.model_runner", "ModelRunner"): "allocate_kv_cache prepare_input run",
    ("engine.llm_engine", "LLMEngine"): "add_request step is_finished abort close",
    ("llm", "LLM"): "generate chat stream default_sampling_params",
}


def test_what_the_course_promises_is_there():
    modules = {name: importlib.import_module(f"nanovllm.{name}") for name in NAMES}
    missing = [f"{module}.{name}" for module, names in NAMES.items() for name in names.split()
               if not hasattr(modules[module], name)]
    missing += [f"{name}.{method}" for (module, name), methods in METHODS.items()
                for method in methods.split()
                if not hasattr(getattr(modules[module], name), method)]
    assert not missing


ROOMS = ("cpu", "gpu", "serve")
EVENING = ("engine/sequence", "engine/block_manager", "engine/scheduler", "utils/context",
           "engine/model_runner", "models/qwen3", "layers/attention", "layers/sampler",
           "engine/llm_engine", "llm")  # a route through the package, in this order


def is_core(path: Path) -> bool:
    """Whether a file of the package stands outside of the rooms that may be deleted."""
    return path.relative_to(exporter.LIB).parts[0] not in ROOMS


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_no_file_of_the_core_is_long():
    assert not {name_of(p): lines(p) for p in MODULES if is_core(p) and lines(p) > 260}


def test_the_core_is_read_in_an_evening():
    assert sum(lines(exporter.LIB / f"{name}.py") for name in EVENING) <= 1550


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_readme_counts_its_lines_right(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    told = {file: int(count) for file, count in
            re.findall(r"\]\(nanovllm/([\w/]+)\.py\) \| (\d+) \|", text)}
    assert told == {file: lines(exporter.LIB / f"{file}.py") for file in EVENING}
    assert f"{sum(told.values()):,} " in text


def test_the_package_does_not_grow():
    """With its rooms and their C, without nbdev's index.

    Most of them one need not read for an evening: 1,600 serve over HTTP, some 1,900 are checks of
    files, the books after an error, processes, and the kernels that draw tokens; 260 are the
    parameters that users of vLLM expect.
    """
    files = [p for p in exporter.LIB.rglob("*") if p.suffix in (".py", ".c", ".h")]
    assert sum(lines(path) for path in files if path.name != "_modidx.py") <= 9200


def test_the_core_enters_rooms_by_their_doors():
    """Only utils/rooms.py names a module of theirs, and the command line the server."""
    def named(path):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                module = "." * node.level + (node.module or "")
                yield from (f"{module}.{alias.name}" for alias in node.names)

    inside = re.compile(rf"(^\.+|nanovllm\.)({'|'.join(ROOMS)})(\.|$)")
    found = {name_of(path): name for path in MODULES if is_core(path)
             for name in named(path) if inside.search(name) and path.name != "cli.py"}
    assert not found


def test_public_definitions_have_docstrings():
    bare = []
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name[0] != "_":
                bare += [] if ast.get_docstring(node) else [f"{name_of(path)}: {node.name}"]
    assert not bare


def test_python_3_10_can_read_it():
    for path in repository_files():
        if path.suffix == ".py":
            ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))


def build(kind: str, source: Path, dest: Path) -> Path:
    """A wheel or an sdist as any front end makes it, whether this environment has pip or not."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(dest)!r}))"
    shown = subprocess.run([sys.executable, "-c", code], cwd=source, check=True,
                           capture_output=True, text=True).stdout
    return dest / shown.splitlines()[-1]


def test_nbdevs_own_site_stops_before_it_writes(tmp_path, monkeypatch):
    """tools/book makes the site; nbdev's commands would leave files and rewrite the index."""
    from nbdev.quarto import refresh_quarto_yml
    (tmp_path / "nbs").mkdir()
    shutil.copy(ROOT / "settings.ini", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises((IndexError, KeyError), match="description"):
        refresh_quarto_yml()
    assert not list((tmp_path / "nbs").iterdir())


def metadata(text: str) -> dict[str, list[str]]:
    """The fields of a METADATA or PKG-INFO file, and its body as the field `""`."""
    head, _, body = text.partition("\n\n")
    fields = {"": [body]}
    for line in head.splitlines():
        name, _, value = line.partition(": ")
        fields.setdefault(name, []).append(value)
    return fields


@pytest.mark.processes
@pytest.mark.slow
def test_sdist_is_the_repository(tmp_path):
    source = tmp_path / "source"
    copy_repository(source)
    with tarfile.open(build("sdist", source, tmp_path)) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
        info = next(name for name in archive.getnames() if name.count("/") == 1
                    and name.endswith("/PKG-INFO"))
        fields = metadata(archive.extractfile(info).read().decode())
    assert {name_of(path) for path in repository_files()} - packed == set()
    settings = (ROOT / "settings.ini").read_text(encoding="utf-8")
    assert fields["Name"] == re.findall(r"^lib_name = (.*)$", settings, re.MULTILINE)
    assert fields["Version"] == re.findall(r"^version = (.*)$", settings, re.MULTILINE)
    assert fields["License-Expression"] == ["MIT"] and fields["Requires-Python"] == [">=3.10"]
    assert any(need.startswith("torch<") for need in fields["Requires-Dist"])
    elsewhere = re.findall(r"\]\((?!https?:|#)([^)]+)\)", fields[""][0])
    assert not elsewhere, "a page of PyPI has nothing beside it to link to"


@pytest.mark.processes
@pytest.mark.slow
def test_wheel_holds_the_package_and_its_model(tmp_path):
    source = tmp_path / "source"
    copy_repository(source)
    wheel = build("wheel", source, tmp_path)
    packed = set(zipfile.ZipFile(wheel).namelist())
    assert "nanovllm/py.typed" in packed
    expected = {name_of(path) for path in repository_files() if path.is_relative_to(exporter.LIB)}
    assert expected <= packed
    assert {name.split("/")[0] for name in packed if ".dist-info/" not in name} == {"nanovllm"}

    # Unpacked by itself, far from the repository, it imports and answers with its own model.
    zipfile.ZipFile(wheel).extractall(tmp_path / "alone")
    code = ("import nanovllm; print(nanovllm.__file__); llm = nanovllm.LLM(); params = "
            "nanovllm.SamplingParams(temperature=0); "
            "print(llm.generate('What is RoPE?\\n', params, use_tqdm=False)[0]['text'])")
    env = dict(os.environ, PYTHONPATH=str(tmp_path / "alone"))
    shown = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True,
                           capture_output=True, text=True).stdout
    assert Path(shown.splitlines()[0]).is_relative_to(tmp_path / "alone")
    assert "rotat" in shown


# -----------------------------------------------------------------------------------------------
# Text
# -----------------------------------------------------------------------------------------------

@pytest.mark.processes
@pytest.mark.skipif(not find_spec("ruff"), reason="needs ruff")
def test_ruff_finds_nothing():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format",
                           "concise", ROOT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_lines_fit_the_page():
    pages = [path for path in repository_files() if path.suffix == ".py"]
    long = [f"{name_of(path)}:{number}" for path in pages if path.name != "_modidx.py"
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
            if len(line) > exporter.WIDTH]
    assert not long


def test_users_of_vllm_find_every_parameter_and_setting():
    """In docs/vllm.md; those of the engine that have another name or none there included."""
    from nanovllm import Config, SamplingParams
    page = (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8")
    names = {field.name for cls in (Config, SamplingParams) for field in fields(cls) if field.init}
    assert sorted(name for name in names if f"`{name}" not in page) == []


def test_no_file_names_a_place_on_somebodys_machine():
    found = {name_of(path): sorted(set(MACHINE_PATH.findall(text_of(path))))
             for path in repository_files()}
    assert not {name: paths for name, paths in found.items() if paths}
