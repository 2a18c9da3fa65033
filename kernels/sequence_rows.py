"""The rows of a batch that a group of the sequence kernels takes, and where those of a step lie.

[T, B, F] has B rows for each step. A packed sequence [N, F] has those whose length is not over, which are the first
ones: `slots` [T + 2] tells where they begin among B rows of initial states, all steps' rows and B rows again, which
are the slots of `sequence_forward`; without `slots` each has B rows.

The branches have an else each, as the compiler reads on behind a return.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rnnattn.kernels.math import uniform


@triton.jit
def rows_of_tile(order, lengths, tile, T, B, BATCH: tl.constexpr):
    """The rows, which of them there are, their lengths, and the steps of the longest.

    Of a row that is not there others may read row 0, nobody stores it.
    """
    place = tile * BATCH + tl.arange(0, BATCH)
    present = place < B
    row = tl.where(present, place, 0)
    if order is not None:
        row = tl.load(order + place, present, 0).to(tl.int32)
    steps, length = T, T
    if lengths is not None:
        length = tl.load(lengths + row, present, 0).to(tl.int32)
        steps = uniform(tl.max(length, 0))
    return row, present, length, steps


@triton.jit
def at_slot(slots, s, row_length, B):
    """Where slot s begins, of rows of that length."""
    if slots is None:
        return s.to(tl.int64) * (B.to(tl.int64) * row_length)
    else:
        return tl.load(slots + s) * row_length


@triton.jit
def at_step(slots, t, row_length, B):
    """Where step t begins, of rows of that length."""
    if slots is None:
        return t.to(tl.int64) * (B.to(tl.int64) * row_length)
    else:
        return (tl.load(slots + t + 1) - B) * row_length


@triton.jit
def before_scan(slots, k, T, B):
    """What `row_of_step` needs to know of scan k."""
    if slots is None:
        return k * T
    else:
        return k * (tl.load(slots + T + 1) - B)


@triton.jit
def row_of_step(slots, before, t, B):
    """The number of step t's first row in [K, T, B] or [K, N]."""
    if slots is None:
        return (before + t).to(tl.int64) * B
    else:
        return before + tl.load(slots + t + 1) - B
