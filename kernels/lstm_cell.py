"""The pointwise part of an LSTM step, forward and backward.

    i, f, o = sigmoid(gates_x + gates_h)      (columns i, f, o)
    g       = tanh(gates_x + gates_h)         (columns g)
    c       = f * c_prev + i * g
    h       = o * tanh(c)

    dc     += dh * o * (1 - tanh(c)^2)
    d_gates = dc g i (1 - i), dc c_prev f (1 - f), dc i (1 - g^2), dh tanh(c) o (1 - o)
    dc      = dc * f

A program computes BLOCK units of one row. Row b is invalid at step t where t >= lengths[b]: it keeps
its state, and what else stands in its inputs (NaN too) is not used.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rnnattn.kernels.math import sigmoid, tanh

BLOCK = 256  # a step is little work: small blocks spread it over the machine
WARPS = 4

# The pointers move with t. Whether all are aligned is asked once (ALIGNED), not of each by Triton,
# which would compile a variant per combination that occurs.
FORWARD_POINTERS = ["gates_x", "gates_h", "c_prev", "h_prev", "gates", "c", "y", "h"]
BACKWARD_POINTERS = ["dh", "dc", "gates", "c", "c_prev", "d_gates"]


@triton.jit
def _at(pointer, row, stride, unit, ALIGNED: tl.constexpr):
    """Addresses of units of a row; ALIGNED allows loads and stores of 16 bytes."""
    address = pointer + row * stride + unit
    return tl.multiple_of(address, [16]) if ALIGNED else address


@triton.jit(do_not_specialize=["t"], do_not_specialize_on_alignment=FORWARD_POINTERS)
def _forward_kernel(
    gates_x,  # [B, 4H] fp32
    gates_h,  # [B, 4H] fp32
    c_prev,  # [B, H] fp32
    h_prev,  # [B, H], or None where h is
    lengths,  # [B] int64, or None
    gates,  # out [B, 4H], or None
    c,  # out [B, H] fp32
    y,  # out [B, H]
    h,  # out [B, H], or None
    t,
    H,
    gates_x_stride,
    gates_h_stride,
    c_prev_stride,
    h_prev_stride,
    gates_stride,
    c_stride,
    y_stride,
    h_stride,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = unit < H
    x_row = _at(gates_x, row, gates_x_stride, unit, ALIGNED)
    h_row = _at(gates_h, row, gates_h_stride, unit, ALIGNED)
    i = sigmoid(tl.load(x_row, inside) + tl.load(h_row, inside))
    f = sigmoid(tl.load(x_row + H, inside) + tl.load(h_row + H, inside))
    g = tanh(tl.load(x_row + 2 * H, inside) + tl.load(h_row + 2 * H, inside))
    o = sigmoid(tl.load(x_row + 3 * H, inside) + tl.load(h_row + 3 * H, inside))
    before = tl.load(_at(c_prev, row, c_prev_stride, unit, ALIGNED), inside)
    after = f * before + i * g
    state = o * tanh(after)
    valid = True
    if lengths is not None:
        valid = t < tl.load(lengths + row)
    tl.store(_at(c, row, c_stride, unit, ALIGNED), tl.where(valid, after, before), inside)
    tl.store(_at(y, row, y_stride, unit, ALIGNED), tl.where(valid, state, 0.0), inside)
    if h is not None:
        kept = tl.load(_at(h_prev, row, h_prev_stride, unit, ALIGNED), inside)
        tl.store(_at(h, row, h_stride, unit, ALIGNED), tl.where(valid, state, kept.to(tl.float32)), inside)
    if gates is not None:
        gates_row = _at(gates, row, gates_stride, unit, ALIGNED)
        tl.store(gates_row, tl.where(valid, i, 0.0), inside)
        tl.store(gates_row + H, tl.where(valid, f, 0.0), inside)
        tl.store(gates_row + 2 * H, tl.where(valid, g, 0.0), inside)
        tl.store(gates_row + 3 * H, tl.where(valid, o, 0.0), inside)


@triton.jit(do_not_specialize=["t"], do_not_specialize_on_alignment=BACKWARD_POINTERS)
def _backward_kernel(
    dh,  # [B, H] fp32
    dc,  # in and out [B, H] fp32
    gates,  # [B, 4H]
    c,  # [B, H] fp32
    c_prev,  # [B, H] fp32
    lengths,  # [B] int64, or None
    d_gates,  # out [B, 4H]
    t,
    H,
    dh_stride,
    dc_stride,
    gates_stride,
    c_stride,
    c_prev_stride,
    d_gates_stride,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = unit < H
    gates_row = _at(gates, row, gates_stride, unit, ALIGNED)
    i = tl.load(gates_row, inside).to(tl.float32)
    f = tl.load(gates_row + H, inside).to(tl.float32)
    g = tl.load(gates_row + 2 * H, inside).to(tl.float32)
    o = tl.load(gates_row + 3 * H, inside).to(tl.float32)
    before = tl.load(_at(c_prev, row, c_prev_stride, unit, ALIGNED), inside)
    tanh_c = tanh(tl.load(_at(c, row, c_stride, unit, ALIGNED), inside))
    dh_t = tl.load(_at(dh, row, dh_stride, unit, ALIGNED), inside)
    dc_next = tl.load(_at(dc, row, dc_stride, unit, ALIGNED), inside)
    dc_t = dc_next + dh_t * o * (1.0 - tanh_c * tanh_c)
    valid = True
    if lengths is not None:
        valid = t < tl.load(lengths + row)
    tl.store(_at(dc, row, dc_stride, unit, ALIGNED), tl.where(valid, dc_t * f, dc_next), inside)
    d_row = _at(d_gates, row, d_gates_stride, unit, ALIGNED)
    tl.store(d_row, tl.where(valid, dc_t * g * i * (1.0 - i), 0.0), inside)
    tl.store(d_row + H, tl.where(valid, dc_t * before * f * (1.0 - f), 0.0), inside)
    tl.store(d_row + 2 * H, tl.where(valid, dc_t * i * (1.0 - g * g), 0.0), inside)
    tl.store(d_row + 3 * H, tl.where(valid, dh_t * tanh_c * o * (1.0 - o), 0.0), inside)


def lstm_cell_forward(
    gates_x: Tensor,  # [B, 4H] fp32
    gates_h: Tensor,  # [B, 4H] fp32
    c_prev: Tensor,  # [B, H] fp32
    h_prev: Tensor | None,  # [B, H]; given where h is
    lengths: Tensor | None,  # int64 [B]
    t: int,
    gates: Tensor | None,  # out [B, 4H]
    c: Tensor,  # out [B, H] fp32
    y: Tensor,  # out [B, H]
    h: Tensor | None,  # out [B, H]
) -> None:
    """One step. Rows may be strided, elements of a row are contiguous.

    In invalid rows c is c_prev, h is h_prev, and y and gates are zero.
    """
    B, H = c.shape
    if c.numel() == 0:
        return
    tensors = (gates_x, gates_h, c_prev, h_prev, gates, c, y, h)
    _forward_kernel[B, triton.cdiv(H, BLOCK)](
        gates_x, gates_h, c_prev, h_prev, lengths, gates, c, y, h, t, H,
        *(0 if tensor is None else tensor.stride(0) for tensor in tensors),
        ALIGNED=_aligned(H, tensors), BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


def lstm_cell_backward(
    dh: Tensor,  # [B, H] fp32, the whole gradient of o * tanh(c)
    dc: Tensor,  # in and out [B, H] fp32, the gradient of c, then of c_prev
    gates: Tensor,  # [B, 4H]
    c: Tensor,  # [B, H] fp32
    c_prev: Tensor,  # [B, H] fp32
    lengths: Tensor | None,  # int64 [B]
    t: int,
    d_gates: Tensor,  # out [B, 4H]
) -> None:
    """The gradients of one step; in invalid rows dc stays and d_gates is zero."""
    B, H = c.shape
    if c.numel() == 0:
        return
    tensors = (dh, dc, gates, c, c_prev, d_gates)
    _backward_kernel[B, triton.cdiv(H, BLOCK)](
        dh, dc, gates, c, c_prev, lengths, d_gates, t, H,
        *(tensor.stride(0) for tensor in tensors),
        ALIGNED=_aligned(H, tensors), BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


def _aligned(H: int, tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether every row of every gate starts at a multiple of 16 bytes."""
    return all(
        tensor.data_ptr() % 16 == 0 and tensor.stride(0) * size % 16 == 0 and H * size % 16 == 0
        for tensor in tensors
        if tensor is not None
        for size in [tensor.element_size()]
    )


__all__ = ["lstm_cell_backward", "lstm_cell_forward"]
