"""One solution of each kernel of appendix B."""

import torch
import triton
import triton.language as tl


@triton.jit
def scale_kernel(x_ptr, out_ptr, factor, n, LANES: tl.constexpr):
    place = tl.program_id(0) * LANES + tl.arange(0, LANES)
    mask = place < n
    tl.store(out_ptr + place, factor * tl.load(x_ptr + place, mask=mask), mask=mask)


@triton.jit
def rms_kernel(x_ptr, out_ptr, eps, N, WIDTH: tl.constexpr):
    lane = tl.arange(0, WIDTH)
    place = tl.program_id(0) * N + lane
    x = tl.load(x_ptr + place, mask=lane < N, other=0.0)
    rms = tl.sqrt(tl.sum(x * x, 0) / N + eps)
    tl.store(out_ptr + place, x / rms, mask=lane < N)


@triton.jit
def store_rows_kernel(x_ptr, slots_ptr, cache_ptr, D: tl.constexpr):
    row, d = tl.program_id(0), tl.arange(0, D)
    slot = tl.load(slots_ptr + row)
    x = tl.load(x_ptr + row * D + d)
    tl.store(cache_ptr + slot * D + d, x, mask=(slot >= 0) & (d < D))


@triton.jit
def merge_kernel(parts_ptr, lse_ptr, out_ptr, PARTS: tl.constexpr, D: tl.constexpr):
    row, part, d = tl.program_id(0), tl.arange(0, PARTS), tl.arange(0, D)
    lse = tl.load(lse_ptr + row * PARTS + part)
    largest = tl.max(lse, 0)
    weight = tl.exp(lse - tl.where(largest == -float("inf"), 0.0, largest))
    parts = tl.load(parts_ptr + (row * PARTS + part[:, None]) * D + d)
    total = tl.sum(weight, 0)
    out = tl.sum(weight[:, None] * parts, 0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + row * D + d, out)


@triton.jit
def window_decode_kernel(q_ptr, k_ptr, v_ptr, table_ptr, length, window, out_ptr, BS: tl.constexpr,
                         D: tl.constexpr):
    head, heads = tl.program_id(0), tl.num_programs(0)
    d, i = tl.arange(0, D), tl.arange(0, BS)
    q = tl.load(q_ptr + head * D + d)
    best = tl.full([1], -float("inf"), tl.float32)
    total, acc = tl.zeros([1], tl.float32), tl.zeros([D], tl.float32)
    first = tl.maximum(length - window, 0)
    for start in range(first // BS * BS, length, BS):
        block = tl.load(table_ptr + start // BS)
        place = ((block * BS + i) * heads + head)[:, None] * D + d
        counts = (start + i < length) & (start + i >= first)
        k = tl.load(k_ptr + place, mask=counts[:, None], other=0.0)
        scores = tl.where(counts, tl.sum(q * k, 1), -float("inf"))
        new_best = tl.maximum(best, tl.max(scores, 0))
        weights, shrink = tl.exp(scores - new_best), tl.exp(best - new_best)
        v = tl.load(v_ptr + place, mask=counts[:, None], other=0.0)
        acc = acc * shrink + tl.sum(weights[:, None] * v, 0)
        total, best = total * shrink + tl.sum(weights, 0), new_best
    tl.store(out_ptr + head * D + d, acc / total)


@triton.jit
def softmax_kernel(x_ptr, out_ptr, N, WIDTH: tl.constexpr):
    row, lane = tl.program_id(0), tl.arange(0, WIDTH)
    x = tl.load(x_ptr + row * N + lane, mask=lane < N, other=-float("inf"))
    weights = tl.exp(x - tl.max(x, 0))
    tl.store(out_ptr + row * N + lane, weights / tl.sum(weights, 0), mask=lane < N)


def exercise_b_1():
    """`answer("softmax_kernel")` shows the kernel. The lanes beyond N have minus infinity: exp of
    it is 0, so it adds nothing. A 0 would add exp(0 - max) to the sum, and be the maximum itself
    where all scores are negative.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(3, 5, device=device) - 3
    out = torch.empty_like(x)
    softmax_kernel[(3,)](x, out, 5, WIDTH=8)
    assert torch.allclose(out, x.softmax(-1), atol=1e-6)


def exercise_b_2():
    """The layer: silu reads the gate and writes a result, mul reads that and the up half and
    writes: 5 sizes of [T, n]. The kernel reads both halves once and writes once: 3. Count with
    `with CountLaunches() as counter: SiluAndMul()(x)` and `sum(counter.bytes)`.
    """


def exercise_b_3():
    """Step 2 is foreseen. In step 3 the new prompt joins, which no guess has: in vain. In step 3
    every row samples again, so step 4 is foreseen, with two rows: the request of 3 has ended by its
    length. Then the third ends too, also by its length, and steps 5 and 6 are foreseen with the
    first alone: 4 foreseen, 1 in vain.
    """
    from fixtures import make_checkpoint
    from nanovllm import LLM, SamplingParams
    folder, _ = make_checkpoint(num_hidden_layers=2)
    with LLM(folder, device="cpu", kernels="plain", num_kvcache_blocks=16, look_ahead=True) as llm:
        for n in (6, 3):
            llm.add_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=n))
        for step in range(6):
            if step == 2:
                llm.add_request([4, 5, 6], SamplingParams(temperature=0, max_tokens=2))
            llm.step()
        assert (llm.stepper.right, llm.stepper.wrong, llm.is_finished()) == (4, 1, True)
