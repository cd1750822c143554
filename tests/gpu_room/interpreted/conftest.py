"""What the tests in the interpreter share."""

from collections import Counter

import pytest


@pytest.fixture
def launched(monkeypatch):
    """How often each kernel was launched."""
    from triton.runtime.interpreter import GridExecutor
    counter, call = Counter(), GridExecutor.__call__

    def counted(kernel, *args, **kwargs):
        counter[kernel.fn.__name__.removesuffix("_kernel")] += 1
        return call(kernel, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    return counter
