"""Parallel layers: the parts of all ranks together are the whole, without any other process."""

from types import SimpleNamespace

import pytest
import torch
from fixtures import make_checkpoint
from torch import nn

from nanovllm import LLM
from nanovllm.layers.linear import (
    ColumnParallelLinear, ParallelLMHead, RowParallelLinear, VocabParallelEmbedding,
    check_tensor_parallel_size, shard,
)


class Slices:
    """A tensor of a checkpoint: read by slicing."""

    def __init__(self, tensor):
        self.tensor = tensor

    def get_shape(self):
        return list(self.tensor.shape)

    def __getitem__(self, index):
        return self.tensor[index]


class OneOf:
    """A group in which this rank hears nothing of the others."""

    def __init__(self, rank, size):
        self.rank, self.world_size = rank, size

    def all_reduce(self, x):
        return x

    def gather(self, x):
        return [x]


def fill(layer, weight, bias=None, parts=None):
    """Load a layer from the whole matrix (or its parts: (first local row, rows, tensor))."""
    for start, rows, tensor in parts or [(0, len(layer.weight), weight)]:
        layer.weight.weight_loader(layer.weight, Slices(tensor), start, rows)
    if bias is not None and hasattr(layer.bias, "weight_loader"):
        layer.bias.weight_loader(layer.bias, Slices(bias), 0, len(layer.bias))
    elif bias is not None:
        layer.bias.data.copy_(bias)
    return layer


@pytest.mark.parametrize("size", [1, 2, 4])
def test_columns(size):
    whole, x = nn.Linear(6, 8), torch.randn(3, 6)
    parts = [fill(ColumnParallelLinear(whole, OneOf(rank, size), "cpu"), whole.weight, whole.bias)
             for rank in range(size)]
    torch.testing.assert_close(torch.cat([part(x) for part in parts], -1), whole(x))


def test_columns_of_several_matrices_in_one():
    """Each is dealt out by itself: q, k and v of a rank belong together."""
    q, kv = torch.randn(8, 6), torch.randn(4, 6)
    whole = nn.Linear(6, 12, bias=False)
    for rank in range(2):
        layer = ColumnParallelLinear(whole, OneOf(rank, 2), "cpu", {"q": 8, "kv": 4}, unit=2)
        assert layer.local_parts == {"q": 4, "kv": 2}
        fill(layer, None, parts=[(0, 4, q), (4, 2, kv)])
        own = torch.cat([q[4 * rank:4 * rank + 4], kv[2 * rank:2 * rank + 2]])
        assert torch.equal(layer.weight, own)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_rows(size):
    """The bias is added once."""
    whole, x = nn.Linear(6, 5), torch.randn(4, 6)
    parts = [fill(RowParallelLinear(whole, OneOf(rank, size), "cpu"), whole.weight, whole.bias)
             for rank in range(size)]
    total = sum(part(piece) for part, piece in zip(parts, x.chunk(size, -1)))
    torch.testing.assert_close(total - (size - 1) * whole.bias, whole(x))


@pytest.mark.parametrize("vocab", [8, 7])
def test_vocabulary(vocab):
    """Padded to equal ranges; embeddings are sums, logits are put side by side."""
    table, ids = torch.randn(vocab, 4), torch.arange(vocab)
    embeddings = [fill(VocabParallelEmbedding(nn.Embedding(vocab, 4), OneOf(rank, 2), "cpu"), table)
                  for rank in range(2)]
    assert [len(part.weight) for part in embeddings] == [4, 4]
    torch.testing.assert_close(sum(part(ids) for part in embeddings), table)
    heads = [fill(ParallelLMHead(nn.Linear(4, vocab, bias=False), OneOf(rank, 2), "cpu"), table)
             for rank in range(2)]
    x = torch.randn(3, 4)
    logits = torch.cat([head(x) for head in heads], -1)[:, :vocab]
    torch.testing.assert_close(logits, x @ table.T)


def test_a_tensor_of_another_shape():
    layer = ColumnParallelLinear(nn.Linear(6, 8), OneOf(0, 2), "cpu")
    with pytest.raises(ValueError, match=r"shape \[7, 6\], expected \[8, 6\]"):
        fill(layer, torch.zeros(7, 6))


def test_shards():
    assert [shard(8, rank, 4) for rank in range(4)] == [(0, 2), (2, 2), (4, 2), (6, 2)]
    # fewer units than ranks: neighbours hold the same one
    assert [shard(16, rank, 4, unit=8) for rank in range(4)] == [(0, 8), (0, 8), (8, 8), (8, 8)]
    with pytest.raises(ValueError, match="tensor_parallel_size=2 does not divide 25"):
        shard(25, 0, 2)


def test_sizes_that_do_not_divide():
    config = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, intermediate_size=80,
                             num_hidden_layers=2)
    for size in (1, 2, 4):
        check_tensor_parallel_size(config, size)
    with pytest.raises(ValueError, match="tensor_parallel_size=3 does not.*choose one of 1, 2, 4"):
        check_tensor_parallel_size(config, 3)


@pytest.mark.processes
def test_experts_that_cannot_be_dealt_out(tmp_path):
    folder, _ = make_checkpoint("qwen3_moe", folder=tmp_path, moe_intermediate_size=25)
    with pytest.raises(ValueError, match="size=2 does not divide.*moe_intermediate_size 25"):
        LLM(folder, tensor_parallel_size=2, device="cpu", num_kvcache_blocks=8)
