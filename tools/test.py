#!/usr/bin/env python3
"""Run every check of the project and close with one line, "N passed, N failed".

    python tools/test.py                      all of it
    python tools/test.py --only export repo   some of the steps

The steps:
  export     the committed package is what the notebooks export
  repo       pytest tests/: the package, the tools, and what must hold for every file
  notebooks  nbdev_test: each notebook runs from its first cell to its last
  days       each notebook but the last day's runs on the package of its own and the earlier days
  rooms      without nanovllm/cpu, gpu or serve, or all, the tests of all the rest pass
  sanitize   the C kernels' tests pass under gcc's address and undefined-behaviour sanitizers
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

from tools.check_days import check, environment, everything
from tools.export import LIB, PACKAGE, ROOT, day_notebooks, day_of, select

ROOMS = ("cpu", "gpu", "serve")
CORE_TESTS = (                 # what must pass without rooms; a room's own tests skip themselves
    "tests", *(f"--ignore=tests/{name}" for name in ("course", "tools", "bench", "test_repo.py")))
KERNEL_TESTS = tuple(          # what runs the C under the sanitizers
    f"tests/cpu/test_{name}.py" for name in ("kernels", "extremes", "build", "optimize"))
WORKERS = min(4, os.cpu_count() or 1)   # tests, or notebooks, at a time: each uses one thread
SILENCE = 30                   # seconds, after which a step says that it lives


def span(seconds: float) -> str:
    """A time as a person says it."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


class Pulse:
    """While a step is silent, says now and then how long it has run, of how long it is to run.

    To be used with `with`, around a step that is expected to take `seconds`.
    """
    now: Pulse | None = None                     # of the step that runs

    def __init__(self, seconds: float, silence: float = SILENCE):
        self.seconds, self.silence, self.finished = seconds, silence, threading.Event()

    def __enter__(self):
        Pulse.now, self.start = self, time.perf_counter()
        self.heard = self.start
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *exception):
        Pulse.now = None
        self.finished.set()

    def _beat(self):
        while not self.finished.wait(min(1, self.silence)):
            now = time.perf_counter()
            if now - self.heard > self.silence:
                self.heard, ran = now, now - self.start
                late = "" if ran <= self.seconds else ", a slow or busy machine"
                print(f"    … {span(ran)} of about {span(self.seconds)}{late}", flush=True)


def run(*command, cwd=ROOT, env=None) -> tuple[int, str]:
    """Run a command, showing what it prints as it comes: (exit status, what it printed)."""
    process = subprocess.Popen([str(part) for part in command], cwd=cwd, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT,
                               env=dict(env or os.environ, PYTHONUNBUFFERED="1"))
    printed = []
    while chunk := os.read(process.stdout.fileno(), 4096):
        if Pulse.now:
            Pulse.now.heard = time.perf_counter()
        printed.append(chunk)
        sys.stdout.buffer.write(chunk)
        sys.stdout.flush()
    return process.wait(), b"".join(printed).decode(errors="replace")


def pytest(*arguments, cwd=ROOT, env=None) -> tuple[int, int]:
    """Run pytest, with a worker on each core where pytest-xdist is: (passed, failed)."""
    workers = ["-n", WORKERS, "--dist", "worksteal"] if find_spec("xdist") else []
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        status, _ = run(sys.executable, "-m", "pytest", "-q", *workers, *arguments,
                        f"--junitxml={report}", cwd=cwd, env=env)
        if not report.exists():
            return 0, 1
        suite = ElementTree.parse(report).getroot().find("testsuite").attrib
    failed = int(suite["failures"]) + int(suite["errors"])
    passed = int(suite["tests"]) - failed - int(suite["skipped"])
    return passed, failed or int(status != 0)


def check_export() -> tuple[int, int]:
    status, _ = run(sys.executable, ROOT / "tools" / "export.py", "--check")
    return (0, 1) if status else (1, 0)


def check_repo() -> tuple[int, int]:
    return pytest("tests")


def nbdev_test(*options) -> int:
    """Run nbdev_test: how many notebooks failed."""
    status, printed = run(Path(sysconfig.get_path("scripts")) / "nbdev_test", "--timing",
                          "--do_print", *options, env=environment())
    # nbdev_test ends by naming the notebooks that failed, one a line.
    _, _, names = printed.partition("nbdev Tests Failed On The Following Notebooks:")
    return len(re.findall(r"^\s+\S+\.ipynb$", names, re.MULTILINE)) or int(status != 0)


def check_notebooks() -> tuple[int, int]:
    """The last day takes as long as all the others: it has one core, they have the rest."""
    last = day_notebooks()[-1]
    commands = [("--path", last, "--n_workers", 0),
                ("--skip_file_glob", last.name, "--n_workers", max(1, WORKERS - 1))]
    with ThreadPoolExecutor() as pool:
        failed = sum(pool.map(lambda options: nbdev_test(*options), commands))
    return len(select()) - failed, failed


def check_days() -> tuple[int, int]:
    """All but the last day, which has no later one; tests/course sees that it names no room."""
    names = [name for name in everything() if name != str(day_of(day_notebooks()[-1]))]
    failed = check(names)
    return len(names) - failed, failed


def check_rooms() -> tuple[int, int]:
    there = [room for room in ROOMS if (LIB / room).is_dir()]
    passed = failed = 0
    for removed in [[room] for room in there] + [there] * (len(there) > 1):
        print(f"without {' and '.join(f'{PACKAGE}/{room}' for room in removed)}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder).resolve() / "copy"
            shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(
                ".*", "__pycache__", "*.egg-info", "build", "dist", "_book"))
            for room in removed:
                shutil.rmtree(copy / PACKAGE / room)
            env = environment(copy)
            env.pop("TRITON_INTERPRET", None)    # the kernels' tests ask for the interpreter
            more = pytest(*CORE_TESTS, *(f"--ignore=tests/{room}" for room in removed),
                          "-m", "not slow", cwd=copy, env=env)
        passed, failed = passed + more[0], failed + more[1]
    return passed, failed


def check_sanitized() -> tuple[int, int]:
    """The kernels are compiled by nanovllm/cpu/build.py, which reads NANOVLLM_CFLAGS."""
    tests = [path for path in KERNEL_TESTS if (ROOT / path).exists()]
    gcc = shutil.which("gcc") if sys.platform == "linux" else None
    if not tests or gcc is None:
        print("left out: this needs tests/cpu, Linux and gcc")
        return 0, 0
    # Python itself is not sanitized: it must load the runtime first, and with it C++'s, whose
    # exceptions the runtime looks for at its start.
    runtime = [subprocess.run([gcc, f"-print-file-name={name}"], text=True, check=True,
                              capture_output=True).stdout.strip()
               for name in ("libasan.so", "libstdc++.so.6")]
    flags = "-g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
    return pytest(*tests, "-s", env=dict(
        environment(), NANOVLLM_CFLAGS=flags, LD_PRELOAD=":".join(runtime), PYTHONMALLOC="malloc",
        ASAN_OPTIONS="detect_leaks=0", UBSAN_OPTIONS="print_stacktrace=1"))


STEPS = {  # name: title, minutes on two cores, function
    "export": ("The package is what the notebooks export", 0.1, check_export),
    "repo": ("The package, the tools, the repository (pytest)", 8, check_repo),
    "notebooks": ("The notebooks (nbdev_test)", 6, check_notebooks),
    "days": ("No day needs a later day", 6, check_days),
    "rooms": ("The core without its rooms", 6, check_rooms),
    "sanitize": ("The C kernels under sanitizers", 2, check_sanitized),
}


def busy() -> str:
    """What to add where other programs use the cores."""
    load, cores = getattr(os, "getloadavg", lambda: (0.0,))()[0], os.cpu_count() or 1
    return f"; now {load:.0f} programs share {cores}, so longer" if load > cores else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=STEPS, metavar="STEP", default=list(STEPS),
                        help="run only these steps: " + ", ".join(STEPS))
    names = parser.parse_args().only
    total_passed = total_failed = 0
    start, summary = time.perf_counter(), []
    planned = {name: 60 * STEPS[name][1] for name in names}
    print(f"This takes about {span(sum(planned.values()))} on two cores{busy()}.")
    for number, name in enumerate(names, 1):
        title, _, step = STEPS[name]
        step_start = time.perf_counter()
        done = sum(planned[before] for before in names[:number - 1])
        # how much slower than expected this machine was so far, once that says something
        pace = (step_start - start) / done if done >= 60 else 1.0
        expected, left = (pace * sum(planned[n] for n in some)
                          for some in ([name], names[number - 1:]))
        print(f"\n== {number}/{len(names)} {title}: about {span(expected)}, {span(left)} to the "
              "end ==", flush=True)
        with Pulse(expected):
            passed, failed = step()
        total_passed, total_failed = total_passed + passed, total_failed + failed
        seconds = time.perf_counter() - step_start
        summary.append(f"{title:50} {passed:4} passed {failed:3} failed {seconds:7.1f} s")
    print("\n== Summary ==", *summary, sep="\n")
    print(f"in {time.perf_counter() - start:.0f} seconds")
    print(f"{total_passed} passed, {total_failed} failed")
    return 1 if total_failed else 0


if __name__ == "__main__":
    sys.exit(main())
