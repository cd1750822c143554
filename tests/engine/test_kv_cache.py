"""How many blocks there are, and memory that starts as zeros."""

import sys

import pytest
import torch
import transformers

from nanovllm import LLM, SamplingParams
from nanovllm.config import Config
from nanovllm.engine import kv_cache
from nanovllm.engine.kv_cache import affordable_blocks, free_memory, zeros
from nanovllm.engine.scheduler import ScheduledRow
from nanovllm.engine.sequence import Sequence
from tests.processes import run_python

CPU = torch.device("cpu")


def config(**settings):
    return Config(**{"max_num_seqs": 3, "max_model_len": 100, **settings})


def test_as_many_blocks_as_fit():
    assert affordable_blocks(config(), 16, 1000, 8_999) == 8


def test_no_more_blocks_than_can_be_used():
    assert affordable_blocks(config(), 16, 1000, 10**9) == 3 * 7      # 7 blocks hold 100 tokens


def test_not_even_one():
    with pytest.raises(ValueError, match="999 bytes are left.*takes 1,000.*lower kvcache_block"):
        affordable_blocks(config(), 16, 1000, 999)
    with pytest.raises(ValueError, match=": 0 bytes are left"):
        affordable_blocks(config(), 16, 1000, -5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros(dtype):
    cache = zeros((2, 3, 4, 5), dtype, CPU)
    assert cache.shape == (2, 3, 4, 5) and cache.dtype is dtype and not cache.any()
    cache[1, 2] = 1                                                   # it can be written
    assert cache.sum() == 20


def test_zeros_take_no_memory_until_they_are_written():
    psutil = pytest.importorskip("psutil")
    before = psutil.Process().memory_info().rss
    zeros((2**28,), torch.float32, CPU)
    assert psutil.Process().memory_info().rss - before < 2**26


def test_free_memory_of_a_cpu_is_all_there_is():
    psutil = pytest.importorskip("psutil")
    assert abs(free_memory(CPU) / psutil.virtual_memory().total - 1) < .05


def test_a_cpu_takes_a_part_of_its_memory(good, monkeypatch):
    monkeypatch.setattr("nanovllm.engine.model_runner.CPU_CACHE_BYTES", 10**5)
    block = 2 * 3 * 4 * 2 * 16 * 4        # k and v, layers, tokens, heads, head_dim, bytes
    with LLM(good[0], device="cpu", kvcache_block_size=4) as llm:
        assert llm.runner.num_blocks == 10**5 // block
    assert kv_cache.CPU_CACHE_BYTES >= 2**28


def test_a_block_larger_than_memory(good):
    with pytest.raises(ValueError, match="bytes are left.*lower kvcache_block_size"):
        LLM(good[0], device="cpu", kvcache_block_size=10**9, max_model_len=40)


def test_a_pool_for_which_there_is_no_memory():
    with pytest.raises(ValueError, match="^num_kvcache_blocks: .*choose fewer"):
        zeros((2**40, 2**10), torch.float32, CPU)


FREED = """
import ctypes, sys, psutil
from nanovllm import LLM
process = psutil.Process()
with LLM(sys.argv[1], device="cpu", load_format="dummy", num_kvcache_blocks=8):
    before = process.memory_info().rss
    ctypes.CDLL(None).malloc_trim(0)
    print(before - process.memory_info().rss)
"""


@pytest.mark.processes
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_loading_leaves_no_holes_in_the_heap(tmp_path):
    """What was freed while the weights were packed has gone back to the system."""
    pytest.importorskip("psutil")
    transformers.Qwen3Config(
        hidden_size=1024, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, vocab_size=1000, dtype="bfloat16",
        architectures=["Qwen3ForCausalLM"]).save_pretrained(tmp_path)
    run = run_python("-c", FREED, tmp_path)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 2**23


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(kv_cache.ctypes, "CDLL", lambda name: object())
    kv_cache.give_back_freed_memory()


def test_a_step_for_which_there_is_no_memory(good, monkeypatch):
    folder, prompt, right = good
    with LLM(folder, num_kvcache_blocks=8, kvcache_block_size=4, max_model_len=40) as llm:
        def too_large(*args):
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")

        with monkeypatch.context() as patch, pytest.raises(MemoryError,
                                                           match="^max_num_batched_tokens"):
            patch.setattr(llm.runner.model, "forward", too_large)
            llm.runner.run([ScheduledRow(sequence_of(prompt), len(prompt), samples=True)])
        out, = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
        assert out["token_ids"] == right


def sequence_of(prompt):
    """A sequence that has the first blocks of a pool."""
    seq = Sequence(prompt)
    seq.block_table = [0, 1, 2]
    return seq
