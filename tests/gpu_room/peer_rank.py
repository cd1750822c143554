"""One of two ranks, as a process: RANK STORE MEMORY0 MEMORY1 CHECKPOINT LOGITS.

Files that both map stand for the GPUs' memory, Triton's interpreter for the GPUs.
"""

import os
import sys

import numpy as np
import torch
import transformers

from nanovllm.gpu import optimize
from nanovllm.gpu.peers import PeerDecoder, PeerMemory, sum_add_rms_norm
from nanovllm.layers.linear import RowParallelLinear, parallelize
from nanovllm.models.registry import get_model_class
from nanovllm.utils.context import packed_context, use_context
from nanovllm.utils.distributed import TensorParallelGroup, join_store
from nanovllm.utils.loader import load_model


def check_kernel(peers):
    """Sums of batches that grow and shrink, on two ranks."""
    torch.manual_seed(0)
    for rows in (1, 5, 8, 3, 1, 8):
        summands, residual, weight = torch.randn(2, rows, 48), torch.randn(rows, 48), torch.rand(48)
        want, place = residual + summands.sum(0), peers.place(rows, 48, torch.float32)
        assert peers.holds(place) and not peers.holds(residual)
        place.copy_(summands[peers.rank])
        out = sum_add_rms_norm(peers, place, residual, weight, 1e-6)
        assert (residual - want).abs().max() < 1e-5
        norm = torch.nn.functional.rms_norm(want, [48], weight, 1e-6)
        assert (out - norm).abs().max() < 1e-5


def make_model(folder, group):
    """This rank's slices of the checkpoint's model."""
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = get_model_class(config)(config)
    model = parallelize(model, group, torch.device("cpu"))
    load_model(model, folder)
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def logits_of(model):
    """Logits of two sequences; on rank 0."""
    with use_context(packed_context([7, 4])) as step:
        step.input_ids.copy_(torch.arange(11) * 4 % 48)
        return model.compute_logits(model(step.input_ids, step.positions))


def main(rank, store, memory0, memory1, folder, result):
    rank, files = int(rank), (memory0, memory1)
    seen = [torch.from_numpy(np.memmap(file, np.uint8, "r+")) for file in files]
    peers = PeerMemory(seen[rank], rank, [memory.data_ptr() for memory in seen])
    check_kernel(peers)
    group = TensorParallelGroup(join_store(store), rank, 2, torch.device("cpu"))
    model = make_model(folder, group)
    group.peers = peers                       # as if it had been opened
    optimize(model, group)
    assert type(model.model) is PeerDecoder
    before, found = int(peers.meetings.sum()), [logits_of(model)]
    meetings = int(peers.meetings.sum()) - before
    peers.ROWS = 10                           # no room for eleven rows: they go by the group
    found.append(logits_of(model))
    assert int(peers.meetings.sum()) == before + meetings
    plain = make_model(folder, group)
    group.peers = False                       # it was tried in vain
    optimize(plain, group)
    assert type(plain.model.layers[0].mlp.down_proj) is RowParallelLinear
    found.append(logits_of(plain))
    if rank == 0:
        torch.save((meetings, found), result)


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)
