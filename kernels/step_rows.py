"""What the forward and the backward of a recurrent step share: rows of tensors, and resets.

A program computes BLOCK units of one row. Rows may be strided, elements of a row are contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256  # a step is little work: small blocks spread it over the machine
WARPS = 4


@triton.jit
def at(pointer, row, stride, column, ALIGNED: tl.constexpr):
    """Addresses of columns of a row; ALIGNED allows loads and stores of 16 bytes."""
    address = pointer + row * stride + column
    return tl.multiple_of(address, [16]) if ALIGNED else address


@triton.jit
def load(pointer, row, stride, column, inside, ALIGNED: tl.constexpr):
    return tl.load(at(pointer, row, stride, column, ALIGNED), inside).to(tl.float32)


@triton.jit
def store(pointer, row, stride, column, value, inside, ALIGNED: tl.constexpr):
    tl.store(at(pointer, row, stride, column, ALIGNED), value, inside)


@triton.jit
def started_from(before, resets, other, row, stride, column, inside, ALIGNED: tl.constexpr):
    """What a step starts from: `before`, or where the row is reset what stands in `other`, by default zero."""
    if resets is not None:
        instead = tl.zeros_like(before)
        if other is not None:
            instead = load(other, row, stride, column, inside, ALIGNED)
        before = tl.where(tl.load(resets + row) != 0, instead, before)
    return before


@triton.jit
def kept_from(d, resets_after, d_reset, row, stride, unit, inside, ALIGNED: tl.constexpr):
    """The gradient d of a state that left this row's step: none where the next step was reset; d_reset gathers it."""
    if resets_after is not None:
        cut = tl.load(resets_after + row) != 0
        if d_reset is not None:
            gathered = load(d_reset, row, stride, unit, inside, ALIGNED)
            store(d_reset, row, stride, unit, gathered + tl.where(cut, d, 0.0), inside, ALIGNED)
        d = tl.where(cut, 0.0, d)
    return d


def strides(tensors: tuple[Tensor | None, ...]) -> list[int]:
    return [0 if tensor is None else tensor.stride(0) for tensor in tensors]


def aligned(H: int, tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether every row of every gate starts at a multiple of 16 bytes."""
    return all(
        tensor.data_ptr() % 16 == 0 and tensor.stride(0) * size % 16 == 0 and H * size % 16 == 0
        for tensor in tensors
        if tensor is not None
        for size in [tensor.element_size()]
    )


__all__ = ["BLOCK", "WARPS", "aligned", "kept_from", "load", "started_from", "store", "strides"]
