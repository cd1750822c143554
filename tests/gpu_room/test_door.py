"""What the core sees of the room: also where there is no triton and no GPU."""

import importlib.util
import os

import pytest
import torch

from nanovllm import gpu
from nanovllm.gpu.backends import TorchBackend, TritonBackend, split_keys
from tests.processes import environment, run_python

NO_TRITON = """
import sys
sys.modules["triton"] = None                                # an import of it fails from now on
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else real(name, *rest)
"""


@pytest.mark.processes
def test_without_triton():
    """The room imports, leaves a model as it is, and its backends say what is missing."""
    done = run_python("-c", NO_TRITON + """
import torch
from nanovllm import gpu
model = torch.nn.Linear(2, 2)
assert gpu.optimize(model) is model and type(model) is torch.nn.Linear
for backend in gpu.BACKENDS:
    print(backend.name, backend.why_not(torch.device("cpu"), torch.float32, 64))
print(gpu.Lookahead.__name__)
""", env=environment(TRITON_INTERPRET="1"))
    assert done.returncode == 0, done.stderr
    assert "triton triton is not installed" in done.stdout


@pytest.mark.processes
def test_the_door_imports_no_triton():
    done = run_python("-c", "import sys, nanovllm.gpu; print('triton' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter can")
def test_a_model_on_a_cpu_stays_as_it_is():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert gpu.optimize(model) is model and type(model[0]) is torch.nn.Linear


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_why_not(monkeypatch):
    cpu, gpu_ = torch.device("cpu"), torch.device("cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "no GPU" in TritonBackend.why_not(cpu, torch.float32, 64)
    assert TritonBackend.why_not(gpu_, torch.bfloat16, 64) is None
    assert "256 at the most" in TritonBackend.why_not(gpu_, torch.bfloat16, 320)
    assert TorchBackend.why_not(cpu, torch.float16, 64)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert TritonBackend.why_not(cpu, torch.float32, 64) is None
    assert "bfloat16" in TritonBackend.why_not(cpu, torch.bfloat16, 64)


@pytest.mark.parametrize("size", [8, 48, 96])
def test_block_sizes_are_powers_of_two(size):
    with pytest.raises(ValueError, match=f"kvcache_block_size={size}"):
        TritonBackend.check_block_size(size)
    TritonBackend.check_block_size(64)


def test_split_keys():
    """Enough programs for all processors, no part below 64 keys, 64 parts at the most."""
    for rows, kv_heads, length, processors in (
            (1, 8, 4096, 132), (1, 1, 10**6, 132), (4, 2, 70, 132), (256, 8, 4096, 132),
            (1, 1, 1, 1)):
        parts = split_keys(rows, kv_heads, length, processors)
        assert parts & (parts - 1) == 0 and 1 <= parts <= 64
        if parts > 1:
            assert parts // 2 * rows * kv_heads < 2 * processors and parts // 2 < length / 64
    assert split_keys(1, 8, 4096, 132) == 64 and split_keys(256, 8, 4096, 132) == 1
