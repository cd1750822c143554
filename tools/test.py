#!/usr/bin/env python3
"""Run every check of the project and close with one line, "N passed, N failed".

    python tools/test.py                      all of it
    python tools/test.py --only export repo   some of the steps

The steps:
  export     the committed package is what the notebooks export
  repo       pytest tests/: the tools, and what must hold for every file
  notebooks  nbdev_test: each notebook runs from its first cell to its last
  days       each notebook runs on the package of its own and the earlier days alone
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parent))
from check_days import environment  # noqa: E402
from export import ROOT, day_notebooks, day_of  # noqa: E402

TOOLS = ROOT / "tools"


def run(*command, env=None) -> tuple[int, str]:
    """Run a command in the repository, showing what it prints: (exit status, what it printed)."""
    process = subprocess.Popen([str(part) for part in command], cwd=ROOT, env=env, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    printed = []
    for line in process.stdout:
        print(line, end="", flush=True)
        printed.append(line)
    return process.wait(), "".join(printed)


def check_export() -> tuple[int, int]:
    status, _ = run(sys.executable, TOOLS / "export.py", "--check")
    return (0, 1) if status else (1, 0)


def check_repo() -> tuple[int, int]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        status, _ = run(sys.executable, "-m", "pytest", "-q", "tests", f"--junitxml={report}")
        if not report.exists():
            return 0, 1
        suite = ElementTree.parse(report).getroot().find("testsuite").attrib
    failed = int(suite["failures"]) + int(suite["errors"])
    passed = int(suite["tests"]) - failed - int(suite["skipped"])
    return passed, failed or int(status != 0)


def check_notebooks() -> tuple[int, int]:
    nbdev_test = Path(sysconfig.get_path("scripts")) / "nbdev_test"
    status, printed = run(nbdev_test, "--n_workers", "2", "--timing", env=environment())
    # nbdev_test ends by naming the notebooks that failed, one a line.
    _, _, names = printed.partition("nbdev Tests Failed On The Following Notebooks:")
    failed = len(re.findall(r"^\s+\S+\.ipynb$", names, re.MULTILINE)) or int(status != 0)
    return len(day_notebooks()) - failed, failed


def check_days() -> tuple[int, int]:
    # The package of all the days is the whole one: nbdev_test has run the last notebook on it.
    days = [day_of(notebook) for notebook in day_notebooks()][:-1]
    if not days:
        return 0, 0
    status, printed = run(sys.executable, TOOLS / "check_days.py", "--days", *days)
    passed = len(re.findall(r"^day \d+ .* ok$", printed, re.MULTILINE))
    return passed, max(len(days) - passed, int(status != 0))


STEPS = {
    "export": ("The package is what the notebooks export", check_export),
    "repo": ("The tools and the repository (pytest)", check_repo),
    "notebooks": ("The notebooks (nbdev_test)", check_notebooks),
    "days": ("No day needs a later day", check_days),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=STEPS, metavar="STEP",
                        help="run only these steps: " + ", ".join(STEPS))
    args = parser.parse_args()
    total_passed = total_failed = 0
    start, summary = time.perf_counter(), []
    for name in args.only or STEPS:
        title, step = STEPS[name]
        print(f"\n== {title} ==", flush=True)
        step_start = time.perf_counter()
        passed, failed = step()
        total_passed, total_failed = total_passed + passed, total_failed + failed
        seconds = time.perf_counter() - step_start
        summary.append(f"{title:45} {passed:3} passed {failed:3} failed {seconds:7.1f} s")
    print("\n== Summary ==", *summary, sep="\n")
    print(f"in {time.perf_counter() - start:.0f} seconds")
    print(f"{total_passed} passed, {total_failed} failed")
    return 1 if total_failed else 0


if __name__ == "__main__":
    sys.exit(main())
