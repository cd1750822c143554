"""How many blocks there are, and memory that starts as zeros."""

import pytest
import torch

from nanovllm import LLM
from nanovllm.config import Config
from nanovllm.engine import kv_cache
from nanovllm.engine.kv_cache import affordable_blocks, free_memory, zeros

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
        LLM(good[0], device="cpu", kvcache_block_size=10**12, max_model_len=40)
