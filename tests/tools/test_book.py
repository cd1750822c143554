"""tools/book: links that fit the site, names that lead to their cells, a check of all links."""

import ast
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from urllib.parse import quote

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


IMPORTS = "from a import (\n" + "    b,\n" * 10 + ")\nx = 1"


def test_what_a_reader_writes_or_predicts():
    def shown(source, *tags, is_exercise=False):
        cell = {"source": source, "outputs": [{"output_type": "stream", "text": "4"}],
                "metadata": {"tags": list(tags)}}
        return pages.shown_as(cell, is_exercise)

    assert shown(IMPORTS)["mystnb"]["code_prompt_show"] == "Show the imports"
    stub = "from a import b\n\ndef f(x):\n" + "    pass\n" * 20
    assert shown(stub)["tags"] == [] and shown(stub, "your-turn")["tags"] == ["your-turn"]
    assert shown(IMPORTS, "your-turn")["tags"] == ["your-turn"]        # never folded
    assert shown(stub, "hide-input")["mystnb"]["code_prompt_show"] == "Show the code: f"
    assert shown("print(4)", is_exercise=True)["tags"] == ["hide-output"]
    assert shown("grade(f)", is_exercise=True)["tags"] == []


def test_an_answer_stands_behind_a_click_where_it_is_named(tmp_path):
    (tmp_path / "day1.py").write_text('"""…"""\n\n\ndef double(x):\n    return 2 * x\n')
    solutions = pages.answers(tmp_path)
    text = 'Write it.\n\nStuck? `answer("double")` shows one.\n\n## Next\nMore.'
    before, answer, after = pages.Answers(solutions).beside(text)
    assert before["source"].endswith("shows one.") and after["source"].startswith("## Next")
    assert answer["source"] == "def double(x):\n    return 2 * x"
    assert answer["metadata"]["tags"] == ["hide-input"]
    assert answer["metadata"]["mystnb"]["code_prompt_show"] == "Show the answer: double"
    whole, = pages.Answers(solutions).beside('`answer("none")`\n\nMore.')
    assert whole["source"] == '`answer("none")`\n\nMore.'


def test_each_exercise_of_a_series_is_followed_by_its_answer():
    told = pages.Answers({"exercise_4_1": "one", "exercise_4_2": "two"})
    first = told.beside('## Exercises\n`answer("exercise_4_1")` … show them.\n\n'
                        "**1 · Predict.** What?\n\n- a list")
    assert [cell["cell_type"] for cell in first] == ["markdown"]
    second = told.beside("More of it.\n\n**2 · Modify.** How?")
    assert [cell["source"] for cell in second + told.due()] == [
        "More of it.", "one", "**2 · Modify.** How?", "two"]
    assert told.due() == []


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


@pytest.mark.parametrize("word, is_link", [
    ("stop", False), ("Pool.stop", True), ("stop()", True), ("Pool", True), ("x.py", True),
])
def test_a_bare_word_in_a_text_is_no_link(word, is_link):
    names = {"stop": "n.html#def-m-Pool.stop", "Pool.stop": "n.html#def-m-Pool.stop",
             "Pool": "n.html#def-m-Pool", "x.py": "api/x.html"}
    text = f'<p><code class="docutils literal notranslate"><span class="pre">{word}</span></code>'
    assert ("<a " in symbols.linked(text, names, "a.html")) == is_link
    other = f'<p><a href="https://github.com/{symbols.OTHER}">nano-vllm</a>, '
    assert text.replace("<p>", "") in symbols.linked(text.replace("<p>", other),
                                                     {"x.py": "api/x.html"}, "a.html")


def test_names_in_tables_may_be_broken():
    cell = '<td><span class="pre">engine/block_manager.py</span></td>'
    assert "engine/<wbr>block_<wbr>manager.py" in symbols.linked(cell, {}, "a.html")


def test_properties_are_told_as_such():
    node = ast.parse("class A:\n    @property\n    def x(self): 'X.'").body[0].body[0]
    assert pages.signature(node) == "@property\ndef x(self)"


def test_the_glossary_opens_sections(tmp_path):
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    told = pages.with_sections(pages.Site(tmp_path, ""), text)
    assert "[A](#ablation) · [B](#backpressure)" in told
    assert "(../nbs/03_paged_attention.ipynb#4-prefix-caching-core)" in told
    assert '"prefix caching": ["nbs/03_paged_attention", "4. Prefix caching (core)"]' in (
        tmp_path / "search.js").read_text(encoding="utf-8")


def test_the_check_finds_what_leads_nowhere(tmp_path):
    (tmp_path / "b.html").write_text('<p id="here"></p>')
    (tmp_path / "a.html").write_text('<a href="b.html#here"></a> <a href="https://x.org/y"></a>')
    assert links.broken(tmp_path) == []
    (tmp_path / "c.html").write_text('<a href="b.html#there"></a> <img src="no.png">')
    assert len(links.broken(tmp_path)) == 2


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """The folder of the whole site."""
    out = tmp_path_factory.mktemp("book")
    done = subprocess.run([sys.executable, ROOT / "tools" / "book", "--out", out],
                          capture_output=True, text=True)
    assert done.returncode == 0 and "0 faults" in done.stdout, done.stdout + done.stderr
    return out / "html"


def whole_book(test):
    """The marks of a test that needs the site."""
    test = pytest.mark.skipif(not all(map(find_spec, ("sphinx", "myst_nb", "sphinx_book_theme"))),
                              reason="needs pip install $(python tools/book --requirements)")(test)
    return pytest.mark.processes(pytest.mark.slow(test))


@whole_book
def test_the_whole_book(book):
    day = (book / "nbs" / "03_paged_attention.html").read_text(encoding="utf-8")
    assert day.count("Show the answer") >= 5 and "def-engine.block_manager-BlockManager" in day
    assert "slot mapping" in (book / "docs" / "glossary.html").read_text(encoding="utf-8")
    exercises = (book / "nbs" / "04_scheduler.html").read_text(encoding="utf-8")
    assert all(f"Show the answer: exercise 4.{i}" in exercises for i in range(1, 7))
    assert "Show the code: _schedule_waiting" not in exercises
    for page in book.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r'<(script|link|img)[^>]*(src|href)="https?://', text), page
        if "_static" not in page.parts:      # the theme's scripts bind the first of each only
            assert text.count("primary-toggle") <= 1 and text.count("secondary-toggle") <= 1, page


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)


def seen(address: str, folder) -> str:
    """The page as a browser of a phone's width has it."""
    return subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         f"--user-data-dir={folder}", "--window-size=500,900", "--virtual-time-budget=8000",
         "--dump-dom", address], capture_output=True, text=True, timeout=120).stdout


@whole_book
@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
@pytest.mark.parametrize("side", ["primary", "secondary"])
def test_the_bars_open_on_a_phone(book, tmp_path, side):
    text = (book / "docs" / "map.html").read_text(encoding="utf-8")
    click = f"""<script>addEventListener("load", () => setTimeout(() => {{
        [...document.querySelectorAll(".{side}-toggle")].find((b) => b.offsetWidth).click();
        const bar = document.getElementById("pst-{side}-sidebar-modal");
        document.title = `${{bar.open}} ${{bar.querySelectorAll("a").length > 4}}`;
    }}, 500))</script></body>"""
    probe = book / "docs" / f"probe_{side}.html"
    probe.write_text(text.replace("</body>", click), encoding="utf-8")
    assert "<title>true true</title>" in seen(probe.as_uri(), tmp_path)
    probe.unlink()


@whole_book
@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
@pytest.mark.parametrize("query, entry, section", [
    ("prefix caching", "prefix-caching", "nbs/03_paged_attention.html#prefix-caching-core"),
    ("slot mapping", "slot-mapping", "nbs/03_paged_attention.html#blocks-tables-and-slots-core"),
    ("preemption", "preemption", "nbs/04_scheduler.html#"),
    ("top_p", "top-p", "nbs/05_engine.html#top-k-and-top-p"),
    ("CUDA Graphs", "cuda-graph", "nbs/06_parallel.html#cuda-graphs-many-kernels-by-one-call-core"),
])
def test_the_search_finds_the_entry_and_the_section(book, tmp_path, query, entry, section):
    page = seen(f"{(book / 'search.html').as_uri()}?q={quote(query)}", tmp_path)
    hits = re.findall(r'<li class="kind-[^>]*><a href="([^"]*)"', page)[:3]
    assert hits[0] == f"docs/glossary.html#{entry}" and any(h.startswith(section) for h in hits)
