"""The room's kernels and layers in Triton's interpreter, on a CPU."""

import importlib.util
import os
from pathlib import Path

import pytest

from tests.processes import environment, run_python

HERE = Path(__file__).resolve().parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="they run in this process")
@pytest.mark.processes
@pytest.mark.parametrize("file", [
    "test_layer_kernels.py",
    *(pytest.param(f"test_{name}.py", marks=pytest.mark.slow)
      for name in ("attention_kernels", "fuse", "peers", "changes", "engine",
                               "sampling"))])
def test_in_the_interpreter(file):
    """The tests of one file; to run them alone: TRITON_INTERPRET=1 python -m pytest FILE."""
    done = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / "interpreted" / file,
                      env=environment(TRITON_INTERPRET="1"), timeout=580)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
