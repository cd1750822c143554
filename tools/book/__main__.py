"""Render the notebooks and the pages of docs/ as a book: a static site, read in a browser.

    python tools/book                    into _book/html, and check every link within it
    python tools/book --serve            and show it at http://localhost:8000
    python tools/book --address URL      the repository's address: links to it, "open in Colab"

It runs no notebook: what the pages show is what the notebooks have stored. It needs what
`book_requirements` in settings.ini names, but neither PyTorch nor the network. Without --address it
takes `git_url` of settings.ini; on GitHub Actions, the repository that runs it.

Exit status: 0 if all is well, 1 if a page has a fault or a link leads nowhere.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import os
import shutil
import sys
import time
from configparser import ConfigParser, SectionProxy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # in place of this folder, so that its files are not taken for others

from tools.book import links, pages, symbols  # noqa: E402


def settings() -> SectionProxy:
    """What settings.ini says."""
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def repository_address() -> str:
    """Where the repository is to be found, from settings.ini or from GitHub Actions; or nothing."""
    here = os.environ.get("GITHUB_REPOSITORY", "")
    if not here:
        return settings().get("git_url", "").rstrip("/")
    return f"{os.environ.get('GITHUB_SERVER_URL', 'https://github.com')}/{here}"


def build(out: Path, address: str) -> list[str]:
    """Write the site into `out`/html; what is wrong with it, a line each."""
    from sphinx.cmd.build import build_main

    source, html, warnings = out / "source", out / "html", out / "warnings.txt"
    shutil.rmtree(html, ignore_errors=True)
    index = pages.write(source, address)
    os.environ["BOOK_REPOSITORY"], os.environ["BOOK_SEARCH"] = address, str(source / "search.js")
    status = build_main(["-q", "-b", "html", "-c", str(Path(__file__).parent), "-j", "2", "-w",
                         str(warnings), "-d", str(out / "doctrees"), str(source), str(html)])
    if status:
        return [f"sphinx ended with status {status}"]
    symbols.link(html, index)
    shown = warnings.read_text(encoding="utf-8").replace(f"{source}/", "")
    return [line for line in shown.splitlines() if line.strip()] + links.broken(html)


def main() -> int:
    parser = argparse.ArgumentParser("tools/book", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "_book", metavar="DIR")
    parser.add_argument("--address", default=repository_address(), metavar="URL",
                        help="of the repository, as in https://github.com/you/nano-vllm-taught")
    parser.add_argument("--requirements", action="store_true",
                        help="print the packages that it needs, for pip install $(…), and end")
    parser.add_argument("--serve", action="store_true", help="show the site at localhost:8000")
    args = parser.parse_args()
    if args.requirements:
        print(settings()["book_requirements"].strip())
        return 0
    start, out = time.perf_counter(), args.out.resolve()
    try:
        faults = build(out, args.address.rstrip("/"))
    except ModuleNotFoundError as error:
        print(f"error: there is no {error.name}: pip install $(python tools/book --requirements)",
              file=sys.stderr)
        return 1
    print(*faults, sep="\n", end="\n" if faults else "")
    number = len(list((out / "html").rglob("*.html")))
    print(f"{number} pages in {time.perf_counter() - start:.0f} seconds, {len(faults)} faults: "
          f"{out / 'html' / 'index.html'}")
    if args.serve:
        handler = functools.partial(http.server.SimpleHTTPRequestHandler,
                                    directory=str(out / "html"))
        print("http://localhost:8000 (Ctrl-C ends it)")
        try:
            http.server.ThreadingHTTPServer(("localhost", 8000), handler).serve_forever()
        except KeyboardInterrupt:
            print()
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
