"""Worker processes: how they start, what they import, and that none outlives its owner."""

import gc
import os
import signal
import sys
import time

import psutil
import pytest

from nanovllm.utils import workers as module
from nanovllm.utils.distributed import open_store
from nanovllm.utils.workers import WorkerProcesses
from tests.processes import ROOT, environment, run_python, started

pytestmark = pytest.mark.processes
SLEEP = "import time; time.sleep(99)"


def wait_until(is_so, seconds=20.0):
    """Until is_so() holds; AssertionError if that takes too long."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def quick_start(monkeypatch):
    """Workers that import nothing: they say that they are ready, and sleep."""
    head, _ = module.START.split("sys.path[:]")
    monkeypatch.setattr(module, "START", head + f"os.write(0, b'r')\n{SLEEP}\n")


def test_a_worker_that_cannot_start_says_why():
    workers = WorkerProcesses(open_store(), {"model": "/no/such"}, range(1, 2))
    try:
        with pytest.raises(RuntimeError, match="rank 1 ended with code 1.*there is no folder"):
            workers.wait_until_ready()
    finally:
        workers.stop()
    assert all(process.poll() is not None for process in workers.processes.values())


def test_nothing_is_imported_from_the_current_folder(tmp_path):
    """Neither where modules lie that Python, the package or torch import, nor by PYTHONPATH."""
    for name in ("json", "socket", "torch", "transformers", "safetensors", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text("open('taken', 'w')\nraise SystemExit(9)\n")
    script = """
import sys
from nanovllm.utils.distributed import open_store
from nanovllm.utils.workers import WorkerProcesses
import os
sys.path.insert(0, "")
sys.path.append(sys.argv[1])
os.chdir(sys.argv[1])
workers = WorkerProcesses(open_store(), {"model": "/no/such"}, range(1, 2))
try:
    workers.wait_until_ready()
except RuntimeError as error:
    print(error)
workers.stop()
"""
    done = run_python("-c", script, tmp_path, cwd=ROOT)
    assert "there is no folder" in done.stdout, done.stderr
    assert not (tmp_path / "taken").exists()


def test_the_package_is_the_one_that_started_it(tmp_path):
    """Although the folder in which it lies is the current one, and others have its name."""
    other = tmp_path / "nanovllm"
    other.mkdir()
    (other / "__init__.py").write_text("raise SystemExit(9)\n")
    script = """
from nanovllm.utils.distributed import open_store
from nanovllm.utils.workers import WorkerProcesses
import sys
sys.path.append(sys.argv[1])
workers = WorkerProcesses(open_store(), {"model": "/no/such"}, range(1, 2))
try:
    workers.wait_until_ready()
except RuntimeError as error:
    print(error)
workers.stop()
"""
    done = run_python("-c", script, tmp_path, cwd=environment()["PYTHONPATH"].split(os.pathsep)[0])
    assert "there is no folder" in done.stdout, done.stderr


def test_a_worker_that_is_stopped_is_an_error(quick_start):
    """Within the time limit, and it is killed; one that answers may take as long as it likes."""
    workers = WorkerProcesses(open_store(), {}, range(1, 3), timeout=1.0)
    try:
        workers.wait_until_ready()
        workers.check(patience=1.5)
        os.kill(workers.processes[2].pid, signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="rank 2 has not answered for 1 seconds.*worker_ti"):
            workers.check(patience=20)
        assert time.monotonic() - start < 5
        workers.kill()
    finally:
        workers.stop(0)
    assert [process.returncode for process in workers.processes.values()] == [-9, -9]


def test_one_that_is_stopped_before_it_is_ready(monkeypatch):
    monkeypatch.setattr(module, "START", "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)")
    workers = WorkerProcesses(open_store(), {}, range(1, 2), timeout=0.5)
    try:
        with pytest.raises(RuntimeError, match="rank 1 has not answered"):
            workers.wait_until_ready()
    finally:
        workers.stop(0)


def test_time_in_which_the_owner_slept_does_not_count(quick_start):
    workers = WorkerProcesses(open_store(), {}, range(1, 2), timeout=5.0)
    try:
        workers.wait_until_ready()
        os.kill(workers.processes[1].pid, signal.SIGSTOP)
        for _ in range(4):               # the first may find an answer from before
            workers.looked -= 3600
            workers.check()
        assert 2 <= workers.silence[1] <= 4
    finally:
        workers.stop(0)


def test_they_end_with_their_owner(quick_start):
    """Also if a child of it, forked without exec, still holds the connections."""
    start = module.START
    script = f"""
import os, sys, time
from nanovllm.utils import workers as module
from nanovllm.utils.distributed import open_store
module.START = {start!r}
workers = module.WorkerProcesses(open_store(), {{}}, range(1, 3))
workers.wait_until_ready()
child = os.fork()
if child == 0:
    time.sleep(60)
print(*[process.pid for process in workers.processes.values()], child, flush=True)
time.sleep(60)
"""
    with started(sys.executable, "-c", script) as owner:
        *pids, child = map(int, owner.stdout.readline().split())
        assert all(psutil.pid_exists(pid) for pid in pids)
        os.kill(owner.pid, signal.SIGKILL)
        try:
            wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids), 10)
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_forked_process_lets_them_live(quick_start):
    workers = WorkerProcesses(open_store(), {}, range(1, 2))
    try:
        workers.wait_until_ready()
        if (child := os.fork()) == 0:
            try:
                workers.check()
            except RuntimeError:
                workers.stop(0)
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        workers.check(patience=0.3)
    finally:
        workers.stop(0)


def test_nothing_is_left_of_many(quick_start):
    """No file, no process; also of those that nobody stopped."""
    gc.collect()
    this = psutil.Process()
    files = this.num_fds()
    for number in range(25):
        workers = WorkerProcesses(open_store(), {}, range(1, 3))
        workers.wait_until_ready()
        if number % 5:
            workers.stop()
        del workers
    gc.collect()
    wait_until(lambda: not [p for p in this.children() if p.status() != psutil.STATUS_ZOMBIE])
    assert this.num_fds() == files
