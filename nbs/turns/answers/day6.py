"""One solution of each turn and exercise of day 6."""

import torch
import torch.nn.functional as F


def padded_rows(ids, positions, slots, lens, tables, size, width):
    spare = size - len(ids)
    tables = [table + [0] * (width - len(table)) for table in tables]
    return (ids + [0] * spare, positions + [0] * spare, slots + [-1] * spare, lens + [0] * spare,
            tables + [[0] * width] * spare)


def qkv_rows(rank, world_size, heads, kv_heads, head_dim):
    rows, start = [], 0
    for total in (heads, kv_heads, kv_heads):
        each, first = max(1, total // world_size), rank * total // world_size
        rows += range(start + first * head_dim, start + (first + each) * head_dim)
        start += total * head_dim
    return rows


def mlp_summands(x, gate, up, down, world_size):
    gates, ups = gate.chunk(world_size, dim=1), up.chunk(world_size, dim=1)
    downs = down.chunk(world_size, dim=0)
    return [(F.silu(x @ g) * (x @ u)) @ d for g, u, d in zip(gates, ups, downs)]


def ring_all_reduce(parts):
    n = len(parts)
    size, sent = len(parts[0]) // n, 0
    pieces = [[part[i * size:(i + 1) * size] for i in range(n)] for part in parts]
    for step in range(n - 1):                    # each piece is added up on its way round
        moving = [pieces[r][(r - step) % n] for r in range(n)]
        for r in range(n):
            i = (r - 1 - step) % n               # what the neighbour sends
            pieces[r][i] = [a + b for a, b in zip(pieces[r][i], moving[(r - 1) % n])]
        sent += size
    for step in range(n - 1):                    # rank r has finished piece (r + 1) % n
        moving = [pieces[r][(r + 1 - step) % n] for r in range(n)]
        for r in range(n):
            pieces[r][(r - step) % n] = moving[(r - 1) % n]
        sent += size
    return [[x for piece in of_rank for x in piece] for of_rank in pieces], sent


def embedding_summand(token_ids, table, first):
    local = token_ids - first
    absent = (local < 0) | (local >= len(table))
    return table[local.masked_fill(absent, 0)].masked_fill(absent[:, None], 0)


def exercise_6_1():
    """Two for each of the 64 layers, one for the embedding: 129, whatever the number of ranks."""
    from types import SimpleNamespace

    import transformers

    from nanovllm.layers.linear import RowParallelLinear, VocabParallelEmbedding, parallelize
    from nanovllm.models.registry import get_model_class
    config = transformers.Qwen3Config(
        hidden_size=64, num_hidden_layers=64, num_attention_heads=64, num_key_value_heads=8,
        head_dim=4, intermediate_size=64, vocab_size=96, architectures=["Qwen3ForCausalLM"])
    for n in (4, 8):
        with torch.device("meta"):
            model = get_model_class(config)(config)
        model = parallelize(model, SimpleNamespace(rank=0, world_size=n), torch.device("meta"))
        sums = [m for m in model.modules()
                if isinstance(m, (RowParallelLinear, VocabParallelEmbedding))]
        assert len(sums) == 129


def exercise_6_2():
    """class CuttingRowParallelLinear(RowParallelLinear):
        def forward(self, x):
            return super().forward(x[:, self.first:self.first + self.weight.shape[1]])
    """
    from types import SimpleNamespace

    from nanovllm.layers.linear import RowParallelLinear

    class CuttingRowParallelLinear(RowParallelLinear):
        def forward(self, x):
            return super().forward(x[:, self.first:self.first + self.weight.shape[1]])

    whole, x, total = torch.nn.Linear(8, 3, bias=False), torch.randn(5, 8), 0
    for rank in range(2):
        group = SimpleNamespace(rank=rank, world_size=2, all_reduce=lambda y: y)
        layer = CuttingRowParallelLinear(whole, group, "cpu")
        layer.weight.data.copy_(whole.weight[:, 4 * rank:4 * rank + 4])
        total = total + layer(x)
    assert torch.allclose(total, whole(x), atol=1e-6)


def exercise_6_3():
    """Ids, positions and tables may be anything valid: nobody looks at what comes out of a padded
    row. A slot must be -1, or the row writes into a block. A length of 0 keeps the row from reading
    keys: anything else is harmless, and costs time.
    """


def exercise_6_4():
    """Ten recordings in place of 43; a batch of 257 carries 255 rows of padding in place of 31."""
    from nanovllm.engine.cuda_graphs import graph_sizes
    powers = [2**i for i in range(10)]
    padding = [min(size for size in ladder if size >= 257) - 257
               for ladder in (powers, graph_sizes(512))]
    assert (len(powers), len(graph_sizes(512)), *padding) == (10, 43, 255, 31)
