"""Typical wrong answers to the turns of day 3."""

import torch
from nanovllm.engine.block_manager import block_digest
from nanovllm.engine.sequence import Sequence


def takes_too_early(block_table, num_tokens, free_blocks, block_size):
    if num_tokens >= len(block_table) * block_size:
        if not free_blocks:
            return False
        block_table.append(free_blocks.pop(0))
    return True


def never_full(block_table, num_tokens, free_blocks, block_size):
    if num_tokens % block_size == 1:
        if free_blocks:
            block_table.append(free_blocks.pop(0))
    return True


def asks_first(block_table, num_tokens, free_blocks, block_size):
    if not free_blocks:
        return False
    if num_tokens > len(block_table) * block_size:
        block_table.append(free_blocks.pop(0))
    return True


def takes_every_time(block_table, num_tokens, free_blocks, block_size):
    if not free_blocks:
        return False
    block_table.append(free_blocks.pop(0))
    return True


def logical_block(block_table, start, end, block_size):
    return list(range(start, end))


def first_block_only(block_table, start, end, block_size):
    first = block_table[start // block_size] * block_size + start % block_size
    return [first + i for i in range(end - start)]


def no_offset(block_table, start, end, block_size):
    return [block_table[p // block_size] * block_size for p in range(start, end)]


def from_zero(block_table, start, end, block_size):
    return [block_table[p // block_size] * block_size + p % block_size for p in range(end - start)]


def whole_prompt(token_ids, cached, block_size):
    hits, digest = [], b""
    for i in range(len(token_ids) // block_size):
        digest = block_digest(digest, token_ids[i * block_size:(i + 1) * block_size])
        if digest not in cached:
            break
        hits.append(cached[digest])
    return hits


def without_parent(token_ids, cached, block_size):
    hits = []
    for i in range((len(token_ids) - 1) // block_size):
        digest = block_digest(b"", token_ids[i * block_size:(i + 1) * block_size])
        if digest in cached:
            hits.append(cached[digest])
    return hits


def finds_nothing(token_ids, cached, block_size):
    return []


def goes_on_after_a_miss(token_ids, cached, block_size):
    tokens = [token_ids[i:i + block_size] for i in range(0, len(token_ids) - 1, block_size)]
    hits, digest = [], b""
    for block in tokens[:(len(token_ids) - 1) // block_size]:
        new = block_digest(digest, block)
        if new in cached:
            hits.append(cached[new])
        digest = new if new in cached else digest
    return hits if len(hits) < 2 else hits[:1]


def token_by_token(first, second, block_size):
    equal = 0
    while equal < min(len(first), len(second)) and first[equal] == second[equal]:
        equal += 1
    return len(second) - equal


def no_cap(first, second, block_size):
    equal = 0
    while equal < min(len(first), len(second)) and first[equal] == second[equal]:
        equal += 1
    return len(second) - equal // block_size * block_size


def everything(first, second, block_size):
    return len(second)


def no_correction(m, l, o, scores, values):
    m_new = torch.maximum(m, scores.max())
    weights = (scores - m_new).exp()
    return m_new, l + weights.sum(), o + weights @ values


def only_l_corrected(m, l, o, scores, values):
    m_new = torch.maximum(m, scores.max())
    weights = (scores - m_new).exp()
    return m_new, (m - m_new).exp() * l + weights.sum(), o + weights @ values


def maximum_of_the_tile(m, l, o, scores, values):
    m_new = scores.max()
    correction = (m - m_new).exp() if m < m_new else torch.tensor(1.0)
    weights = (scores - m_new).exp()
    return m_new, correction * l + weights.sum(), correction * o + weights @ values


def no_maximum(m, l, o, scores, values):
    weights = scores.exp()
    return m, l + weights.sum(), o + weights @ values


def mean_of_tiles(m, l, o, scores, values):
    return m, l + 1, o + scores.softmax(0) @ values


def over_keys(q, k, v, scale):
    return (k @ q * scale).softmax(0) @ v


def in_order(q, k_cache, v_cache, block_table, context_len, scale):
    k, v = (torch.nan_to_num(cache).flatten(0, 1)[:context_len] for cache in (k_cache, v_cache))
    return over_keys(q, k, v, scale)


def whole_last_block(q, k_cache, v_cache, block_table, context_len, scale):
    blocks = block_table[:-(-context_len // k_cache.shape[1])]
    return over_keys(q, k_cache[blocks].flatten(0, 1), v_cache[blocks].flatten(0, 1), scale)


def no_scale(q, k_cache, v_cache, block_table, context_len, scale):
    k, v = (cache[block_table].flatten(0, 1)[:context_len] for cache in (k_cache, v_cache))
    return over_keys(q, k, v, 1.0)


def last_block_only(q, k_cache, v_cache, block_table, context_len, scale):
    bs = k_cache.shape[1]
    for i in range(-(-context_len // bs)):
        length = min(bs, context_len - i * bs)
        k, v = (cache[block_table[i], :length] for cache in (k_cache, v_cache))
        out = over_keys(q, k, v, scale)
    return out


def shares_all(manager, seq):
    child = Sequence(seq.prompt_token_ids, seq.sampling_params)
    child.token_ids, child.num_computed_tokens = list(seq.token_ids), seq.num_computed_tokens
    for block_id in seq.block_table:
        manager._share(manager.blocks[block_id])
    child.block_table = list(seq.block_table)
    return child, None


def loses_the_border(manager, seq):
    full, part = divmod(seq.num_computed_tokens, manager.block_size)
    child = Sequence(seq.token_ids, seq.sampling_params)
    child.num_computed_tokens = seq.num_computed_tokens
    for block_id in seq.block_table[:full]:
        manager._share(manager.blocks[block_id])
    new = [manager._take().block_id for _ in seq.block_table[full:]]
    child.block_table = seq.block_table[:full] + new
    return child, (seq.block_table[full], new[0]) if part else None


def asks_after_sharing(manager, seq):
    full, part = divmod(seq.num_computed_tokens, manager.block_size)
    child = Sequence(seq.prompt_token_ids, seq.sampling_params)
    child.token_ids, child.num_computed_tokens = list(seq.token_ids), seq.num_computed_tokens
    for block_id in seq.block_table[:full]:
        manager._share(manager.blocks[block_id])
    if len(seq.block_table) - full > manager.num_free_blocks:
        return None
    new = [manager._take().block_id for _ in seq.block_table[full:]]
    child.block_table = seq.block_table[:full] + new
    return child, (seq.block_table[full], new[0]) if part else None


def copies_nothing_private(manager, seq):
    full = seq.num_computed_tokens // manager.block_size
    child = Sequence(seq.prompt_token_ids, seq.sampling_params)
    child.token_ids, child.num_computed_tokens = list(seq.token_ids), seq.num_computed_tokens
    for block_id in seq.block_table[:full]:
        manager._share(manager.blocks[block_id])
    child.block_table = seq.block_table[:full]
    return child, None


WRONG = [
    ("append_slot", takes_too_early, "due already"),
    ("append_slot", never_full, "no block is free"),
    ("append_slot", asks_first, "needs no free block"),
    ("append_slot", takes_every_time, "has room"),
    ("slot_mapping", logical_block, "block_table[p // block_size]"),
    ("slot_mapping", first_block_only, "cross two blocks"),
    ("slot_mapping", no_offset, "p % block_size"),
    ("slot_mapping", from_zero, "cross two blocks"),
    ("match_prefix", whole_prompt, "last token"),
    ("match_prefix", without_parent, "parent"),
    ("match_prefix", finds_nothing, "walk the blocks"),
    ("match_prefix", goes_on_after_a_miss, "walk the blocks"),
    ("tokens_to_compute", token_by_token, "full blocks"),
    ("tokens_to_compute", no_cap, "last block is full"),
    ("tokens_to_compute", everything, "full blocks"),
    ("online_softmax", no_correction, "scale the old l and o"),
    ("online_softmax", only_l_corrected, "both of them"),
    ("online_softmax", maximum_of_the_tile, "m_new = max(m, max of the tile)"),
    ("online_softmax", no_maximum, "overflow"),
    ("online_softmax", mean_of_tiles, "scale the old"),
    ("paged_attention", in_order, "block_table[i]"),
    ("paged_attention", whole_last_block, "never written"),
    ("paged_attention", no_scale, "* scale"),
    ("paged_attention", last_block_only, "merged"),
    ("fork", shares_all, "private"),
    ("fork", loses_the_border, "prompt_token_ids"),
    ("fork", asks_after_sharing, "before anything changes"),
    ("fork", copies_nothing_private, "private"),
]
