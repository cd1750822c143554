"""Do the links of the finished site lead somewhere? Pages, anchors and pictures within it."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """What a page offers (ids) and what it asks for (links)."""

    def __init__(self, text: str):
        super().__init__()
        self.ids, self.links = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "id" or (name == "name" and tag == "a"):
                self.ids.add(value)
            elif name in ("href", "src") and value:
                self.links.append(value)


def broken(html: Path) -> list[str]:
    """A line for each link that leads nowhere; addresses elsewhere are not asked."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(html.rglob("*.html"))
             if "_static" not in path.parts}  # there are the theme's templates
    faults = []
    for path, page in pages.items():
        for link in dict.fromkeys(page.links):
            where = urlsplit(link)
            if where.scheme or where.netloc:
                continue
            target = (path.parent / unquote(where.path)).resolve() if where.path else path
            here, anchor = path.relative_to(html), unquote(where.fragment)
            if not target.exists():
                faults.append(f"{here}: {link} leads to no file")
            elif anchor and target in pages and anchor not in pages[target].ids \
                    and anchor not in ("", "top"):
                faults.append(f"{here}: {link}: that page has no such place")
    return faults
