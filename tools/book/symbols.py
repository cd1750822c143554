"""Names in the finished pages become links to the cells that define them."""

from __future__ import annotations

import posixpath
import re
from html import unescape
from pathlib import Path

# A name in highlighted code; in a line of text; a file of the package there.
NAME = re.compile(r'<span class="n(?:n|c|b)?">(\w+)</span>')
INLINE = re.compile(r'(<code class="docutils literal notranslate"><span class="pre">)([\w.]+)'
                    r'((?:\(\))?</span></code>)')
FILE = re.compile(r'(<code class="docutils literal notranslate"><span class="pre">)'
                  r'((?:nanovllm/)?[\w/]+\.py)(</span></code>)')
OTHER = "GeeeekExplorer/nano-vllm"   # its files have the names of ours
CELL = re.compile(r"<td\b.*?</td>", re.DOTALL)
WORD = re.compile(r'(<span class="pre">)([^<]+)')
DOT = '<span class="o">.</span>'
TAG = re.compile(r"<(/?)(a|h[1-6]|nav|head|title|script)\b[^>]*>")


def unique_names(index: dict[str, str]) -> dict[str, str]:
    """Every way to say a name that means one thing: `Scheduler`, `Scheduler.schedule`, …"""
    found: dict[str, set[str]] = {}
    for name, place in index.items():
        module, _, rest = place.partition("#def-")[2].partition("-")
        for said in {name, rest, *([rest.rpartition(".")[2]] if "." in rest else [])}:
            found.setdefault(said, set()).add(place)
    return {name: places.pop() for name, places in found.items() if len(places) == 1}


def link(html: Path, index: dict[str, str]) -> None:
    """Rewrite all pages in the folder."""
    names = {**unique_names(index), **module_pages(html)}
    for page in html.rglob("*.html"):
        here = page.relative_to(html).as_posix()
        text = page.read_text(encoding="utf-8")
        new = linked(text, names, here)
        if new != text:
            page.write_text(new, encoding="utf-8")


def module_pages(html: Path) -> dict[str, str]:
    """`engine/scheduler.py` → the page about that module."""
    found = {}
    for page in (html / "api").glob("*.html"):
        name = page.stem.replace(".", "/") + ".py"
        if page.stem != "index":
            found |= {name: f"api/{page.name}", f"nanovllm/{name}": f"api/{page.name}"}
    return found


def linked(text: str, names: dict[str, str], here: str) -> str:
    """One page's text with the links; nothing within a link, a heading or the navigation."""
    def target(name):
        return posixpath.relpath(names[name], posixpath.dirname(here) or ".")

    def is_wanted(name):   # in code a common word may be somebody's variable
        return name in names and ("_" in name.strip("_") or name != name.lower())

    def in_code(match):
        name = unescape(match[1])
        is_method = "." in names.get(name, "").rpartition("-")[2]   # only after a dot: x.take()
        if not is_wanted(name) or (is_method and not match.string[:match.start()].endswith(DOT)):
            return match[0]
        return f'<a class="symbol" href="{target(name)}">{match[0]}</a>'

    def in_text(match):    # a bare word in lower case may mean anything: `stop`, `text`
        name = match[2]
        is_sure = "." in name or name[0].isupper() or match[3].startswith("()")
        if name not in names or name.endswith(".py") or len(name) < 4 or not is_sure:
            return match[0]
        return f'<a class="symbol" href="{target(name)}">{match[0]}</a>'

    def in_part(start, end):
        def file(match):
            place = start + match.start()
            block = max(text.rfind(tag, 0, place) for tag in ("<p>", "<li>", "<td"))
            if match[2] not in names or OTHER in text[max(block, 0):place]:
                return match[0]
            return f'<a class="symbol" href="{target(match[2])}">{match[0]}</a>'

        return INLINE.sub(in_text, NAME.sub(in_code, FILE.sub(file, text[start:end])))

    result, depth, last = [], 0, 0
    for tag in TAG.finditer(text):
        part = text[last:tag.start()] if depth else in_part(last, tag.start())
        result += [part, tag[0]]
        depth, last = max(0, depth + (-1 if tag[1] else 1)), tag.end()
    return CELL.sub(with_breaks, "".join([*result, in_part(last, len(text))]))


def with_breaks(cell: re.Match) -> str:
    """A cell of a table whose paths and names may be broken after `/` and `_`."""
    return WORD.sub(lambda word: word[1] + re.sub(r"([/_])(?=\w)", r"\1<wbr>", word[2]), cell[0])
