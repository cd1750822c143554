#!/usr/bin/env python3
"""Check that no day needs a later day, and that an appendix needs only the days that it names.

    python tools/check_days.py                 all the days and appendices, two at a time
    python tools/check_days.py 1 3 A           some of them

For each day N the notebooks 1 to N are exported into a temporary folder, and notebook N is run with
that package in place of the repository's, the way nbdev_test runs it. What a reader who stops after
day N has in hand is therefore whole. An appendix is run on the package of its days and itself.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tools.export import (
    LIB, PACKAGE, ROOT, ExportError, appendices, day_notebooks, day_of, days_needed,
)
from tools.run_notebooks import python_path, select, test_flags

LONG = ("7", "A")         # begin with them: whatever comes last runs while a core has nothing to do

# Runs in a process of its own: argv is the notebook, the folder that holds the package, the flags.
RUN_ONE = """
import sys
from pathlib import Path
from nbdev.test import test_nb

notebook, folder, flags = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split()
passed, seconds = test_nb(notebook, skip_flags=flags, basepath=folder)
import nanovllm
for name, module in list(sys.modules.items()):
    if name.partition(".")[0] == "nanovllm":
        assert Path(module.__file__).is_relative_to(folder), f"{name} came from {module.__file__}"
sys.exit(0 if passed else 1)
"""


def environment(folder: Path = ROOT) -> dict[str, str]:
    """The environment for a notebook under test: one thread, since two notebooks run at a time."""
    env = dict(os.environ, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", PYTHONUNBUFFERED="1",
               PYTHONPATH=python_path(folder))
    if shutil.which("nvidia-smi") is None:   # before any notebook of the process imports Triton
        env["TRITON_INTERPRET"] = "1"
    return env


def run_one(name: str) -> str:
    """Run a day (`3`) or an appendix (`A`) on its package; what went wrong, or nothing."""
    notebook, = select([name])
    part = ["--upto" if name.isdigit() else "--appendix", name]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder).resolve()
        done = subprocess.run([sys.executable, ROOT / "tools" / "export.py", *part,
                               "--lib-path", folder / PACKAGE], text=True, capture_output=True)
        if not done.returncode:
            if (LIB / "demo_model").is_dir():
                (folder / PACKAGE / "demo_model").symlink_to(LIB / "demo_model")
            done = subprocess.run([sys.executable, "-c", RUN_ONE, notebook, folder,
                                   " ".join(test_flags())], text=True, capture_output=True,
                                  cwd=notebook.parent, env=environment(folder))
    return (done.stdout + done.stderr).strip() or "failed" if done.returncode else ""


def check(names: list[str]) -> int:
    """Run these days and appendices, the longest first; returns how many failed."""
    names = sorted(names, key=lambda name: name not in LONG)

    def timed(name):
        start = time.perf_counter()
        print(f"{'day' if name.isdigit() else 'appendix'} {name} …", flush=True)
        return name, run_one(name), time.perf_counter() - start

    failed = []
    with ThreadPoolExecutor(max_workers=2) as pool:
        for done in as_completed([pool.submit(timed, name) for name in names]):
            name, report, seconds = done.result()
            last = name if name.isdigit() else f"{days_needed(appendices()[name])}, and itself"
            print(f"{'day' if name.isdigit() else 'appendix'} {name} on the package of the days 1 "
                  f"to {last}: {seconds:.1f} s {'FAILED' if report else 'ok'}", flush=True)
            if report:
                failed.append(name)
                print("\n".join("    " + line for line in report.splitlines()), flush=True)
    print(f"{len(names) - len(failed)} of {len(names)} need nothing later"
          + (f"; failed: {' '.join(failed)}" if failed else ""))
    return len(failed)


def everything() -> list[str]:
    """The names of all the days and appendices."""
    return [str(day_of(notebook)) for notebook in day_notebooks()] + list(appendices())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="days and appendices (default: all)")
    names = parser.parse_args().names or everything()
    if unknown := sorted(set(names) - set(everything())):
        parser.error(f"there is no {', '.join(unknown)} (there are: {' '.join(everything())})")
    try:
        return 1 if check(names) else 0
    except ExportError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    sys.exit(main())
