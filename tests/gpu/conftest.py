"""Tests that need a GPU, or two. Each says so: `pytest.mark.gpu` or `pytest.mark.gpu(count=2)`."""

import gc

import pytest
import torch


def pytest_runtest_setup(item):
    marks = list(item.iter_markers("gpu"))
    assert marks, f"{item.nodeid} lacks its mark"
    needed = max(mark.kwargs.get("count", 1) for mark in marks)
    if torch.cuda.device_count() < needed:
        pytest.skip(f"needs {needed} GPU(s)")


@pytest.fixture(autouse=True)
def exact_products():
    """fp32 products in fp32, and no memory of one test left for the next."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
    gc.collect()                       # what a failed test still holds
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
