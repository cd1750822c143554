"""Memory that runs out is an error that names the setting."""

import pytest
import torch

from nanovllm.utils.memory import memory_for


@pytest.mark.parametrize("cause", [MemoryError(), OSError(12, "Cannot allocate memory"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory"),
                                   torch.OutOfMemoryError("CUDA out of memory")], ids=repr)
def test_memory_that_runs_out_names_what_it_was_for(cause):
    with pytest.raises(ValueError, match="^num_kvcache_blocks: choose fewer"):
        with memory_for("num_kvcache_blocks: choose fewer"):
            raise cause


def test_another_error_stays_what_it_is():
    with pytest.raises(RuntimeError, match="^something else"), memory_for("x"):
        raise RuntimeError("something else")
