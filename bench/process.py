"""The side that asks: a worker process and a line to it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading

from bench.models import ROOT


class WorkerError(RuntimeError):
    """An engine that failed, with its own words."""


class Worker:
    """A process that runs worker.py, in this Python or another one. To be used with `with`."""

    def __init__(self, python: str | None = None, threads: int | None = None):
        self.log = tempfile.TemporaryFile("w+")
        env = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)} if threads else {}
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [python or sys.executable, str(ROOT / "bench" / "worker.py")], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
            env={**os.environ, "PYTHONPATH": path, **env})

    def ask(self, do: str, on_progress=lambda count: None, patience: float = 900.0, **job):
        """Its answer to a command. WorkerError if it failed, died, or took longer than that."""
        watchdog = threading.Timer(patience, self.process.kill)
        watchdog.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps(dict(job, do=do)), file=self.process.stdin, flush=True)
            for line in self.process.stdout:
                news = json.loads(line)
                if "progress" in news:
                    on_progress(news["progress"])
                elif "error" in news:
                    raise WorkerError(news["error"])
                else:
                    return news["done"]
        finally:
            watchdog.cancel()
        self.log.seek(0)
        tail = self.log.read().strip().splitlines()[-12:]
        raise WorkerError(f"its process ended (status {self.process.wait()})\n    "
                          + "\n    ".join(tail))

    def close(self) -> None:
        """Let it end, which it does when nothing more can come; kill it if that takes long."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.log.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()
