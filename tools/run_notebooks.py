#!/usr/bin/env python3
"""Execute notebooks in place, store what they show, and clean them with nbdev_clean.

    python tools/run_notebooks.py                     all the days and appendices
    python tools/run_notebooks.py 3 A nbs/05_*.ipynb  some of them, by name or by file
    python tools/run_notebooks.py --flags gpu         also the cells flagged `#| gpu`
    python tools/run_notebooks.py --flags gpu --only-flagged
                                                      run those cells and the cells that they need,
                                                      and store what those cells show; with
                                                      --cells ID only these of them
    python tools/run_notebooks.py --keep-going        store the outputs of all cells but those that
                                                      fail

The kernel works beside the notebook and imports the package of this repository. Cells with a flag
from `tst_flags` in settings.ini (`gpu`, `weights`) are left out unless asked for, and keep the
outputs that are stored already. A notebook that fails is not changed. Several runs at a time may
store other cells of the same notebook.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import symtable
import sys
import time
from collections.abc import Collection
from configparser import ConfigParser
from contextlib import contextmanager
from pathlib import Path

from tools.export import NBS, ROOT, appendices, day_notebooks, day_of
from tools.export import select as all_notebooks


def test_flags() -> set[str]:
    """The flags of cells that are left out unless asked for."""
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return set(config["DEFAULT"]["tst_flags"].split())


def directives(source: str) -> set[str]:
    """The first word of each `#|` line at the top of a cell."""
    found = set()
    for line in source.splitlines():
        match = re.match(r"\s*#\s*\|\s*([\w-]+)", line)
        if line.strip() and not match:
            break
        if match:
            found.add(match.group(1))
    return found


def select(names: list[str]) -> list[Path]:
    """The notebooks that `names` mean: days (`3`), appendices (`A`) or files; none means all."""
    known = {str(day_of(nb)): nb for nb in day_notebooks()} | appendices()
    chosen = [known.get(name, Path(name).resolve()) for name in names]
    for name, path in zip(names, chosen):
        if path.suffix != ".ipynb" or not path.exists():
            raise SystemExit(f"no such notebook: {name}")
    return chosen or all_notebooks()


def python_path(package: Path) -> str:
    """PYTHONPATH for a notebook: the folder that holds the package, and what is beside the days."""
    return os.pathsep.join(filter(None, [str(package), str(NBS), os.environ.get("PYTHONPATH")]))


def free_names(source: str) -> set[str]:
    """The global names that this piece of code mentions, also inside functions and classes."""
    found, tables = set(), [symtable.symtable(source, "cell", "exec")]
    while tables:
        table = tables.pop()
        is_module = table.get_type() == "module"
        found |= {symbol.get_name() for symbol in table.get_symbols()
                  if symbol.is_referenced() and (symbol.is_global() or is_module)}
        tables += table.get_children()
    return found


def names(source: str) -> tuple[set[str], set[str]]:
    """The names that a cell leaves made or changed, and those that it needs from before."""
    left, needs = set(), set()
    if source.startswith("%%"):                  # no Python
        return left, needs
    for statement in ast.parse(source).body:
        code = ast.unparse(statement)
        here = {symbol.get_name() for symbol in
                symtable.symtable(code, "cell", "exec").get_symbols()
                if symbol.is_assigned() or symbol.is_imported()}
        targets = [getattr(node, "target", None) or getattr(node, "optional_vars", None)
                   for node in ast.walk(statement) if isinstance(node, (ast.For, ast.withitem))]
        loops = {name.id for target in targets if target for name in ast.walk(target)
                 if isinstance(name, ast.Name)}
        needs |= free_names(code) - left - loops
        left |= here
        for node in ast.walk(statement):         # thing[0] = …, thing.x = …, thing.update(…)
            match node:
                case (ast.Attribute(value=ast.Name(id=name), ctx=ast.Store())
                      | ast.Subscript(value=ast.Name(id=name), ctx=ast.Store())
                      | ast.Call(func=ast.Attribute(
                          value=ast.Name(id=name), attr="append" | "update" | "setdefault"))):
                    left.add(name)
    return left, needs


def needed(sources: list[str], wanted: set[int]) -> set[int]:
    """The wanted cells, by number, and the cells before them that they stand on."""
    needs, chosen = set(), set()
    for i in reversed(range(len(sources))):
        left, before = names(sources[i])
        if i in wanted or left & needs:
            chosen.add(i)
            needs = needs - left | before        # a class that goes on needs itself
    return chosen


@contextmanager
def to_ourselves(path: Path):
    """Meanwhile no other run of this tool writes to the notebook."""
    with open(path) as file:
        try:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX)
        except ModuleNotFoundError:              # Windows: one run at a time
            pass
        yield


def execute(path: Path, skip: set[str], store: set[str] | None, timeout: int,
            keeps_going: bool = False, ids: Collection[str] = ()) -> list[str]:
    """Run the notebook at `path` and save its outputs; leaves out cells with a flag in `skip`.

    With `store`, only cells with one of those flags run, with what they need, and they alone get
    new outputs; with `ids`, only these of them. Raises nbclient's CellExecutionError, and saves
    nothing, when a cell fails; if it `keeps_going` the failed cells have the outputs that they had,
    and the errors are returned.
    """
    import nbformat
    from nbclient import NotebookClient

    class Client(NotebookClient):
        """Leaves cells out by their flags; nbclient itself knows only tags."""

        async def async_execute_cell(self, cell, *args, **kwargs):
            if cell.cell_type == "code" and (directives(cell.source) & skip
                                             or cell.source not in to_run):
                return cell
            return await super().async_execute_cell(cell, *args, **kwargs)

    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    sources, wanted = [cell.source for cell in code], set(range(len(code)))
    to_run = set(sources)
    if store is not None:
        wanted = {i for i, cell in enumerate(code)
                  if directives(cell.source) & store and (not ids or cell.id in ids)}
        if unknown := set(ids) - {code[i].id for i in wanted}:
            raise SystemExit(f"{path.name} has no such cell with these flags: {sorted(unknown)}")
        to_run = {sources[i] for i in needed(sources, wanted)}
    Client(notebook, timeout=timeout, kernel_name="python3", record_timing=False,
           allow_errors=keeps_going,
           extra_arguments=["--IPKernelApp.log_level=ERROR"],    # no advice about its ports
           resources={"metadata": {"path": str(path.parent)}}).execute()
    errors, new = [], {}
    for i, cell in enumerate(code):
        failed = [o for o in cell.outputs if o.output_type == "error"]
        errors += [f"cell {cell.id}: {o.ename}: {o.evalue}" for o in failed]
        if i in wanted and not failed:
            new[cell.id] = cell.outputs
            if store is not None:                # without progress bars and warnings
                new[cell.id] = [o for o in cell.outputs if o.get("name") != "stderr"]
    with to_ourselves(path):
        notebook = nbformat.read(path, as_version=4)    # others may have stored theirs
        for cell in notebook.cells:
            if cell.id in new:
                cell.outputs = new[cell.id]
        nbformat.write(notebook, path)
        clean(path)
    return errors


def clean(path: Path) -> None:
    """What nbdev_clean does: drop execution counts, foreign metadata and memory addresses."""
    try:
        from nbdev.clean import nbdev_clean
    except ModuleNotFoundError:
        print(f"{path.name}: nbdev is not here; run `nbdev_clean` before you commit")
        return
    os.chdir(ROOT)                   # nbdev looks for settings.ini from here
    nbdev_clean(str(path))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", help="days, appendices or files (default: all)")
    parser.add_argument("--flags", nargs="+", default=[], metavar="FLAG",
                        help="run the cells with these flags too: gpu, weights")
    parser.add_argument("--only-flagged", action="store_true",
                        help="run the cells with --flags and what they need, and store new outputs "
                             "for them alone")
    parser.add_argument("--cells", nargs="+", default=[], metavar="ID",
                        help="with --only-flagged: only these of the flagged cells, by their ids "
                             "in the file")
    parser.add_argument("--keep-going", action="store_true",
                        help="after a cell that fails, run the others and store their outputs")
    parser.add_argument("--timeout", type=int, default=900, metavar="S",
                        help="seconds that one cell may take (default: 900)")
    args = parser.parse_args()
    known = test_flags()
    if unknown := set(args.flags) - known:
        parser.error(f"no such flag: {', '.join(sorted(unknown))} (there are: {sorted(known)})")
    if args.only_flagged and not args.flags:
        parser.error("--only-flagged needs --flags")
    if args.cells and not args.only_flagged:
        parser.error("--cells needs --only-flagged")

    # The kernel inherits these: the package is this repository's, whatever else is installed.
    os.environ["PYTHONPATH"] = python_path(ROOT)
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    from nbclient.exceptions import CellExecutionError

    notebooks, failed = select(args.notebooks), 0
    if not notebooks:
        parser.error(f"no notebook in {NBS}")
    for number, path in enumerate(notebooks, 1):
        print(f"[{number}/{len(notebooks)}] {path.name} … ", end="", flush=True)
        start = time.perf_counter()
        try:
            errors = execute(path, known - set(args.flags),
                             set(args.flags) if args.only_flagged else None, args.timeout,
                             args.keep_going, args.cells)
            verdict = "\n".join(["FAILED in some cells", *errors]) if errors else "ok"
            failed += bool(errors)
        except (CellExecutionError, TimeoutError) as error:
            plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))      # without the colours
            verdict, failed = f"FAILED, not changed\n{plain}", failed + 1
        print(f"{time.perf_counter() - start:.1f} s {verdict}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
