"""The products of the sequence kernels: tiles of a matrix that stay in the program, an operand new in each step.

    forward    sums [M, BATCH] = rows of W [M, width] . states^T [width, BATCH]
    backward   sums [UNITS, BATCH] = columns of W, as rows [UNITS, GH] . gradients^T [GH, BATCH]

W and the operand are cut into CHUNKS along the sum; AHEAD chunks of the operand are on their way at once. In the
backward, with few rows and a long sum, a chunk has PARTS parts that warps multiply side by side.

Masks take registers, so there are few: rows of the operand are such as may be read, and only the last chunk looks
where a row ends.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rnnattn.kernels.grid_barrier import load_shared
from rnnattn.kernels.math import add_dot, dot


@triton.jit
def hold_rows(weights, row, there, width, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Tiles [M, CHUNK] of the rows of a matrix, zero beyond them."""
    tiles = ()
    for chunk in tl.static_range(CHUNKS):
        column = chunk * CHUNK + tl.arange(0, CHUNK)
        mask = there[:, None] & (column < width)[None, :]
        tiles += (tl.load(weights + row[:, None] * width + column[None, :], mask, 0.0),)  # type: ignore[assignment]
    return tiles


@triton.jit
def _states(states, at, readable, width, first, LAST: tl.constexpr, CHUNK: tl.constexpr):
    """h^T [CHUNK, BATCH] of rows at these addresses, zero of those that are not readable (None: all are)."""
    column = first + tl.arange(0, CHUNK)
    address = states + at[None, :] + column[:, None]
    if LAST:
        mask = (column < width)[:, None]
        if readable is not None:
            mask = mask & readable[None, :]
        return load_shared(address, mask, 0.0)
    if readable is not None:
        return load_shared(address, tl.broadcast_to(readable[None, :], address.shape), 0.0)
    return load_shared(address)


@triton.jit
def product(w, states, at, readable, width, M: tl.constexpr, BATCH: tl.constexpr, CHUNK: tl.constexpr,
            CHUNKS: tl.constexpr, AHEAD: tl.constexpr, APART: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """[M, BATCH], what held rows w give for the states at these addresses."""
    sums = tl.zeros((M, BATCH), tl.float32)
    loaded = ()
    for n in tl.static_range(CHUNKS + AHEAD - 1):
        if n < CHUNKS:
            loaded += (_states(states, at, readable, width, n * CHUNK, n == CHUNKS - 1, CHUNK),)  # type: ignore[assignment]
        if n + 1 >= AHEAD:
            if APART:
                sums = add_dot(sums, w[n + 1 - AHEAD], loaded[n + 1 - AHEAD], PRECISION)
            else:
                sums = dot(w[n + 1 - AHEAD], loaded[n + 1 - AHEAD], sums, PRECISION)
    return sums


@triton.jit
def hold_columns(weights, unit, H, GH, width, PARTS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Tiles [PARTS, UNITS, CHUNK] of the columns of a matrix [GH, width], as rows, zero beyond them."""
    tiles = ()
    for chunk in tl.static_range(CHUNKS):
        first = chunk * PARTS * CHUNK
        row = first + tl.arange(0, PARTS)[:, None, None] * CHUNK + tl.arange(0, CHUNK)[None, None, :]
        mask = (row < GH) & (unit < H)[None, :, None]
        tiles += (tl.load(weights + row.to(tl.int64) * width + unit[None, :, None], mask, 0.0),)  # type: ignore[assignment]
    return tiles


@triton.jit
def _gradients(db, at, GH, first, LAST: tl.constexpr, PARTS: tl.constexpr, CHUNK: tl.constexpr):
    """db^T [PARTS, CHUNK, BATCH] of rows at these addresses."""
    column = first + tl.arange(0, PARTS)[:, None, None] * CHUNK + tl.arange(0, CHUNK)[None, :, None]
    if LAST:
        return load_shared(db + at[None, None, :] + column, column < GH, 0.0)
    return load_shared(db + at[None, None, :] + column)


@triton.jit
def _total(sums, UNITS: tl.constexpr, BATCH: tl.constexpr, PARTS: tl.constexpr):
    """The sum of the parts [PARTS, UNITS, BATCH] of several warps, a thread for each element: `tl.sum` leaves all of it
    in every warp, and what is computed with it goes on like that."""
    total = tl.permute(sums, (1, 2, 0))
    if PARTS == 8:
        a, b = tl.split(tl.reshape(total, (UNITS, BATCH, 4, 2)))
        total = a + b
    if PARTS >= 4:
        a, b = tl.split(tl.reshape(total, (UNITS, BATCH, 2, 2)))
        total = a + b
    a, b = tl.split(total)
    return a + b


@triton.jit
def product_of_parts(w, db, at, GH, UNITS: tl.constexpr, BATCH: tl.constexpr, PARTS: tl.constexpr, CHUNK: tl.constexpr,
                     CHUNKS: tl.constexpr, AHEAD: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """[UNITS, BATCH], what held columns w give for the gradients at these addresses."""
    sums = tl.zeros((PARTS, UNITS, BATCH), tl.float32)
    loaded = ()
    for n in tl.static_range(CHUNKS + AHEAD - 1):
        if n < CHUNKS:
            loaded += (_gradients(db, at, GH, n * PARTS * CHUNK, n == CHUNKS - 1, PARTS, CHUNK),)  # type: ignore[assignment]
        if n + 1 >= AHEAD:
            sums = dot(w[n + 1 - AHEAD], loaded[n + 1 - AHEAD], sums, PRECISION)
    return _total(sums, UNITS, BATCH, PARTS)
