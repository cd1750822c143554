#!/usr/bin/env python3
"""Check that no day needs a later day.

    python tools/check_days.py                all the days, two at a time
    python tools/check_days.py --days 1 3     some of them

For each day N the notebooks 1 to N are exported into a temporary folder, and notebook N is run with
that package in place of the repository's, the way nbdev_test runs it. What a reader who stops after
day N has in hand is therefore whole.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from export import LIB, NBS, PACKAGE, ROOT, day_notebooks, day_of  # noqa: E402

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


def environment(folder: Path | None = None) -> dict[str, str]:
    """The environment for a notebook under test: one thread, since two notebooks run at a time."""
    env = dict(os.environ, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    if shutil.which("nvidia-smi") is None:   # before any notebook of the process imports Triton
        env["TRITON_INTERPRET"] = "1"
    if folder is not None:           # also for the processes that a notebook starts
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), env.get("PYTHONPATH")]))
    return env


def run_day(day: int, flags: str) -> tuple[int, float, str]:
    """Run the notebook of `day` on the package of the days 1 to `day`: (day, seconds, report).

    The report is empty where the notebook passed.
    """
    start = time.perf_counter()
    notebook = next(nb for nb in day_notebooks() if day_of(nb) == day)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder).resolve()
        command = [sys.executable, ROOT / "tools" / "export.py",
                   "--upto", str(day), "--lib-path", folder / PACKAGE]
        done = subprocess.run(command, text=True, capture_output=True)
        if not done.returncode:
            if (LIB / "demo_model").is_dir():
                (folder / PACKAGE / "demo_model").symlink_to(LIB / "demo_model")
            command = [sys.executable, "-c", RUN_ONE, notebook, folder, flags]
            done = subprocess.run(command, text=True, capture_output=True, cwd=NBS,
                                  env=environment(folder))
    report = (done.stdout + done.stderr).strip() if done.returncode else ""
    return day, time.perf_counter() - start, report


def main() -> int:
    from run_notebooks import test_flags

    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--days", type=int, nargs="+", metavar="N", help="default: all that exist")
    args = parser.parse_args()
    existing = [day_of(nb) for nb in day_notebooks()]
    days = args.days or existing
    if missing := set(days) - set(existing):
        parser.error(f"no notebook for the days {sorted(missing)} in {NBS}")

    flags, failed = " ".join(test_flags()), []
    with ThreadPoolExecutor(max_workers=2) as pool:
        for day, seconds, report in pool.map(lambda day: run_day(day, flags), days):
            print(f"day {day} on the package of the days 1 to {day}: {seconds:.1f} s "
                  + ("FAILED" if report else "ok"), flush=True)
            if report:
                failed.append(day)
                print("\n".join("    " + line for line in report.splitlines()), flush=True)
    print(f"{len(days) - len(failed)} of {len(days)} days need no later day"
          + (f"; failed: {failed}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
