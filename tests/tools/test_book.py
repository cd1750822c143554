"""tools/book: links that fit the site, names that lead to their cells, a check of all links."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

from tools.book import links, pages, symbols
from tools.export import ROOT


def site(tmp_path, address=""):
    return pages.Site(tmp_path, address, {"nbs/03_paged_attention.ipynb", "docs/map.md"})


@pytest.mark.parametrize("title, anchor", [
    ("3-·-Blocks:-logical,-physical", "3--blocks-logical-physical"),     # as Jupyter says it
    ("3 · Blocks: logical, physical", "3--blocks-logical-physical"),     # as it is written
    ("What-`block_table`-is%20for", "what-block_table-is-for"),
])
def test_anchors_of_jupyter_and_of_github_are_one(title, anchor):
    assert pages.slug(title) == anchor


@pytest.mark.parametrize("target, here, expected", [
    ("03_paged_attention.ipynb#3-·-Blocks", "nbs/07_benchmark.ipynb",
     "03_paged_attention.ipynb#3--blocks"),
    ("../nanovllm/engine/scheduler.py", "docs/map.md", "../api/engine.scheduler.md"),
    ("../README.md#test-it", "docs/map.md", "../index.md#test-it"),
    ("../bench.py", "docs/map.md", "../files/bench.py.md"),
    ("https://arxiv.org/abs/1706.03762", "docs/map.md", "https://arxiv.org/abs/1706.03762"),
])
def test_a_link_leads_to_a_page_of_the_site(tmp_path, target, here, expected):
    assert pages.relink(site(tmp_path), f"see [`x`]({target}).", here) == f"see [`x`]({expected})."


def test_what_the_site_does_not_have_is_in_the_repository(tmp_path):
    address = "https://example.org/course"
    assert pages.relink(site(tmp_path, address), "[a](../bench.py) [b](../bench)", "docs/map.md") \
        == f"[a]({address}/blob/main/bench.py) [b]({address}/tree/main/bench)"
    assert pages.relink(site(tmp_path), "[b](../bench)", "docs/map.md") == "b"


def test_code_is_left_alone(tmp_path):
    text = "```python\nx[0](../bench.py)\n```"
    assert pages.relink(site(tmp_path), text, "docs/map.md") == text


def test_answers_and_figures_are_folded():
    def shown(**metadata):
        return pages.shown_as({"source": "x = 1", "outputs": [], "metadata": metadata})

    assert shown(tags=["answer"], jupyter={"source_hidden": True})["tags"] == ["hide-cell"]
    assert shown(jupyter={"source_hidden": True})["tags"] == ["hide-input"]
    assert shown()["tags"] == []


def test_an_answer_stands_behind_a_click_where_it_is_named(tmp_path):
    (tmp_path / "day1.py").write_text('"""…"""\n\n\ndef double(x):\n    return 2 * x\n')
    solutions = pages.answers(tmp_path)
    text = 'Write it.\n\nStuck? `answer("double")` shows one.\n\n## Next\nMore.'
    before, answer, after = pages.with_answers(text, solutions, 7)
    assert before["source"].endswith("shows one.") and after["source"].startswith("## Next")
    assert answer["source"] == "def double(x):\n    return 2 * x"
    assert answer["metadata"]["tags"] == ["hide-input"]
    whole, = pages.with_answers('`answer("none")`\n\nMore.', solutions, 7)
    assert whole["source"] == '`answer("none")`\n\nMore.'


def test_a_name_leads_to_the_cell_that_defines_it(tmp_path):
    where = site(tmp_path)
    source = "#| export engine.x\nclass Pool:\n    def take(self):\n        pass"
    told = pages.announce(where, source, "engine.x", "nbs/03_paged_attention.ipynb")
    assert '<a class="def" id="def-engine.x-Pool"></a>' in told and "../api/engine.x.html" in told
    more = "class Pool(Pool):\n    def give(self):\n        pass"
    again = pages.announce(where, more, "engine.x", "nbs/04_scheduler.ipynb")
    assert "def-engine.x-Pool.give" in again and 'id="def-engine.x-Pool"' not in again
    names = symbols.unique_names(where.names)
    code = '<pre><span class="n">Pool</span></pre>'
    assert symbols.linked(code, names, "docs/map.html") == (
        '<pre><a class="symbol" href="../nbs/03_paged_attention.html#def-engine.x-Pool">'
        '<span class="n">Pool</span></a></pre>')
    method = '<span class="n">give_back</span>'
    names["give_back"] = "nbs/04_scheduler.html#def-engine.x-Pool.give_back"
    assert symbols.linked(f"{symbols.DOT}{method}", names, "a.html") != f"{symbols.DOT}{method}"
    for untouched in (f"<h2>{code}</h2>", f'<a href="x">{code}</a>', code.replace("Pool", "take"),
                      method):
        assert symbols.linked(untouched, names, "docs/map.html") == untouched


def test_the_check_finds_what_leads_nowhere(tmp_path):
    (tmp_path / "b.html").write_text('<p id="here"></p>')
    (tmp_path / "a.html").write_text('<a href="b.html#here"></a> <a href="https://x.org/y"></a>')
    assert links.broken(tmp_path) == []
    (tmp_path / "c.html").write_text('<a href="b.html#there"></a> <img src="no.png">')
    assert len(links.broken(tmp_path)) == 2


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.skipif(not all(map(find_spec, ("sphinx", "myst_nb", "sphinx_book_theme"))),
                    reason="needs pip install $(python tools/book --requirements)")
def test_the_whole_book(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "tools" / "book", "--out", tmp_path],
                          capture_output=True, text=True)
    assert done.returncode == 0 and "0 faults" in done.stdout, done.stdout + done.stderr
    html = tmp_path / "html"
    day = (html / "nbs" / "03_paged_attention.html").read_text(encoding="utf-8")
    assert day.count("Show the answer") >= 5 and "def-engine.block_manager-BlockManager" in day
    assert "slot mapping" in (html / "docs" / "glossary.html").read_text(encoding="utf-8")
