"""One solution of each turn and exercise of day 3."""

import torch
from nanovllm.engine.block_manager import BlockManager, block_digest
from nanovllm.engine.sequence import Sequence
from nanovllm.layers.attention import SDPABackend


def append_slot(block_table, num_tokens, free_blocks, block_size):
    if num_tokens > len(block_table) * block_size:
        if not free_blocks:
            return False
        block_table.append(free_blocks.pop(0))
    return True


def slot_mapping(block_table, start, end, block_size):
    return [block_table[p // block_size] * block_size + p % block_size for p in range(start, end)]


def match_prefix(token_ids, cached, block_size):
    hits, digest = [], b""
    for i in range((len(token_ids) - 1) // block_size):
        digest = block_digest(digest, token_ids[i * block_size:(i + 1) * block_size])
        if digest not in cached:
            break
        hits.append(cached[digest])
    return hits


def tokens_to_compute(first, second, block_size):
    equal = 0
    while equal < min(len(first), len(second)) and first[equal] == second[equal]:
        equal += 1
    equal = min(equal, len(second) - 1)                # the last token is always computed
    return len(second) - equal // block_size * block_size


def online_softmax(m, l, o, scores, values):
    m_new = torch.maximum(m, scores.max())
    correction = (m - m_new).exp()                     # exp(-inf) = 0 at the first tile
    weights = (scores - m_new).exp()
    return m_new, correction * l + weights.sum(), correction * o + weights @ values


def paged_attention(q, k_cache, v_cache, block_table, context_len, scale):
    bs = k_cache.shape[1]
    m, l, o = torch.tensor(float("-inf")), torch.tensor(0.0), torch.zeros_like(q)
    for i in range(-(-context_len // bs)):
        length = min(bs, context_len - i * bs)         # the last block is cut
        k, v = (cache[block_table[i], :length] for cache in (k_cache, v_cache))
        m, l, o = online_softmax(m, l, o, k @ q * scale, v)
    return o / l


def frees_forwards(run_workload):
    """The beginning of a prompt is then evicted first, and a chain breaks at its first link:
    without its first block all later ones are useless. More is computed again.
    """
    class FreesForwards(BlockManager):
        def free(self, seq):
            for block_id in seq.block_table:           # ours: reversed(seq.block_table)
                self._release(self.blocks[block_id])
            seq.block_table, seq.num_computed_tokens = [], 0

    return {manager.__name__: sum(run_workload(manager(14, 4), seed=seed, steps=150).computed
                                  for seed in range(8))
            for manager in (BlockManager, FreesForwards)}


def fork(manager, seq):
    full, part = divmod(seq.num_computed_tokens, manager.block_size)
    private = len(seq.block_table) - full
    if private > manager.num_free_blocks:              # before anything has changed
        return None
    child = Sequence(seq.prompt_token_ids, seq.sampling_params)
    child.token_ids = list(seq.token_ids)              # the border of prompt and answer stays
    child.num_computed_tokens = seq.num_computed_tokens
    for block_id in seq.block_table[:full]:
        manager._share(manager.blocks[block_id])
    new = [manager._take().block_id for _ in range(private)]
    child.block_table = seq.block_table[:full] + new
    return child, (seq.block_table[full], new[0]) if part else None


class StoresLast(SDPABackend):
    """All three schedules fail: a token attends to itself, and its own key is not there yet."""

    def store(self, layer, k, v, context):
        pass                                           # not yet

    def forward(self, layer, q, k, v, context):
        out = super().forward(layer, q, k, v, context)
        super().store(layer, k, v, context)
        return out
