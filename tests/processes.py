"""Processes that tests start: they find the package, have a time limit, and leave nothing."""

import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import nanovllm
from nanovllm.utils.workers import START, WorkerProcesses

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = Path(__file__).resolve().parent / "scripts"


def environment(**changes) -> dict[str, str]:
    """The environment of a process that imports the same nanovllm, the fixtures and the tools."""
    paths = [Path(nanovllm.__file__).parents[1], ROOT / "nbs", ROOT]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHONUTF8": "1",
            **changes}


def children(pid: int | None = None) -> list:
    """Live processes that this one (or process `pid`) started, and theirs; psutil knows."""
    import psutil
    try:
        return [p for p in psutil.Process(pid).children(recursive=True)
                if p.status() != psutil.STATUS_ZOMBIE]
    except psutil.NoSuchProcess:
        return []


def kill(process: subprocess.Popen) -> None:
    """End a process and all that it started, also what has a session of its own."""
    try:
        left = children(process.pid)
    except ImportError:                           # then its own session at least
        left = []
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for each in left:
        with suppress(ProcessLookupError):
            os.kill(each.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def started(*command, **options):
    """A process for a `with` block, text in its pipes. It does not outlive the block or pytest.

    Ctrl-C means to it what it means by default, also where pytest was told to ignore it (nohup).
    """
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE,
               "text": True, "encoding": "utf-8", "env": environment(), **options}
    process = subprocess.Popen([sys.executable, "-S", SCRIPTS / "with_parent.py", str(os.getpid()),
                                *map(str, command)], start_new_session=True, **options)
    try:
        yield process
    finally:
        kill(process)
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def run(*command, timeout: float = 120, **options) -> subprocess.CompletedProcess:
    """A process that has ended by itself. TimeoutExpired, and it is killed, if it takes longer."""
    with started(*command, **options) as process:
        out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def stopping_at(place: str, does: str = "os.kill(os.getpid(), signal.SIGSTOP)") -> str:
    """START for a worker that stops itself as it comes to `place`, a "module:Class.name".

    does: a line of Python to run there instead.
    """
    module, path = place.split(":")
    *owner, name = path.split(".")
    return START.replace("main(told)\n", f"""
import importlib, signal
owner = importlib.import_module("nanovllm.{module}")
for part in {owner}:
    owner = getattr(owner, part)
right = getattr(owner, "{name}")

def stops(*args, **kwargs):
    {does}
    return right(*args, **kwargs)

setattr(owner, "{name}", stops)
main(told)
""")


def ctrl_c_once_ready(monkeypatch, seconds: float) -> None:
    """Let SIGINT come so long after the workers of the next engine have started."""
    right = WorkerProcesses.wait_until_ready

    def ready(workers):
        right(workers)
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()

    monkeypatch.setattr(WorkerProcesses, "wait_until_ready", ready)


def run_python(*arguments, timeout: float = 120, **options) -> subprocess.CompletedProcess:
    """The same for this Python: a file and its arguments, or "-c" and code, or "-m"."""
    return run(sys.executable, *arguments, timeout=timeout, **options)
