"""How the kernels are compiled, what Python reads of them, and what happens without them."""

import ctypes
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanovllm.cpu import BACKENDS, build, optimize
from nanovllm.cpu.build import C_DTYPES, C_FLAGS, SOURCES, load_kernels, read_declarations
from tests.processes import environment, started

CC = shutil.which("cc") or shutil.which("gcc")
needs_compiler = pytest.mark.skipif(CC is None, reason="no C compiler")
FP32 = torch.float32
pytestmark = pytest.mark.processes  # compilers


@pytest.fixture
def fresh(monkeypatch, caplog):
    """What is loaded from here on is compiled anew, and so is what comes after the test."""
    caplog.set_level(logging.INFO, "nanovllm")
    load_kernels.cache_clear()
    yield monkeypatch
    load_kernels.cache_clear()


@needs_compiler
@pytest.mark.parametrize("mask", ["", "-mno-amx-bf16", "-mno-avx512f"])
@pytest.mark.parametrize("dtype", C_DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [20, 64, 128])
def test_no_warnings(head_dim, dtype, mask, tmp_path):
    command = [CC, *C_FLAGS, "-fopenmp", "-Wall", "-Wextra", *C_DTYPES[dtype], f"-DD={head_dim}",
               *mask.split(), SOURCES / "layers.c", "-o", tmp_path / "kernels.so", "-lm"]
    done = subprocess.run(command, capture_output=True, text=True)
    if "unrecognized command" in done.stderr:
        pytest.skip("the flags are of another processor")
    assert (done.returncode, done.stderr) == (0, "")


@needs_compiler
def test_every_file_stands_in_the_library():
    """And every function that is not static has been read with its parameters."""
    load_kernels.cache_clear()
    kernels = load_kernels(FP32, 64)
    names = {"rms_norm", "silu_and_mul", "rope", "store_kvcache", "linear", "paged_decode",
             "paged_prefill", "run_layers"}
    assert names | {"layer", "model", "step", "dtype", "head_dim"} == set(vars(kernels))
    for name in names - {"linear", "paged_prefill", "run_layers"}:  # those need tiles
        assert getattr(kernels, name), name


def test_declarations():
    functions, structs = read_declarations("""
        // void comment(float x) {
static void hidden(int64_t n) {
}
void first(T *out, const T *x,  // with a comment (and brackets)
           int64_t n, float eps) {
}
typedef struct {  // told, with; a mark
    const T *a, *b;  // c
    int64_t n;
    float eps, scale;
} thing;
void second(const thing *t) {
""")
    pointer, integer, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    assert functions == {"first": {"out": pointer, "x": pointer, "n": integer, "eps": number},
                         "second": {"t": pointer}}
    assert structs["thing"]._fields_ == [("a", pointer), ("b", pointer), ("n", integer),
                                         ("eps", number), ("scale", number)]


@needs_compiler
def test_arguments_are_checked():
    silu, x, out = load_kernels(FP32, 64).silu_and_mul, torch.ones(1, 4), torch.empty(1, 2)
    right = [out.data_ptr(), x.data_ptr(), 1, 2, 1]
    for wrong in (right[:-1], right + [1], []):
        with pytest.raises(TypeError):
            silu(*wrong)
    for place, value in ((0, 1.5), (2, 1.0), (2, "1"), (3, None)):
        with pytest.raises(ctypes.ArgumentError):
            silu(*right[:place], value, *right[place + 1:])
    with pytest.raises(TypeError):
        silu(*right[:-1], thread=1)
    silu(*right[:-1], threads=1)
    assert out.flatten().tolist() == pytest.approx([0.7310586] * 2)
    with pytest.raises(AttributeError):
        load_kernels(FP32, 64).layer(input_nrom=1)


@pytest.mark.parametrize("name, value", [
    ("CC", "/no/such/compiler"), ("CC", sys.executable), ("CC", '"never closed'),
    ("NANOVLLM_CFLAGS", "'never closed"), ("NANOVLLM_CFLAGS", "-no-such-flag -DT=")])
def test_without_a_compiler(name, value, fresh, caplog):
    """None and one line in the log; the backend says why, and optimize() does what is left."""
    fresh.setenv(name, value)
    assert load_kernels(FP32, 64) is None
    assert ["the CPU kernels cannot be used" in line for line in caplog.messages] == [True]
    assert "no C compiler" in BACKENDS[0].why_not(torch.device("cpu"), FP32, 64)
    caplog.clear()
    assert load_kernels(FP32, 64) is None and not caplog.messages


def test_no_compiler_at_all(fresh, caplog):
    fresh.delenv("CC", raising=False)
    fresh.setenv("PATH", "/nowhere")
    assert load_kernels(FP32, 64) is None and len(caplog.messages) == 1


def raising(error):
    """A function that raises."""
    def fails(*args, **kwargs):
        raise error
    return fails


@needs_compiler
@pytest.mark.parametrize("target, error", [
    ("tempfile.TemporaryDirectory", FileNotFoundError("No usable temporary directory")),
    ("tempfile.TemporaryDirectory", OSError(30, "Read-only file system")),
    ("ctypes.CDLL", OSError("failed to map segment from shared object")),       # noexec
    ("subprocess.run", subprocess.TimeoutExpired("cc", 300))])
def test_where_nothing_can_be_compiled(target, error, fresh, caplog):
    """No place to write, none to run code from, a compiler that hangs: one line, and no kernels."""
    caplog.set_level(logging.WARNING, "nanovllm")
    module, name = target.split(".")
    fresh.setattr(getattr(build, module), name, raising(error))
    assert load_kernels(FP32, 64) is None and len(caplog.messages) == 1
    assert str(error.args[-1]) in caplog.text


@needs_compiler
def test_a_compiler_that_writes_an_empty_library(fresh, caplog, tmp_path):
    (tmp_path / "empty.c").write_text("")
    script = tmp_path / "cc"
    script.write_text(f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\n'
                      f'exec {CC} -shared {tmp_path / "empty.c"} -o "$2"\n')
    script.chmod(0o755)
    fresh.setenv("CC", str(script))
    assert load_kernels(FP32, 64) is None and "rms_norm" in caplog.text


@needs_compiler
def test_each_compilation_has_a_folder_of_its_own(fresh):
    """That no other user can write to or read, and that is gone afterwards."""
    folders, right = [], subprocess.run

    def watched(command, **options):
        folder = Path(command[command.index("-o") + 1]).parent
        folders.append((folder, folder.stat()))
        return right(command, **options)

    fresh.setattr(build.subprocess, "run", watched)
    for dtype in C_DTYPES:
        load_kernels(dtype, 64)
    names = {folder for folder, _ in folders}
    assert len(names) == len(folders) >= 2 and not any(folder.exists() for folder in names)
    assert all(s.st_uid == os.getuid() and not s.st_mode & 0o077 for _, s in folders)


@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_in_a_forked_process(kernels):
    """OpenMP's threads are not there, and nobody waits for them."""
    script = """
import os, sys, torch
from nanovllm import LLM, SamplingParams
llm, wish = LLM(device="cpu", num_kvcache_blocks=16, kernels=sys.argv[1]), SamplingParams(
    temperature=0, max_tokens=3)
ask = lambda: llm.generate(["What is a block?"] * 4, wish, use_tqdm=False)[0]["token_ids"]
want = ask()
if (child := os.fork()) == 0:
    os._exit(7 * (ask() == want))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
    with started(sys.executable, "-c", script, kernels,
                 env=environment(OMP_NUM_THREADS="2")) as process:
        out, err = process.communicate(timeout=60)
    assert out == "7\n", err


def test_in_a_process_that_is_forked_in_the_middle_of_a_step():
    """The thread whose step it was does not exist there; its step is taken back."""
    script = """
import os, threading, time
from nanovllm import LLM, SamplingParams
llm = LLM(device="cpu", num_kvcache_blocks=16, check_books=True)
wish, long = SamplingParams(temperature=0, max_tokens=3), SamplingParams(max_tokens=30)
ask = lambda: llm.generate(["What is a block?"], wish, use_tqdm=False)[0]["token_ids"]
want, is_over = ask(), threading.Event()

def work():
    while not is_over.is_set():
        llm.generate([[1, 2, 3]] * 4, long, use_tqdm=False)

thread, codes = threading.Thread(target=work), []
thread.start()
for i in range(8):
    time.sleep(0.01 * i)
    if (child := os.fork()) == 0:
        os._exit(7 * (ask() == want))
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
is_over.set()
thread.join()
print(codes, ask() == want, flush=True)
"""
    with started(sys.executable, "-c", script, env=environment(OMP_NUM_THREADS="1")) as process:
        out, err = process.communicate(timeout=60)
    assert out == f"{[7] * 8} True\n", err


def test_other_dtypes_have_no_kernels(caplog):
    caplog.set_level(logging.INFO, "nanovllm")
    assert load_kernels(torch.float16, 64) is None and not caplog.messages
    assert "it is for a CPU" in BACKENDS[0].why_not(torch.device("cuda"), FP32, 64)


@needs_compiler
def test_edited_sources(fresh, tmp_path):
    """SOURCES may be another folder, whose C has been changed."""
    for file in (*SOURCES.glob("*.c"), *SOURCES.glob("*.h")):
        text = file.read_text().replace("* load(up[i])", "* load(up[i]) * 2")
        (tmp_path / file.name).write_text(text)
    fresh.setattr(build, "SOURCES", tmp_path)
    x, out = torch.ones(1, 4), torch.empty(1, 2)
    load_kernels(FP32, 64).silu_and_mul(out.data_ptr(), x.data_ptr(), 1, 2, 1)
    torch.testing.assert_close(out, torch.full((1, 2), 2 * 0.7310586))


def test_optimize_is_the_door():
    assert callable(optimize) and [backend.name for backend in BACKENDS] == ["cpu"]
