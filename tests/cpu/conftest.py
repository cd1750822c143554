"""Kernels compiled for this processor as it is, with its AMX masked, and without its AVX-512."""

import os

import pytest

from nanovllm.cpu.build import load_kernels

LEVELS = {"native": "", "no AMX": "-mno-amx-bf16", "no AVX-512": "-mno-avx512f"}


@pytest.fixture(scope="module", params=[
    "native", *(pytest.param(name, marks=pytest.mark.slow) for name in ("no AMX", "no AVX-512"))])
def level(request):
    """The name of the level that is compiled from now on to the end of the module."""
    if request.param != "native" and os.uname().machine != "x86_64":
        pytest.skip("the flags are of another processor")
    with pytest.MonkeyPatch.context() as patch:
        flags = os.environ.get("NANOVLLM_CFLAGS", "")
        patch.setenv("NANOVLLM_CFLAGS", f"{flags} {LEVELS[request.param]}")
        load_kernels.cache_clear()
        yield request.param
    load_kernels.cache_clear()
