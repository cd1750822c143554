"""C in a notebook: running a cell that begins with `%%c linear.c` writes it into that file.

A file may be told in several cells. The first line of each is a comment and names the piece: the
cell may be changed and run again, and takes the place that it had. After a change of this first
line, run the notebook's setup cell and the C cells again.
"""

from pathlib import Path

from IPython import get_ipython


def register(folder):
    """Define `%%c NAME`, which writes into `folder`, made if it is not there; returns it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {}                                   # name → {first line of a piece: the piece}

    def c(name, text):
        title = text.strip("\n").partition("\n")[0]
        if not title.startswith(("//", "/*")):
            raise ValueError(f"a cell of {name} must begin with a comment, not with {title!r}")
        pieces = files.setdefault(name.strip(), {})
        pieces[title] = text.strip("\n")
        (folder / name.strip()).write_text("\n\n".join(pieces.values()) + "\n", encoding="utf-8")

    get_ipython().register_magic_function(c, magic_kind="cell")
    return folder
