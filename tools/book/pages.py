"""The sources of the book: copies of notebooks and pages whose links fit the site, and the API.

Their places are those of the repository, so that a link from page to page is right in both. What
the site has no page for leads to the repository, if its address is known; otherwise to a page with
the file's text.
"""

from __future__ import annotations

import ast
import functools
import json
import posixpath
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from tools.export import LIB, PACKAGE, ROOT, appendices, day_notebooks

LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
EXPORT = re.compile(r"#\| *exporti? +([\w.]+)")
C_CELL = re.compile(r"%%c +(\S+)[^\S\n]*\n")
LANGUAGES = {".py": "python", ".c": "c", ".h": "c", ".toml": "toml", ".ini": "ini", ".json": "json",
             ".md": "markdown", ".sh": "bash", ".yml": "yaml"}
SEARCH = Path(__file__).parent / "search.js"
EXERCISE = re.compile(r"\*\*(\d+)[ .·]")           # how an exercise begins
SERIES = re.compile(r'answer\("(exercise_\w+_)1"\)')  # names that all exercises of a day share
FIRST = ["glossary.md", "map.md", "vllm.md", "scaling.md", "benchmarks.md", "ablation.md",
         "contributing.md"]


@dataclass
class Site:
    """What is being written: where, with which pages, and which names are defined where."""
    dest: Path
    address: str                                             # of the repository, or empty
    pages: set[str] = field(default_factory=set)             # paths in the repository
    names: dict[str, str] = field(default_factory=dict)      # "Scheduler.schedule" → page#anchor
    sources: dict[str, Path] = field(default_factory=dict)   # further pages that links ask for


def slug(title: str) -> str:
    """The anchor of a heading, as GitHub and MyST make it; Jupyter's (`A-title`) gives the same."""
    return re.sub(r"[^\w\u4e00-\u9fff\- ]", "", unquote(title).strip().lower().replace(" ", "-"))


def write(dest: Path, address: str) -> dict[str, str]:
    """Write all the sources; the places of the names that the notebooks define."""
    shutil.rmtree(dest, ignore_errors=True)
    site = Site(dest, address)
    notebooks = day_notebooks() + list(appendices().values())
    docs = sorted((ROOT / "docs").glob("*.md"),
                  key=lambda p: (FIRST.index(p.name) if p.name in FIRST else len(FIRST), p.name))
    chinese = [ROOT / "README.zh-CN.md"] if (ROOT / "README.zh-CN.md").exists() else []
    changes = [ROOT / "CHANGELOG.md"] if (ROOT / "CHANGELOG.md").exists() else []
    site.pages = {name_of(path) for path in [*notebooks, *docs, *chinese, *changes]}
    for notebook in notebooks:
        write_notebook(site, notebook)
    for page in [*docs, *chinese, *changes]:
        text = page.read_text(encoding="utf-8")
        if page.name == "glossary.md":
            text = with_sections(site, text)
        put(site, name_of(page), relink(site, text, name_of(page)))
    for picture in (ROOT / "docs").glob("*.svg"):
        shutil.copy(picture, site.dest / "docs")
    write_api(site)
    parts = {"Seven days": day_notebooks(), "Appendices": list(appendices().values()),
             "To look up": docs, "The package": [Path("api/index.md")], "More": chinese + changes}
    write_index(site, parts)
    write_sources(site)
    return site.names


def name_of(path: Path) -> str:
    """A path of the repository as a text, `docs/map.md`."""
    return path.relative_to(ROOT).as_posix() if path.is_absolute() else path.as_posix()


def put(site: Site, name: str, text: str) -> None:
    """Write one source."""
    (site.dest / name).parent.mkdir(parents=True, exist_ok=True)
    (site.dest / name).write_text(text, encoding="utf-8")


# -----------------------------------------------------------------------------------------------
# Links
# -----------------------------------------------------------------------------------------------

def relink(site: Site, text: str, here: str) -> str:
    """The text of the page `here` with its links made right for the site."""
    parts = re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)
    for i in range(0, len(parts), 2):
        parts[i] = LINK.sub(lambda link: new_link(site, *link.groups(), here), parts[i])
    return "".join(parts)


def new_link(site: Site, text: str, target: str, here: str) -> str:
    """One link as the site needs it; its text alone where it leads to no page."""
    path, _, fragment = target.partition("#")
    if re.match(r"[a-z]+:", target) or (path and not (ROOT / Path(here).parent / path).exists()):
        return f"[{text}]({target})"
    anchor = f"#{slug(fragment)}" if fragment else ""
    if not path:
        return f"[{text}]({anchor})"
    place = posixpath.normpath(posixpath.join(posixpath.dirname(here), path))
    if place == "README.md":
        place, anchor = "index.md", anchor
    elif place.startswith(f"{PACKAGE}/") and place.endswith(".py"):
        place, anchor = api_page(place), ""
    elif place not in site.pages:
        if site.address:
            kind = "tree" if (ROOT / place).is_dir() else "blob"
            return f"[{text}]({site.address}/{kind}/main/{place})"
        if (ROOT / place).is_dir():
            return text
        place, anchor = source_page(site, place), ""
    return f"[{text}]({posixpath.relpath(place, posixpath.dirname(here) or '.')}{anchor})"


def api_page(place: str) -> str:
    """The page about a module of the package."""
    module = place.removeprefix(f"{PACKAGE}/").removesuffix(".py").replace("/", ".")
    return f"api/{module.removesuffix('.__init__')}.md"


def source_page(site: Site, place: str) -> str:
    """The page that shows a file of the repository, made when the others are there."""
    site.sources[place] = ROOT / place
    return f"files/{place}.md"


def with_sections(site: Site, text: str) -> str:
    """The glossary with its first letters as links, and links that open a section of a day.

    The search of the site is told as well where a term is taught.
    """
    terms = re.findall(r"^### (.+)$", text, re.MULTILINE)
    letters = {term[0].upper(): slug(term) for term in reversed(terms)}
    line = " · ".join(f"[{letter}](#{letters[letter]})" for letter in sorted(letters))
    text = re.sub(r"^\[ablation\].*$", lambda all_terms: f"{line}\n\n{all_terms[0]}", text, count=1,
                  flags=re.MULTILINE)
    entries, taught = re.split(r"^(?=### )", text, flags=re.MULTILINE), {}
    for i, term in enumerate(terms, 1):
        for notebook in re.findall(r"\(\.\./(nbs/[\w/]+\.ipynb)\)", entries[i]):
            if title := section_about(notebook, term):
                taught.setdefault(term, (notebook.removesuffix(".ipynb"), title.replace("`", "")))
                entries[i] = entries[i].replace(f"{notebook})", f"{notebook}#{slug(title)})")
    put(site, "search.js", f"const TAUGHT = {json.dumps(taught)};\n{SEARCH.read_text('utf-8')}")
    return "".join(entries)


def section_about(notebook: str, term: str) -> str:
    """The title of a notebook's section that tells most about a term, or nothing."""
    word = re.escape(term.lower().replace("-", " ").rstrip("s"))
    best, found = 0, ""
    for title, text in sections(notebook):
        title_, text_ = (x.lower().replace("-", " ").replace("`", "") for x in (title, text))
        score = 100 * len(re.findall(rf"\b{word}", title_)) + len(re.findall(rf"\b{word}", text_)) \
            + 5 * len(re.findall(rf"\*{word}", text_))      # where it is emphasised
        if score > best:
            best, found = score, title
    return found


@functools.cache
def sections(notebook: str) -> list[tuple[str, str]]:
    """Title and text of each section of a notebook."""
    cells = json.loads((ROOT / notebook).read_text(encoding="utf-8"))["cells"]
    text = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    parts = re.split(r"^#{2,4} +(.+)$", text, flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2]))


def write_sources(site: Site) -> None:
    """The pages that show a file each."""
    for place, path in site.sources.items():
        text = path.read_text(encoding="utf-8").rstrip()
        language = LANGUAGES.get(path.suffix, "text")
        put(site, f"files/{place}.md",
            f"---\norphan: true\n---\n# {place}\n\n````{language}\n{text}\n````\n")


# -----------------------------------------------------------------------------------------------
# Notebooks
# -----------------------------------------------------------------------------------------------

def write_notebook(site: Site, path: Path) -> None:
    """A copy for the site: links, folded cells, and an anchor where a name is defined."""
    here, cells, told, is_exercise = name_of(path), [], Answers(answers()), False
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for number, cell in enumerate(notebook["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            if titles := re.findall(r"^#+ .*", source, re.MULTILINE):
                is_exercise = "Exercises" in titles[-1]
            cells += told.beside(relink(site, source, here))
            continue
        if found := EXPORT.search(source):
            cells.append(markdown(announce(site, source, found[1], here), f"defines-{number}"))
        if found := C_CELL.match(source):
            body = source[found.end():].rstrip()
            place = f"{PACKAGE}/{path.stem.split('_')[1]}/{found[1]}"
            cells.append(markdown(f"{goes_to(place, '')}\n\n```c\n{body}\n```", f"c-{number}"))
            if not cell["outputs"]:
                continue
            cell["metadata"]["tags"] = ["remove-input"]
        for output in cell["outputs"]:
            if shown := output.get("data", {}).get("text/markdown"):
                output["data"]["text/markdown"] = relink(site, "".join(shown), here)
        cells.append({**cell, "metadata": shown_as(cell, is_exercise)})
    notebook["cells"] = cells + told.due()
    notebook["metadata"] = {"kernelspec": {"name": "python3", "display_name": "Python 3",
                                           "language": "python"}}
    put(site, here, json.dumps(notebook))


def answers(folder: Path | None = None) -> dict[str, str]:
    """Name of a turn or an exercise → one solution, from nbs/turns/answers."""
    found = {}
    for path in sorted((folder or ROOT / "nbs" / "turns" / "answers").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        for node in ast.parse(text).body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                found[node.name] = "\n".join(lines[first - 1:node.end_lineno])
    return found


@dataclass
class Answers:
    """Puts the answers of a notebook behind a click, where they are named or their exercise ends.

    Where a line says once that `answer("exercise_4_1")` … have them, the exercises are counted.
    """
    solutions: dict[str, str]
    series: str = ""                     # "exercise_4_", once a text has said it
    waiting: str = ""                    # the answer that comes when the present exercise is over
    made: int = 0                        # cells so far

    def beside(self, text: str) -> list[dict]:
        """The cells for a text, answers among them."""
        cells, paragraphs = [], []

        def end_text():
            if paragraphs:
                self.made += 1
                cells.append(markdown("\n\n".join(paragraphs), f"text-{self.made}"))
                paragraphs.clear()

        for paragraph in re.split(r"\n{2,}(?=\S)", text):
            begins = EXERCISE.match(paragraph) if self.series else None
            if self.waiting and (begins or paragraph.startswith("#")):
                end_text()
                cells += self.due()
            if begins and self.series + begins[1] in self.solutions:
                self.waiting = self.series + begins[1]
            paragraphs.append(paragraph)
            if found := SERIES.search(paragraph):
                self.series = found[1]
                continue
            for name in re.findall(r'answer\("(\w+)"\)', paragraph):
                if name in self.solutions:
                    end_text()
                    cells.append(self.folded(name))
        end_text()
        return cells

    def due(self) -> list[dict]:
        """The answer that waits for the end of its exercise, if there is one."""
        name, self.waiting = self.waiting, ""
        return [self.folded(name)] if name else []

    def folded(self, name: str) -> dict:
        """A cell with one solution, and with another that its text sends the reader to."""
        self.made += 1
        others = re.findall(r'answer\("(\w+)"\)', self.solutions[name])
        title = name
        if number := re.fullmatch(r"exercise_(\w)_(\d+)", name):
            title = f"exercise {number[1].upper()}.{number[2]}"
        elif name.startswith("exercise_"):
            title = name.removeprefix("exercise_").replace("_", " ")
        return {"cell_type": "code", "id": f"answer-{self.made}", "outputs": [],
                "execution_count": None,
                "source": "\n\n\n".join(self.solutions[n] for n in [*others, name]),
                "metadata": {"tags": ["hide-input"], "mystnb": prompts(f"the answer: {title}")}}


def prompts(what: str) -> dict[str, str]:
    """What a fold says, closed and open."""
    return {"code_prompt_show": f"Show {what}", "code_prompt_hide": f"Hide {what}"}


def markdown(text: str, identity: str) -> dict:
    """A cell of text."""
    return {"cell_type": "markdown", "id": identity, "metadata": {}, "source": text}


def shown_as(cell: dict, is_exercise: bool = False) -> dict:
    """The metadata that folds a cell: code of figures, answers; and the text for an image."""
    tags, jupyter = cell["metadata"].get("tags", []), cell["metadata"].get("jupyter", {})
    source, settings = "".join(cell["source"]), {}
    for output in cell["outputs"]:
        alt = output.get("metadata", {}).get("image/png", {}).get("alt")
        settings = {"image": {"alt": alt}} if alt else settings
    if "answer" in tags:
        tags = ["hide-cell"]
        settings |= prompts("the answer")
    elif "your-turn" in tags:                                # to be read before it is written
        tags = ["your-turn"]
    elif "hide-input" in tags or jupyter.get("source_hidden") or is_imports(source):
        tags = [*tags, "hide-input"]
        names = list(dict.fromkeys(n for n in defined_in(source) if "." not in n))
        what = "the code of the figure" if settings else \
            "the imports" if is_imports(source) else \
            f"the code: {', '.join(names)}" if 0 < len(names) < 5 else "the code"
        settings |= prompts(what)
    elif is_exercise and any(output["output_type"] == "stream" for output in cell["outputs"]) \
            and not source.startswith("grade("):
        tags = ["hide-output"]                               # first the reader predicts it
        settings |= prompts("what it prints")
    return {"tags": tags, **({"mystnb": settings} if settings else {})}


def is_imports(source: str) -> bool:
    """Whether a long cell does little but import: a reader of the book may skip it."""
    try:
        body = ast.parse(source).body
    except SyntaxError:                                      # a magic, or `await` alone
        return False
    lines = sum(node.end_lineno - node.lineno + 1 for node in body)
    imports = sum(node.end_lineno - node.lineno + 1 for node in body
                  if isinstance(node, (ast.Import, ast.ImportFrom)))
    return lines > 9 and imports > .6 * lines


def goes_to(place: str, link: str) -> str:
    """The line above a cell that says which file it becomes a part of."""
    shown = f'<a href="{link}">{place}</a>' if link else place
    return f'<div class="exports">→ {shown}</div>'


def announce(site: Site, source: str, module: str, here: str) -> str:
    """Anchors for what an export cell defines, and where the cell goes."""
    page, anchors = here.removesuffix(".ipynb") + ".html", []
    up = "../" * here.count("/")
    for name in defined_in(source):      # of a class told in pieces the first has the anchor
        anchor = f"def-{module}-{name}"
        if f"{module}.{name}" not in site.names:
            site.names[f"{module}.{name}"] = f"{page}#{anchor}"
            anchors.append(f'<a class="def" id="{anchor}"></a>')
    place = f"{PACKAGE}/{module.replace('.', '/')}.py"
    link = up + api_page(place).replace(".md", ".html")
    return "".join(anchors) + goes_to(place, link)


def defined_in(source: str) -> list[str]:
    """Names of the functions, classes, methods and constants that a cell defines."""
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return []
    found = []
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found.append(node.name)
        elif isinstance(node, ast.ClassDef):
            found.append(node.name)
            found += [f"{node.name}.{part.name}" for part in node.body
                      if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef))
                      and not part.name.startswith("__")]
        elif isinstance(node, ast.Assign):
            found += [target.id for target in node.targets
                      if isinstance(target, ast.Name) and target.id.isupper()]
    return found


# -----------------------------------------------------------------------------------------------
# The package, and the first page
# -----------------------------------------------------------------------------------------------

def signature(node) -> str:
    """How a function is called, or a class is made."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        made = next((part for part in node.body if getattr(part, "name", "") == "__init__"), None)
        fields = [ast.unparse(part) for part in node.body if isinstance(part, ast.AnnAssign)]
        head = f"class {node.name}" + (f"({bases})" if bases else "")
        if made is None:
            return "\n    ".join([head + (":" if fields else ""), *fields])
        return f"{head}:\n    def __init__({ast.unparse(made.args)})"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    above = "".join(f"@{ast.unparse(decorator)}\n" for decorator in node.decorator_list)
    return f"{above}def {node.name}({ast.unparse(node.args)}){returns}"


def entry(site: Site, module: str, node, owner: str = "") -> str:
    """The text about one class, function or method."""
    name = f"{owner}.{node.name}" if owner else node.name
    cell = site.names.get(f"{module}.{name}")
    text = [f"{'###' if owner else '##'} {plain(name)}",
            f"```python\n{signature(node)}\n```"]
    if doc := ast.get_docstring(node):
        text.append(plain(doc))
    if cell:
        text.append(f'<a href="../{cell}">the cell that defines it</a>')
    if isinstance(node, ast.ClassDef):
        text += [entry(site, module, part, node.name) for part in node.body
                 if isinstance(part, ast.FunctionDef) and ast.get_docstring(part)]
    return "\n\n".join(text)


def plain(doc: str) -> str:
    """A docstring as Markdown: words as they are, but for the code between backticks."""
    parts = re.split(r"(`[^`\n]*`)", doc)
    parts[::2] = [re.sub(r"([*_<>$\[\]|#])", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


def write_api(site: Site) -> None:
    """A page for each module, and one that lists them."""
    rows, toc = [], []
    for path in sorted(LIB.rglob("*.py")):
        place = path.relative_to(ROOT).as_posix()
        if path.name == "_modidx.py":
            continue
        page = api_page(place)
        module = page.removeprefix("api/").removesuffix(".md")
        text = path.read_text(encoding="utf-8").rstrip()
        tree = ast.parse(text)
        doc = ast.get_docstring(tree) or ""
        cells = [target for name, target in site.names.items() if name.rpartition(".")[0] == module
                 or name.rsplit(".", 2)[0] == module]
        told = " · ".join(f'<a href="../{nb}">{Path(nb).stem}</a>'
                          for nb in dict.fromkeys(cell.partition("#")[0] for cell in cells))
        body = [f"# {plain(module)}", plain(doc),
                f"`{place}`" + f" · written in {told}" * bool(told)]
        body += [entry(site, module, node) for node in tree.body
                 if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_"]
        body += [f"## The whole file\n\n```{{code-block}} python\n:linenos:\n\n{text}\n```"]
        put(site, page, "\n\n".join(part for part in body if part) + "\n")
        if text:
            rows.append(f"| [`{place}`]({Path(page).name}) | {plain(doc.partition(chr(10))[0])} |")
        toc.append(Path(page).name)
    put(site, "api/index.md", "# The package, file by file\n\nEach page has a module's classes and "
        "functions with their docstrings, links to the cells that define them, and the whole file."
        "\n\n| file | what it is |\n|---|---|\n" + "\n".join(rows)
        + "\n\n```{toctree}\n:hidden:\n\n" + "\n".join(toc) + "\n```\n")


def write_index(site: Site, parts: dict[str, list[Path]]) -> None:
    """The first page: the README, and the order of all pages."""
    text = relink(site, (ROOT / "README.md").read_text(encoding="utf-8"), "README.md")
    if site.address:
        folder = site.address.rpartition("/")[2].removesuffix(".git")
        text = text.replace("```bash\n", f"```bash\ngit clone {site.address} && cd {folder}\n", 1)
    for caption, paths in parts.items():
        listed = "\n".join(name_of(path) for path in paths)
        if listed:
            text += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{listed}\n```\n"
    put(site, "index.md", text)
