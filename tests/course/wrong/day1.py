"""Wrong answers to the turns of day 1, and a word of what the grader must say of each."""

import torch


def forgets_growth(prompt_length, generated):
    return prompt_length * generated, prompt_length + generated - 1


def computes_the_last_token(prompt_length, generated):
    return sum(prompt_length + i for i in range(generated)), prompt_length + generated


def one_number(prompt_length, generated):
    return prompt_length + generated - 1


def only_the_kept(q, k, v, keys, values):
    output = (keys @ q).softmax(-1) @ values
    return output, torch.cat([keys, k[None]]), torch.cat([values, v[None]])


def not_kept(q, k, v, keys, values):
    every = torch.cat([keys, k[None]])
    return (every @ q).softmax(-1) @ torch.cat([values, v[None]]), keys, values


def no_softmax(q, k, v, keys, values):
    keys, values = torch.cat([keys, k[None]]), torch.cat([values, v[None]])
    return keys @ q @ values, keys, values


def new_row_first(q, k, v, keys, values):
    keys, values = torch.cat([k[None], keys]), torch.cat([v[None], values])
    return (keys @ q).softmax(-1) @ values, keys, values


def divides_by_tokens(arrival, times):
    itls = [b - a for a, b in zip(times, times[1:])]
    return times[0] - arrival, (times[-1] - times[0]) / len(times), itls


def first_gap_from_arrival(arrival, times):
    itls = [b - a for a, b in zip([arrival] + times, times)]
    return times[0] - arrival, sum(itls) / len(itls), itls


def absolute_first_token(arrival, times):
    itls = [b - a for a, b in zip(times, times[1:])]
    return times[0], (times[-1] - times[0]) / len(itls) if itls else None, itls


def zero_pace(arrival, times):
    itls = [b - a for a, b in zip(times, times[1:])]
    return times[0] - arrival, (times[-1] - times[0]) / max(1, len(itls)), itls


def keys_alone(config, size):
    return config.num_hidden_layers * config.num_key_value_heads * config.head_dim * size


def query_heads(config, size):
    return 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * size


def guessed_head_dim(config, size):
    head_dim = config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * size


def samples_in_a_chunk(seq, computed, token_id, eos):
    seq.num_computed_tokens += computed
    seq.append_token(token_id)


def never_ends(seq, computed, token_id, eos):
    seq.num_computed_tokens += computed
    if not seq.num_uncomputed_tokens:
        seq.append_token(token_id)


def length_before_stop(seq, computed, token_id, eos):
    never_ends(seq, computed, token_id, eos)
    if seq.num_uncomputed_tokens != 1:
        return
    if seq.num_completion_tokens >= seq.sampling_params.max_tokens:
        seq.finish("length")
    elif token_id in eos and not seq.sampling_params.ignore_eos:
        seq.finish("stop")


def counts_the_prompt(seq, computed, token_id, eos):
    never_ends(seq, computed, token_id, eos)
    if token_id in eos and not seq.sampling_params.ignore_eos:
        seq.finish("stop")
    elif len(seq) >= seq.sampling_params.max_tokens:
        seq.finish("length")


def when_sampled(num_tokens, blocks_held, block_size):
    return max(0, num_tokens // block_size + 1 - blocks_held)


def one_at_a_time(num_tokens, blocks_held, block_size):
    return int(num_tokens % block_size == 1 and blocks_held * block_size < num_tokens)


def gives_back(num_tokens, blocks_held, block_size):
    return -(-num_tokens // block_size) - blocks_held


def pack(positions_from=lambda row, p: p, slot=lambda table, p, size: table[p // size] * size
         + p % size, length=lambda row: len(row[0]), first=(0,)):
    """A packing with one part of it changed."""
    def packing(rows, size):
        step = dict(input_ids=[], positions=[], slot_mapping=[], cu_seqlens_q=list(first),
                    context_lens=[])
        for row in rows:
            token_ids, computed, table = row
            for p in range(computed, len(token_ids)):
                step["input_ids"].append(token_ids[p])
                step["positions"].append(positions_from(row, p))
                step["slot_mapping"].append(slot(table, p, size))
            step["cu_seqlens_q"].append(len(step["input_ids"]))
            step["context_lens"].append(length(row))
        return step
    return packing


def move_without_check(seq, status):
    seq.status = status


def no_abort_while_waiting(seq, status):
    pair = seq.status.name, status.name
    if pair not in {("WAITING", "RUNNING"), ("RUNNING", "WAITING"), ("RUNNING", "FINISHED")}:
        raise ValueError(f"{pair[0]} to {pair[1]}")
    seq.status = status


def moves_first(seq, status):
    before, seq.status = seq.status, status
    if (before.name, status.name) not in {("WAITING", "RUNNING"), ("RUNNING", "WAITING"),
                                          ("RUNNING", "FINISHED"), ("WAITING", "FINISHED")}:
        raise ValueError(f"{before.name} to {status.name}")


WRONG = [
    ("positions_computed", forgets_growth, "without a cache"),
    ("positions_computed", computes_the_last_token, "last token"),
    ("positions_computed", one_number, "pair"),
    ("attend_with_cache", only_the_kept, "the new one too"),
    ("attend_with_cache", not_kept, "shape"),
    ("attend_with_cache", no_softmax, "softmax"),
    ("attend_with_cache", new_row_first, "comes last"),
    ("request_times", divides_by_tokens, "TPOT"),
    ("request_times", first_gap_from_arrival, "one less than tokens"),
    ("request_times", absolute_first_token, "TTFT"),
    ("request_times", zero_pace, "None"),
    ("kv_bytes_of", keys_alone, "a key and a value"),
    ("kv_bytes_of", query_heads, "KV heads"),
    ("kv_bytes_of", guessed_head_dim, "got 128"),
    ("advance", samples_in_a_chunk, "nothing is left"),
    ("advance", never_ends, "max_tokens is 1"),
    ("advance", length_before_stop, "very last token"),
    ("advance", counts_the_prompt, "not the prompt"),
    ("blocks_due", when_sampled, "exactly"),
    ("blocks_due", one_at_a_time, "several blocks"),
    ("blocks_due", gives_back, "negative"),
    ("pack_rows", pack(positions_from=lambda row, p: p - row[1]), "positions"),
    ("pack_rows", pack(slot=lambda table, p, size: p), "slot_mapping"),
    ("pack_rows", pack(length=lambda row: len(row[0]) - row[1]), "context_lens"),
    ("pack_rows", pack(first=()), "cu_seqlens_q"),
    ("checked_move", move_without_check, "was allowed"),
    ("checked_move", no_abort_while_waiting, "was refused"),
    ("checked_move", moves_first, "check before"),
]
