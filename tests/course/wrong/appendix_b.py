"""Typical wrong kernels: (name, what was written, a word of the verdict)."""

import triton
import triton.language as tl


@triton.jit
def no_mask(x_ptr, out_ptr, factor, n, LANES: tl.constexpr):
    place = tl.program_id(0) * LANES + tl.arange(0, LANES)
    tl.store(out_ptr + place, factor * tl.load(x_ptr + place, mask=place < n, other=0.0))


@triton.jit
def always_program_zero(x_ptr, out_ptr, factor, n, LANES: tl.constexpr):
    place = tl.arange(0, LANES)
    tl.store(out_ptr + place, factor * tl.load(x_ptr + place, mask=place < n), mask=place < n)


@triton.jit
def interleaved(x_ptr, out_ptr, factor, n, LANES: tl.constexpr):
    place = tl.program_id(0) + tl.arange(0, LANES)
    tl.store(out_ptr + place, factor * tl.load(x_ptr + place, mask=place < n), mask=place < n)


@triton.jit
def mean_of_the_width(x_ptr, out_ptr, eps, N, WIDTH: tl.constexpr):
    lane = tl.arange(0, WIDTH)
    place = tl.program_id(0) * N + lane
    x = tl.load(x_ptr + place, mask=lane < N, other=0.0)
    tl.store(out_ptr + place, x / tl.sqrt(tl.sum(x * x, 0) / WIDTH + eps), mask=lane < N)


@triton.jit
def lanes_beyond_count(x_ptr, out_ptr, eps, N, WIDTH: tl.constexpr):
    lane = tl.arange(0, WIDTH)
    place = tl.program_id(0) * N + lane
    x = tl.load(x_ptr + place)
    tl.store(out_ptr + place, x / tl.sqrt(tl.sum(x * x, 0) / N + eps), mask=lane < N)


@triton.jit
def lanes_without_other(x_ptr, out_ptr, eps, N, WIDTH: tl.constexpr):
    lane = tl.arange(0, WIDTH)
    place = tl.program_id(0) * N + lane
    x = tl.load(x_ptr + place, mask=lane < N)
    tl.store(out_ptr + place, x / tl.sqrt(tl.sum(x * x, 0) / N + eps), mask=lane < N)


@triton.jit
def no_such_name(x_ptr, out_ptr, eps, N, WIDTH: tl.constexpr):
    lane = tl.arange(0, WIDTH)
    x = tl.load(x_ptr + plaice, mask=lane < N)  # noqa: F821
    tl.store(out_ptr + lane, x, mask=lane < N)


@triton.jit
def eps_outside(x_ptr, out_ptr, eps, N, WIDTH: tl.constexpr):
    lane = tl.arange(0, WIDTH)
    place = tl.program_id(0) * N + lane
    x = tl.load(x_ptr + place, mask=lane < N, other=0.0)
    tl.store(out_ptr + place, x / (tl.sqrt(tl.sum(x * x, 0) / N) + eps), mask=lane < N)


@triton.jit
def writes_nowhere_too(x_ptr, slots_ptr, cache_ptr, D: tl.constexpr):
    row, d = tl.program_id(0), tl.arange(0, D)
    slot = tl.load(slots_ptr + row)
    tl.store(cache_ptr + slot * D + d, tl.load(x_ptr + row * D + d))


@triton.jit
def row_is_slot(x_ptr, slots_ptr, cache_ptr, D: tl.constexpr):
    row, d = tl.program_id(0), tl.arange(0, D)
    tl.store(cache_ptr + row * D + d, tl.load(x_ptr + row * D + d))


@triton.jit
def slot_times_nothing(x_ptr, slots_ptr, cache_ptr, D: tl.constexpr):
    row, d = tl.program_id(0), tl.arange(0, D)
    slot = tl.load(slots_ptr + row)
    tl.store(cache_ptr + slot + d, tl.load(x_ptr + row * D + d), mask=d + slot >= 0)


@triton.jit
def plain_mean(parts_ptr, lse_ptr, out_ptr, PARTS: tl.constexpr, D: tl.constexpr):
    row, part, d = tl.program_id(0), tl.arange(0, PARTS), tl.arange(0, D)
    parts = tl.load(parts_ptr + (row * PARTS + part[:, None]) * D + d)
    tl.store(out_ptr + row * D + d, tl.sum(parts, 0) / PARTS)


@triton.jit
def overflows(parts_ptr, lse_ptr, out_ptr, PARTS: tl.constexpr, D: tl.constexpr):
    row, part, d = tl.program_id(0), tl.arange(0, PARTS), tl.arange(0, D)
    weight = tl.exp(tl.load(lse_ptr + row * PARTS + part))
    parts = tl.load(parts_ptr + (row * PARTS + part[:, None]) * D + d)
    tl.store(out_ptr + row * D + d, tl.sum(weight[:, None] * parts, 0) / tl.sum(weight, 0))


@triton.jit
def nan_without_keys(parts_ptr, lse_ptr, out_ptr, PARTS: tl.constexpr, D: tl.constexpr):
    row, part, d = tl.program_id(0), tl.arange(0, PARTS), tl.arange(0, D)
    lse = tl.load(lse_ptr + row * PARTS + part)
    weight = tl.exp(lse - tl.max(lse, 0))
    parts = tl.load(parts_ptr + (row * PARTS + part[:, None]) * D + d)
    tl.store(out_ptr + row * D + d, tl.sum(weight[:, None] * parts, 0) / tl.sum(weight, 0))


@triton.jit
def decode(q_ptr, k_ptr, v_ptr, table_ptr, first, begin, length, out_ptr, BS: tl.constexpr,
           D: tl.constexpr):
    """Attention over the keys from `first` on, in the blocks from `begin` on."""
    head, heads = tl.program_id(0), tl.num_programs(0)
    d, i = tl.arange(0, D), tl.arange(0, BS)
    q = tl.load(q_ptr + head * D + d)
    total, acc = tl.zeros([1], tl.float32), tl.zeros([D], tl.float32)
    for start in range(begin, length, BS):
        block = tl.load(table_ptr + start // BS)
        place = ((block * BS + i) * heads + head)[:, None] * D + d
        counts = (start + i < length) & (start + i >= first)
        k = tl.load(k_ptr + place, mask=counts[:, None], other=0.0)
        weights = tl.where(counts, tl.exp(tl.sum(q * k, 1)), 0.0)
        v = tl.load(v_ptr + place, mask=counts[:, None], other=0.0)
        acc, total = acc + tl.sum(weights[:, None] * v, 0), total + tl.sum(weights, 0)
    tl.store(out_ptr + head * D + d, acc / total)


@triton.jit
def no_window(q_ptr, k_ptr, v_ptr, table_ptr, length, window, out_ptr, BS: tl.constexpr,
              D: tl.constexpr):
    decode(q_ptr, k_ptr, v_ptr, table_ptr, 0, 0, length, out_ptr, BS, D)


@triton.jit
def whole_blocks(q_ptr, k_ptr, v_ptr, table_ptr, length, window, out_ptr, BS: tl.constexpr,
                 D: tl.constexpr):
    begin = tl.maximum(length - window, 0) // BS * BS
    decode(q_ptr, k_ptr, v_ptr, table_ptr, begin, begin, length, out_ptr, BS, D)


@triton.jit
def first_keys(q_ptr, k_ptr, v_ptr, table_ptr, length, window, out_ptr, BS: tl.constexpr,
               D: tl.constexpr):
    decode(q_ptr, k_ptr, v_ptr, table_ptr, 0, 0, tl.minimum(length, window), out_ptr, BS, D)


@triton.jit
def no_largest(q_ptr, k_ptr, v_ptr, table_ptr, length, window, out_ptr, BS: tl.constexpr,
               D: tl.constexpr):
    first = tl.maximum(length - window, 0)
    decode(q_ptr, k_ptr, v_ptr, table_ptr, first, first // BS * BS, length, out_ptr, BS, D)


@triton.jit
def before_the_row(q_ptr, k_ptr, v_ptr, table_ptr, length, window, out_ptr, BS: tl.constexpr,
                   D: tl.constexpr):
    first = length - window
    decode(q_ptr, k_ptr, v_ptr, table_ptr, first, first // BS * BS, length, out_ptr, BS, D)


WRONG = [
    ("scale_kernel", no_mask, "behind the result"),
    ("scale_kernel", always_program_zero, "program p"),
    ("scale_kernel", interleaved, "program p"),
    ("rms_kernel", mean_of_the_width, "not by WIDTH"),
    ("rms_kernel", lanes_beyond_count, "other=0.0"),
    ("rms_kernel", lanes_without_other, "other=0.0"),
    ("rms_kernel", no_such_name, "in line"),
    ("rms_kernel", eps_outside, "and not"),
    ("store_rows_kernel", writes_nowhere_too, "nowhere"),
    ("store_rows_kernel", row_is_slot, "slots[i]"),
    ("store_rows_kernel", slot_times_nothing, "slots[i] * D"),
    ("merge_kernel", plain_mean, "weight of a part"),
    ("merge_kernel", overflows, "subtract the largest"),
    ("merge_kernel", nan_without_keys, "no key"),
    ("window_decode_kernel", no_window, "window"),
    ("window_decode_kernel", whole_blocks, "mask the keys before"),
    ("window_decode_kernel", first_keys, "first key in the window"),
    ("window_decode_kernel", no_largest, "the largest score"),
    ("window_decode_kernel", before_the_row, "all keys count"),
]
