"""Graders of appendix B: five kernels, from easy to hard. They run in Triton's interpreter too."""

import inspect
import traceback
from contextlib import nullcontext
from unittest.mock import patch

import torch

from turns import Wrong, turn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FOREIGN = 77.0                                # what stands in memory that is not the kernel's


def launch(kernel, grid, *args, **constants):
    """Run the learner's kernel; NotImplementedError where it is a stub.

    Wrong, with the learner's own line, if it fails.
    """
    function = getattr(kernel, "fn", kernel)
    if "raise NotImplementedError" in inspect.getsource(function):
        raise NotImplementedError
    if function is kernel:                    # the stand-in for Triton gives the function back
        raise Wrong("this is a plain function", "put @triton.jit above it; and without Triton "
                    "installed no kernel can be tried")
    try:
        with lanes_without_a_value():
            kernel[grid](*args, **constants)
    except Exception as error:
        cause = error.__cause__ or error      # the interpreter wraps it
        lines = [frame for frame in traceback.extract_tb(cause.__traceback__)
                 if frame.name == function.__name__]
        if not lines:
            raise
        raise Wrong(f"{type(cause).__name__}: {cause}\n"
                    f"    in line {lines[-1].lineno}: {lines[-1].line}") from error


def lanes_without_a_value():
    """Lanes whose mask is off and that have no `other` hold something, as they may on a GPU.

    Triton's interpreter alone would make them 0.
    """
    from triton.runtime import interpreter
    if torch.cuda.is_available():
        return nullcontext()
    builder = interpreter.interpreter_builder
    load = builder.create_masked_load

    def filled(pointers, mask, other, *rest):
        got = load(pointers, mask, other, *rest)
        if other is None and got.data.dtype.kind == "f":
            got.data[~mask.data] = FOREIGN
        return got

    return patch.object(builder, "create_masked_load", filled)


def guarded(*shape):
    """A tensor to write into, and the larger one around it, which nobody may touch."""
    n = torch.Size(shape).numel()
    around = torch.full((n + 64,), FOREIGN, device=DEVICE)
    return around[:n].view(shape), around[n:]


def check(got, want, foreign, what, hint):
    """Wrong if the result differs, or if memory behind it has changed."""
    if (foreign != FOREIGN).any():
        raise Wrong(f"{what}: memory behind the result was written too",
                    "every store needs a mask where lanes reach beyond the end")
    off = ~((got - want).abs() <= 1e-4).flatten()           # also where it is NaN
    if off.any():
        first = int(off.nonzero()[0])
        said, right = ([round(x, 4) for x in y.flatten()[first:first + 4].tolist()]
                       for y in (got, want))
        raise Wrong(f"{what}: from place {first} on {said}… and not {right}…", hint)


@turn
def scale_kernel(written):
    """out = factor * x, for a length that is no multiple of the lanes."""
    for n in (8, 10, 3):
        x = torch.arange(1.0, n + 1, device=DEVICE)
        out, foreign = guarded(n)
        launch(written, (-(-n // 4),), x, out, 3.0, n, LANES=4)
        check(out, 3 * x, foreign, f"{n} numbers, 4 lanes",
              "program p has the places p * LANES to p * LANES + LANES - 1")


@turn
def rms_kernel(written):
    """One program a row: x / sqrt(mean(x²) + eps)."""
    for rows, n in ((2, 8), (3, 5)):
        x = torch.randn(rows, n, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        around = torch.full((rows * n + 8,), 1e6, device=DEVICE)       # what lies behind a row
        around[:rows * n] = x.flatten()
        out, foreign = guarded(rows, n)
        launch(written, (rows,), around, out, 0.5, n, WIDTH=8)
        check(out, x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 0.5), foreign,
              f"{rows} rows of {n} numbers, 8 lanes",
              "lanes beyond the row must add 0 (other=0.0); the mean divides by N, not by WIDTH")


@turn
def store_rows_kernel(written):
    """cache[slots[i]] = x[i]; a slot of -1 is written nowhere."""
    x = torch.arange(12.0, device=DEVICE).view(3, 4) + 1
    for slots in ([4, 0, 2], [1, -1, 3]):
        around = torch.zeros(7, 4, device=DEVICE)     # a place before the cache, one behind
        want, cache = around.clone(), around[1:6]
        for row, slot in zip(x, slots):
            if slot >= 0:
                want[1 + slot] = row
        launch(written, (3,), x, torch.tensor(slots, device=DEVICE), cache, D=4)
        if (around != want).any():
            row = int((around != want).any(1).nonzero()[0]) - 1
            raise Wrong(f"slots {slots}: the cache differs in slot {row}",
                        "-1 means nowhere: mask the store by slot >= 0" if -1 in slots else
                        "row i of x goes to the D numbers from slots[i] * D on")


@turn
def merge_kernel(written):
    """Parts of a softmax into one: weights are the softmax of their log-denominators."""
    share = "the weight of a part is exp of its lse, divided by the sum of these over the parts"
    for lse, hint in (([[1.0, 2.0]], share), ([[0.0, float("-inf")]], share),
                      ([[90.0, 91.0], [-3.0, 0.5]], "subtract the largest before exp"),
                      ([[float("-inf")] * 2], "where all are -inf there is no key: the result is "
                       "0; and -inf minus -inf is NaN")):
        lse = torch.tensor(lse, device=DEVICE)
        parts = torch.randn(len(lse), 2, 4, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        out, foreign = guarded(len(lse), 4)
        launch(written, (len(lse),), parts, lse, out, PARTS=2, D=4)
        want = (lse.softmax(1).nan_to_num()[:, :, None] * parts).sum(1)
        check(out, want, foreign, f"log-denominators {lse.tolist()}", hint)


@turn
def window_decode_kernel(written):
    """Paged decode attention over the last WINDOW keys only."""
    g, bs, d = torch.Generator().manual_seed(2), 4, 8
    k, v = (torch.randn(6, bs, 2, d, generator=g).to(DEVICE) for _ in "kv")
    around = torch.zeros(68, dtype=torch.long, device=DEVICE)     # beside the table stands 0
    table = around[32:36]
    table.copy_(torch.tensor([5, 0, 3, 1]))
    for length, window, size in ((13, 100, 1), (13, 4, 1), (16, 6, 1), (3, 2, 1), (12, 8, 40)):
        q = size * torch.randn(2, d, generator=g).to(DEVICE)
        out, foreign = guarded(2, d)
        launch(written, (2,), q, k, v, table, length, window, out, BS=bs, D=d)
        keys, values = (c[table].reshape(-1, 2, d)[max(0, length - window):length] for c in (k, v))
        weights = torch.einsum("hd,nhd->hn", q, keys).softmax(1)
        check(out, torch.einsum("hn,nhd->hd", weights, values), foreign,
              f"{length} keys, a window of {window}" + ", large scores" * (size > 1),
              "subtract the largest score so far before exp" if size > 1 else
              "begin at the block of the first key in the window, and mask the keys before it"
              if window < length else "with a window larger than the row, all keys count")
