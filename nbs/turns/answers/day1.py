"""One solution of each turn and exercise of day 1."""


def positions_computed(prompt_length, generated):
    naive = generated * prompt_length + generated * (generated - 1) // 2
    return naive, prompt_length + generated - 1      # the last token is never computed


def attend_with_cache(q, k, v, keys, values):
    import torch
    keys, values = torch.cat([keys, k[None]]), torch.cat([values, v[None]])   # [n + 1, d]
    return (keys @ q).softmax(-1) @ values, keys, values


def request_times(arrival, times):
    itls = [after - before for before, after in zip(times, times[1:])]
    tpot = (times[-1] - times[0]) / len(itls) if itls else None
    return times[0] - arrival, tpot, itls


def kv_bytes_of(config, bytes_per_number):
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * config.num_hidden_layers * kv_heads * head_dim * bytes_per_number


def advance(seq, computed, token_id, eos):
    seq.num_computed_tokens += computed
    if seq.num_uncomputed_tokens > 0:                # a chunk of a prompt: nothing is sampled
        return
    seq.append_token(token_id)
    if token_id in eos and not seq.sampling_params.ignore_eos:
        seq.finish("stop")
    elif seq.num_completion_tokens >= seq.sampling_params.max_tokens:
        seq.finish("length")


def blocks_due(num_tokens, blocks_held, block_size):
    needed = -(-num_tokens // block_size)            # rounded up
    return max(0, needed - blocks_held)


def pack_rows(rows, block_size):
    step = dict(input_ids=[], positions=[], slot_mapping=[], cu_seqlens_q=[0], context_lens=[])
    for token_ids, computed, table in rows:
        for p in range(computed, len(token_ids)):
            step["input_ids"].append(token_ids[p])
            step["positions"].append(p)
            step["slot_mapping"].append(table[p // block_size] * block_size + p % block_size)
        step["cu_seqlens_q"].append(len(step["input_ids"]))
        step["context_lens"].append(len(token_ids))
    return step


def checked_move(seq, status):
    arrows = {("WAITING", "RUNNING"), ("RUNNING", "WAITING"), ("RUNNING", "FINISHED"),
              ("WAITING", "FINISHED")}
    if (seq.status.name, status.name) not in arrows:
        raise ValueError(f"a sequence cannot go from {seq.status.name} to {status.name}")
    seq.status = status


def exercise_tokens_in_one_gib():
    """A token of Llama-3.2-1B takes 2 x 16 x 8 x 64 x 2 = 32,768 bytes, so 1 GiB holds 32,768.
    A token of Qwen3-0.6B takes 114,688 bytes, so 1 GiB holds 9,362: the smaller model has the
    larger cache. Eight requests of 4,096 tokens of Llama fill the pool, or two of Qwen. So the
    pool is reached long before max_num_seqs = 512.
    """
    llama, qwen = 2 * 16 * 8 * 64 * 2, 2 * 28 * 8 * 128 * 2
    assert (2**30 // llama, 2**30 // qwen) == (32_768, 9_362)
    assert (2**30 // llama // 4096, 2**30 // qwen // 4096) == (8, 2)


def exercise_last_block():
    """Two and three. With max_tokens=1 the only new token is sampled and never computed, so it
    needs no slot. With 2 the first new token is computed in the second step: it is the 33rd, the
    first of a third block.
    """
    for max_tokens, blocks in ((1, 2), (2, 3)):
        computed = 32 + max_tokens - 1
        assert blocks_due(computed, 0, 16) == blocks


def exercise_without_finally():
    """Only the fourth entry changes. The error jumps over the line that puts the outer step back,
    so after it the outer block goes on with the borders of the inner one, [0, 1, 2] in place of
    [0, 5, 8, 15]. The last entry is None still: the outer block ends without an error, and puts
    back what was there. So get_context() fails after it, as it should.
    """
    from contextlib import contextmanager

    current, trace = None, []

    @contextmanager
    def broken_context(step):
        nonlocal current
        before, current = current, step
        yield
        current = before                             # an error never comes here

    with broken_context("outer"):
        try:
            with broken_context("inner"):
                raise MemoryError
        except MemoryError:
            trace.append(current)
    assert (trace, current) == (["inner"], None)
