"""What every notebook owes its reader: parts, sizes, links, pictures that can be read out."""

import ast
import json
import re
from pathlib import Path

import pytest

from tools.export import NBS, appendices, day_notebooks
from tools.run_notebooks import names

DAYS, NOTEBOOKS = day_notebooks(), [*day_notebooks(), *appendices().values()]
ROOT = NBS.parent
HIDDEN = {"hide-input", "answer"}
of_each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
of_each_day = pytest.mark.parametrize("path", DAYS, ids=lambda path: path.stem)


def cells_of(path, kind=None):
    """(source, tags, outputs) of the cells of one kind, or of all."""
    return [("".join(cell["source"]), set(cell["metadata"].get("tags", [])),
             cell.get("outputs", []))
            for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
            if kind in (None, cell["cell_type"])]


def lines_of(source):
    """The lines of code that a reader reads."""
    return [line for line in source.splitlines()
            if line.strip() and not line.lstrip().startswith("#|")]


def most_lines(path, source):
    """How many lines a visible cell may have: 25, a whole class 40, an appendix's kernel 60."""
    body = [] if source.startswith("%") else [
        node for node in ast.parse(source).body
        if not isinstance(node, (ast.Import, ast.ImportFrom, ast.Expr))]
    if path not in DAYS and (len(body) == 1 or source.startswith("%%c")):
        return 60
    return 40 if len(body) == 1 and isinstance(body[0], ast.ClassDef) else 25


def headings(path):
    """The addresses of the headings in a notebook or a file, as GitHub and as Jupyter make them."""
    text = path.read_text(encoding="utf-8") if path.suffix == ".md" else \
        "\n".join(source for source, *_ in cells_of(path, "markdown"))
    titles = re.findall(r"^#+ +(.+?) *$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles} | \
        {title.replace("`", "").replace(" ", "-") for title in titles}


@of_each
def test_sections_say_whether_they_are_core(path):
    titles = [title for source, *_ in cells_of(path, "markdown")
              for title in re.findall(r"^## +(.+?) *$", source, re.M)]
    wrong = [title for title in titles if not title.endswith(("(core)", "(optional)"))]
    assert titles and not wrong


@of_each_day
def test_a_day_is_a_day(path):
    """250 lines of code and 9,000 words an hour: six hours in all, four for the core."""
    hours = {"core": 0.0, "optional": 0.0}
    part = "core"
    for source, tags, _ in cells_of(path):
        if title := re.search(r"^## .*\((core|optional)\)\s*$", source, re.M):
            part = title[1]
        is_code = (source, tags) in [(s, t) for s, t, _ in cells_of(path, "code")]
        if not is_code:
            hours[part] += len(source.split()) / 9000
        elif not tags & HIDDEN:
            hours[part] += len(lines_of(source)) / 250
    assert hours["core"] <= 4.0 and sum(hours.values()) <= 6.0, hours


@of_each_day
def test_a_day_names_no_room(path):
    """A reader who stops here may lack the appendices' folders; tools/test.py relies on this."""
    code = "\n".join(source for source, *_ in cells_of(path, "code"))
    assert not re.search(r"nanovllm(\.| import )(cpu|gpu|serve|cli)\b", code)


@of_each
def test_no_visible_cell_is_long(path):
    long = {}
    for source, tags, _ in cells_of(path, "code"):
        lines = lines_of(source)
        if not tags & HIDDEN and len(lines) > most_lines(path, source):
            long[source[:60]] = len(lines)
    assert not long


@of_each_day
def test_the_learner_writes(path):
    assert sum("your-turn" in tags for _, tags, _ in cells_of(path, "code")) >= 4


@of_each
def test_pictures_can_be_read_out(path):
    for source, _, outputs in cells_of(path, "code"):
        for output in outputs:
            if any(kind.startswith("image/") for kind in output.get("data", {})):
                said = [data.get("alt") for data in output["metadata"].values()
                        if isinstance(data, dict)]
                assert any(said), f"no alternative text: {source[:80]}"


SKIPPED = re.compile(r"none here|nothing, so|checks? nothing|no tiles here|no kernel is run|"
                     r"the engine is slower: (?!.*no-such-compiler)")


def prints(node):
    """Whether this code prints or shows something itself, not in a function that it defines."""
    return isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("print", "show") or any(
        prints(child) for child in ast.iter_child_nodes(node)
        if not isinstance(child, (ast.FunctionDef, ast.ClassDef, ast.Lambda)))


@of_each
def test_nothing_was_skipped_where_the_outputs_come_from(path):
    """A cell may leave out what a machine lacks; what is stored comes from one that lacks nothing.

    Else a page stays green while its kernels are not compiled and none of its checks runs.
    """
    for source, _, outputs in cells_of(path, "code"):
        for output in outputs:
            text = "".join(output.get("text", output.get("data", {}).get("text/plain", [])))
            assert not (found := SKIPPED.search(text)), f"{found[0]}: {source[:80]}"
        if not source.startswith("%"):
            assert outputs or not prints(ast.parse(source)), f"it shows nothing: {source[:80]}"


@of_each
def test_hidden_cells_define_nothing_that_is_used_where_one_reads(path):
    hidden, used = {}, {}
    for source, tags, _ in cells_of(path, "code"):
        if source.startswith("%"):
            continue
        left, needs = names(source)
        if tags & HIDDEN:
            hidden.update(dict.fromkeys(left, source[:60]))
        else:
            used.update({name: source[:60] for name in (needs - left) & hidden.keys()})
            for name in left:
                hidden.pop(name, None)
    assert not used


@of_each
def test_links_lead_somewhere(path):
    for source, *_ in cells_of(path, "markdown"):
        source = re.sub(r"`[^`\n]*`(?!\])", "", source)          # code is no link
        for target in re.findall(r"\]\(((?:[^()\s]|\([^()\s]*\))+)\)", source):
            if re.match(r"https?:|mailto:|attachment:", target):
                continue
            name, _, heading = target.partition("#")
            file = (path.parent / name).resolve() if name else path
            assert file.exists(), target
            if heading and file.suffix in (".md", ".ipynb"):
                from urllib.parse import unquote
                assert unquote(heading) in headings(file), target


@of_each
def test_a_kernel_is_named(path):
    kernel = json.loads(path.read_text(encoding="utf-8"))["metadata"].get("kernelspec", {})
    assert kernel.get("name") == "python3"


def test_the_glossary_is_in_order():
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    terms = re.findall(r"^### (.+)$", text, re.M)
    assert terms == sorted(terms, key=str.lower) and len(set(map(str.lower, terms))) == len(terms)
    known = json.loads((ROOT / "tools" / "course_qa.json").read_text(encoding="utf-8"))["entries"]
    assert len(terms) >= len(known)
    for link in re.findall(r"\]\((\.\.[^)]+)\)", text):
        assert (ROOT / "docs" / Path(link)).exists(), link
