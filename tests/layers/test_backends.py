"""Which attention backend is taken, which is refused and why, and that all give the same."""

import pytest
import torch

from nanovllm import LLM
from nanovllm.layers.attention import SDPABackend
from nanovllm.layers.backends import (
    ATTENTION_BACKENDS, PREFERENCE, attention_backends, get_attention_backend,
)
from nanovllm.utils.rooms import find_room
from tests.parity import check, tight
from tests.processes import SCRIPTS, run_python

CPU = torch.device("cpu")
ARGUMENTS = (CPU, torch.float32, 16)


@pytest.mark.parametrize("bs, chunk", [(1, 7), (4, 5), (5, 16384)])
@pytest.mark.parametrize("backend", ["sdpa", "cpu"])
def test_every_backend_gives_the_same_tokens(backend, bs, chunk, reference):
    known = attention_backends()
    if backend not in known:
        pytest.skip(f"nanovllm/{backend} is not there")
    if reason := known[backend].why_not(*ARGUMENTS):
        pytest.skip(reason)
    check(reference("qwen3"), bs, num_kvcache_blocks=tight(bs), max_num_batched_tokens=chunk,
          attention_backend=backend)


def test_those_of_the_rooms_are_known():
    for name in ("cpu", "gpu"):
        if room := find_room(name):
            assert {backend.name for backend in room.BACKENDS} <= attention_backends().keys()
            assert not {b.name for b in room.BACKENDS} & attention_backends("plain").keys()
    assert attention_backends("plain") == ATTENTION_BACKENDS
    assert set(attention_backends()) <= set(PREFERENCE)


def test_plain_kernels_have_the_plain_backend():
    assert type(get_attention_backend("auto", *ARGUMENTS, kernels="plain")) is SDPABackend


def test_auto_takes_the_best_that_works(monkeypatch, caplog):
    class Better(SDPABackend):
        name = "better"

    class Impossible(SDPABackend):
        name = "impossible"
        why_not = classmethod(lambda cls, *args: "it never works")

    class ForGPUs(SDPABackend):
        name = "for GPUs"
        chosen_on = ("cuda",)

    for cls in (Better, Impossible, ForGPUs):
        monkeypatch.setitem(ATTENTION_BACKENDS, cls.name, cls)
    monkeypatch.setattr("nanovllm.layers.backends.PREFERENCE",
                        ["not there", "for GPUs", "impossible", "better", "sdpa"])
    with caplog.at_level("INFO", logger="nanovllm"):
        assert type(get_attention_backend("auto", *ARGUMENTS)) is Better
    assert "attention_backend: better" in caplog.text
    with pytest.raises(ValueError, match="'impossible' cannot work here: it never works"):
        get_attention_backend("impossible", *ARGUMENTS)


def test_unknown_ones_are_refused():
    with pytest.raises(ValueError, match="'nope' is unknown, choose \"auto\" or one of.*sdpa"):
        get_attention_backend("nope", *ARGUMENTS)
    if find_room("cpu"):
        with pytest.raises(ValueError, match="'cpu' is unknown with kernels=\"plain\""):
            get_attention_backend("cpu", *ARGUMENTS, kernels="plain")


def test_flash_attn_says_what_it_needs():
    reason = ATTENTION_BACKENDS["flash_attn"].why_not(*ARGUMENTS)
    assert "flash_attn is not installed" in reason or "GPU" in reason
    with pytest.raises(ValueError, match="kvcache_block_size=16.*multiples of 256"):
        ATTENTION_BACKENDS["flash_attn"].check_block_size(16)


def test_an_engine_with_plain_kernels(reference):
    ref = reference("qwen3")
    with LLM(ref.folder, device="cpu", kernels="plain", num_kvcache_blocks=8) as llm:
        assert type(llm.runner.backend) is SDPABackend
        assert all(type(layer.backend) is SDPABackend for layer in llm.runner.attention_layers())


@pytest.mark.processes
@pytest.mark.slow
def test_without_triton():
    """The package imports, generates and splits a model; asking for triton says what is missing."""
    done = run_python(SCRIPTS / "without_triton.py")
    assert done.returncode == 0, done.stderr
    expected = "cannot work here" if find_room("gpu") else "is unknown"
    assert f"attention_backend 'triton' {expected}" in done.stdout
