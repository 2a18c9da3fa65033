"""The pointwise part of a step of any recurrent cell.

With a = W_ih x_t + b_ih + b_hh (columns gates_x) and b = W_hh h_{t-1} (columns gates_h):

    LSTM      i, f, o = sigmoid(a + b), g = tanh(a + b)      columns i, f, g, o;  saved i, f, g, o
              c = f * c_prev + i * g,  h = o * tanh(c)
    GRU       r, z = sigmoid(a + b), q = b_n + bias_q        columns r, z, n;     saved r, z, n, q
              n = tanh(a_n + r * q),  h = (1 - z) * n + z * h_prev               (a_n without b_hn = bias_q)
    RNN_TANH  h = tanh(a + b)
    RNN_RELU  h = max(a + b, 0)

Row b is invalid at step t where t >= lengths[b]: it keeps its state, and what else stands in its inputs (NaN
too) is not used. Where resets[b], the step starts from other states: those given, or zeros; gates_reset is what
W_hh makes of them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rnnattn.kernels.math import sigmoid, tanh
from rnnattn.kernels.step_rows import BLOCK, WARPS, aligned, load, started_from, store, strides

# The pointers move with t. Whether all are aligned is asked once (ALIGNED), not of each by Triton,
# which would compile a variant per combination that occurs.
POINTERS = ["gates_x", "gates_h", "h_prev", "c_prev", "resets", "gates", "c", "y", "h"]


@triton.jit
def _hidden(
    gates_h, gates_h_stride, resets, gates_reset, gates_reset_stride, row, column, inside, ALIGNED: tl.constexpr
):  # fmt: skip
    """b of one gate."""
    b = load(gates_h, row, gates_h_stride, column, inside, ALIGNED)
    return started_from(b, resets, gates_reset, row, gates_reset_stride, column, inside, ALIGNED)


@triton.jit(do_not_specialize=["t"], do_not_specialize_on_alignment=POINTERS)
def _forward_kernel(
    gates_x,  # [B, GH] fp32
    gates_h,  # [B, GH] fp32
    bias_q,  # [H], or None
    h_prev,  # [B, H], or None
    c_prev,  # [B, H] fp32, or None
    lengths,  # [B] int64, or None
    resets,  # [B] bool, or None
    gates_reset,  # [B, GH] fp32, or None
    h_reset,  # [B, H], or None
    c_reset,  # [B, H] fp32, or None
    gates,  # out [B, SH], or None
    c,  # out [B, H] fp32, or None
    y,  # out [B, H]
    h,  # out [B, H], or None
    t,
    H,
    gates_x_stride,
    gates_h_stride,
    h_prev_stride,
    c_prev_stride,
    gates_reset_stride,
    h_reset_stride,
    c_reset_stride,
    gates_stride,
    c_stride,
    y_stride,
    h_stride,
    MODE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = unit < H
    valid = True
    if lengths is not None:
        valid = t < tl.load(lengths + row)
    a = load(gates_x, row, gates_x_stride, unit, inside, ALIGNED)
    b = _hidden(gates_h, gates_h_stride, resets, gates_reset, gates_reset_stride, row, unit, inside, ALIGNED)
    if MODE == "RNN_TANH":
        state = tanh(a + b)
    elif MODE == "RNN_RELU":
        state = tl.where(a + b < 0, 0.0, a + b)  # keeps NaN
    else:
        second, third = unit + H, unit + 2 * H
        a_1 = load(gates_x, row, gates_x_stride, second, inside, ALIGNED)
        b_1 = _hidden(gates_h, gates_h_stride, resets, gates_reset, gates_reset_stride, row, second, inside, ALIGNED)
        a_2 = load(gates_x, row, gates_x_stride, third, inside, ALIGNED)
        b_2 = _hidden(gates_h, gates_h_stride, resets, gates_reset, gates_reset_stride, row, third, inside, ALIGNED)
        s_0, s_1 = sigmoid(a + b), sigmoid(a_1 + b_1)  # i, f or r, z
        if MODE == "LSTM":
            fourth = unit + 3 * H
            a_3 = load(gates_x, row, gates_x_stride, fourth, inside, ALIGNED)
            b_3 = _hidden(
                gates_h, gates_h_stride, resets, gates_reset, gates_reset_stride, row, fourth, inside, ALIGNED
            )  # fmt: skip
            s_2, s_3 = tanh(a_2 + b_2), sigmoid(a_3 + b_3)  # g, o
            before = load(c_prev, row, c_prev_stride, unit, inside, ALIGNED)
            started = started_from(before, resets, c_reset, row, c_reset_stride, unit, inside, ALIGNED)
            after = s_1 * started + s_0 * s_2
            state = s_3 * tanh(after)
            store(c, row, c_stride, unit, tl.where(valid, after, before), inside, ALIGNED)
        else:
            s_3 = b_2  # q
            if bias_q is not None:
                s_3 += tl.load(bias_q + unit, inside).to(tl.float32)
            s_2 = tanh(a_2 + s_0 * s_3)  # n
            before = load(h_prev, row, h_prev_stride, unit, inside, ALIGNED)
            started = started_from(before, resets, h_reset, row, h_reset_stride, unit, inside, ALIGNED)
            state = (1.0 - s_1) * s_2 + s_1 * started
        if gates is not None:
            store(gates, row, gates_stride, unit, tl.where(valid, s_0, 0.0), inside, ALIGNED)
            store(gates, row, gates_stride, second, tl.where(valid, s_1, 0.0), inside, ALIGNED)
            store(gates, row, gates_stride, third, tl.where(valid, s_2, 0.0), inside, ALIGNED)
            store(gates, row, gates_stride, unit + 3 * H, tl.where(valid, s_3, 0.0), inside, ALIGNED)
    store(y, row, y_stride, unit, tl.where(valid, state, 0.0), inside, ALIGNED)
    if h is not None:
        kept = load(h_prev, row, h_prev_stride, unit, inside, ALIGNED)
        store(h, row, h_stride, unit, tl.where(valid, state, kept), inside, ALIGNED)


def step_forward(
    mode: str,
    gates_x: Tensor,  # [B, GH] fp32
    gates_h: Tensor,  # [B, GH] fp32
    bias_q: Tensor | None,  # [H], GRU with biases
    h_prev: Tensor | None,  # [B, H], GRU, and where h is
    c_prev: Tensor | None,  # [B, H] fp32, LSTM
    lengths: Tensor | None,  # int64 [B]
    t: int,
    resets: Tensor | None,  # bool [B]
    gates_reset: Tensor | None,  # [B, GH] fp32
    h_reset: Tensor | None,  # [B, H]
    c_reset: Tensor | None,  # [B, H] fp32
    gates: Tensor | None,  # out [B, SH]
    c: Tensor | None,  # out [B, H] fp32, LSTM
    y: Tensor,  # out [B, H]
    h: Tensor | None,  # out [B, H]
) -> None:
    """One step. Rows may be strided, elements of a row are contiguous.

    In invalid rows c is c_prev, h is h_prev, and y and gates are zero.
    """
    B, H = y.shape
    if y.numel() == 0:
        return
    tensors = (gates_x, gates_h, h_prev, c_prev, gates_reset, h_reset, c_reset, gates, c, y, h)
    _forward_kernel[B, triton.cdiv(H, BLOCK)](
        gates_x, gates_h, bias_q, h_prev, c_prev, lengths, resets, gates_reset, h_reset, c_reset, gates, c, y, h,
        t, H, *strides(tensors),
        MODE=mode, ALIGNED=aligned(H, tensors), BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


__all__ = ["step_forward"]
