"""One step of a regularised recurrent layer, forward, between the hidden products of two steps.

With p = W_hh (m * h_{t-1}) and N(v; g) = g * (v - mean(v)) / sqrt(var(v) + 1e-5) over a row, or v without g:

    b = N(p; g_hh) + b_hh                          h', c' = the cell's h_t, c_t of a_t and b (step_forward)
    h' = o * tanh(N(c'; g_c) + b_c)                LSTM with g_c
    h_t = k_h * h_{t-1} + (1 - k_h) * h'           c_t likewise; k from a mask, or its mean

A program has a row, for the norms need all of it. h and c are left as the next step takes them: kept in rows that have
ended, replaced in rows where an episode begins; operand = m * h is what the next product takes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rnnattn.kernels.math import sigmoid, tanh
from rnnattn.kernels.step_rows import load, started_from, store, strides

EPSILON = tl.constexpr(1e-5)


@triton.jit
def vector(pointer, column, inside):
    """A parameter's elements, zero outside."""
    return tl.load(pointer + column, inside, other=0.0).to(tl.float32)


@triton.jit
def share_kept(keep, row, stride, unit, inside, zoneout):
    """The k of zoneout."""
    if keep is not None:
        return tl.load(keep + row * stride + unit, inside, other=0).to(tl.float32)
    return tl.zeros_like(unit).to(tl.float32) + zoneout


@triton.jit
def zoned(keep, k, before, fresh):
    """k before + (1 - k) fresh; by a mask one of the two as it is."""
    return tl.where(k != 0, before, fresh) if keep is not None else k * before + (1.0 - k) * fresh


@triton.jit
def moments(total, v_0, v_1, v_2, v_3, inside, BLOCKS: tl.constexpr):
    """Mean and one over the standard deviation of the first BLOCKS vectors, of `total` numbers, zero outside."""
    sums = v_0
    if BLOCKS > 1:
        sums += v_1 + v_2
    if BLOCKS > 3:
        sums += v_3
    mean = tl.sum(sums, 0) / total
    squares = (v_0 - mean) * (v_0 - mean)
    if BLOCKS > 1:
        squares += (v_1 - mean) * (v_1 - mean) + (v_2 - mean) * (v_2 - mean)
    if BLOCKS > 3:
        squares += (v_3 - mean) * (v_3 - mean)
    variance = tl.sum(tl.where(inside, squares, 0.0), 0) / total
    return mean, 1.0 / tl.sqrt(variance + EPSILON)


@triton.jit
def _hidden(p, mean, rstd, gain, shift, hidden, row, stride, column, inside):
    """b of one block of the hidden product p, whose normalised values are stored."""
    b = p
    if gain is not None:
        normal = (p - mean) * rstd
        if hidden is not None:
            store(hidden, row, stride, column, normal, inside, False)
        b = normal * vector(gain, column, inside)
    if shift is not None:
        b += vector(shift, column, inside)
    return b


@triton.jit(do_not_specialize=["t"])
def _forward_kernel(
    a,  # [B, GH] fp32
    product,  # [B, GH] fp32
    b_hh,  # [GH], or None; so are all parameters and masks
    norm_hh,  # [GH]
    norm_c,  # [H]
    bias_c,  # [H]
    h_mask,  # [B, H] fp32
    keep_h,  # [B, H] bool
    keep_c,  # [B, H] bool
    lengths,  # [B] int64
    resets_next,  # [B] bool, of the step after
    h_reset,  # [B, H] fp32
    c_reset,  # [B, H] fp32
    h,  # in and out [B, H] fp32
    c,  # in and out [B, H] fp32, LSTM
    operand,  # out [B, H]
    y,  # out [B, H]
    cells,  # out [B, H] fp32, LSTM
    gates,  # out [B, SH], or None
    hidden,  # out [B, GH], or None
    rstd_out,  # out [B] fp32, or None
    zoneout_h,
    zoneout_c,
    t,
    H,
    a_stride,
    product_stride,
    mask_stride,
    keep_h_stride,
    keep_c_stride,
    h_reset_stride,
    c_reset_stride,
    h_stride,
    c_stride,
    operand_stride,
    y_stride,
    cells_stride,
    gates_stride,
    hidden_stride,
    MODE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    unit = tl.arange(0, BLOCK)
    inside = unit < H
    valid = True
    if lengths is not None:
        valid = t < tl.load(lengths + row)
    p_0 = tl.where(inside, load(product, row, product_stride, unit, inside, False), 0.0)
    p_1, p_2, p_3 = p_0, p_0, p_0
    if BLOCKS > 1:
        p_1 = tl.where(inside, load(product, row, product_stride, unit + H, inside, False), 0.0)
        p_2 = tl.where(inside, load(product, row, product_stride, unit + 2 * H, inside, False), 0.0)
    if BLOCKS > 3:
        p_3 = tl.where(inside, load(product, row, product_stride, unit + 3 * H, inside, False), 0.0)
    mean, rstd = 0.0, 1.0
    if norm_hh is not None:
        mean, rstd = moments(BLOCKS * H, p_0, p_1, p_2, p_3, inside, BLOCKS)
        if rstd_out is not None:
            tl.store(rstd_out + row, rstd)
    before = load(h, row, h_stride, unit, inside, False)
    b_0 = _hidden(p_0, mean, rstd, norm_hh, b_hh, hidden, row, hidden_stride, unit, inside)
    a_0 = load(a, row, a_stride, unit, inside, False)
    if MODE == "RNN_TANH":
        s_0 = tanh(a_0 + b_0)
        fresh = s_0
    elif MODE == "RNN_RELU":
        s_0 = tl.where(a_0 + b_0 < 0, 0.0, a_0 + b_0)  # keeps NaN
        fresh = s_0
    else:
        b_1 = _hidden(p_1, mean, rstd, norm_hh, b_hh, hidden, row, hidden_stride, unit + H, inside)
        b_2 = _hidden(p_2, mean, rstd, norm_hh, b_hh, hidden, row, hidden_stride, unit + 2 * H, inside)
        a_1 = load(a, row, a_stride, unit + H, inside, False)
        a_2 = load(a, row, a_stride, unit + 2 * H, inside, False)
        s_0, s_1 = sigmoid(a_0 + b_0), sigmoid(a_1 + b_1)  # i, f or r, z
        if MODE == "LSTM":
            b_3 = _hidden(p_3, mean, rstd, norm_hh, b_hh, hidden, row, hidden_stride, unit + 3 * H, inside)
            s_2 = tanh(a_2 + b_2)  # g
            s_3 = sigmoid(load(a, row, a_stride, unit + 3 * H, inside, False) + b_3)  # o
            c_before = load(c, row, c_stride, unit, inside, False)
            c_fresh = s_1 * c_before + s_0 * s_2
            inner = c_fresh
            if norm_c is not None:
                v = tl.where(inside, c_fresh, 0.0)
                c_mean, c_rstd = moments(H, v, v, v, v, inside, 1)
                inner = (c_fresh - c_mean) * c_rstd * vector(norm_c, unit, inside)
                if bias_c is not None:
                    inner += vector(bias_c, unit, inside)
            fresh = s_3 * tanh(inner)
            k_c = share_kept(keep_c, row, keep_c_stride, unit, inside, zoneout_c)
            c_t = zoned(keep_c, k_c, c_before, c_fresh)
            store(cells, row, cells_stride, unit, tl.where(valid, c_t, 0.0), inside, False)
            c_next = tl.where(valid, c_t, c_before)
            c_next = started_from(c_next, resets_next, c_reset, row, c_reset_stride, unit, inside, False)
            store(c, row, c_stride, unit, c_next, inside, False)
        else:
            s_3 = b_2  # q
            s_2 = tanh(a_2 + s_0 * s_3)  # n
            fresh = (1.0 - s_1) * s_2 + s_1 * before
        if gates is not None:
            store(gates, row, gates_stride, unit + H, s_1, inside, False)
            store(gates, row, gates_stride, unit + 2 * H, s_2, inside, False)
            store(gates, row, gates_stride, unit + 3 * H, s_3, inside, False)
    if gates is not None:
        store(gates, row, gates_stride, unit, s_0, inside, False)
    k_h = share_kept(keep_h, row, keep_h_stride, unit, inside, zoneout_h)
    h_t = zoned(keep_h, k_h, before, fresh)
    h_t = h_t.to(y.dtype.element_ty).to(tl.float32)
    store(y, row, y_stride, unit, tl.where(valid, h_t, 0.0), inside, False)
    h_next = tl.where(valid, h_t, before)
    h_next = started_from(h_next, resets_next, h_reset, row, h_reset_stride, unit, inside, False)
    store(h, row, h_stride, unit, h_next, inside, False)
    if h_mask is not None:
        h_next *= load(h_mask, row, mask_stride, unit, inside, False)
    store(operand, row, operand_stride, unit, h_next, inside, False)


def regularised_forward(
    mode: str,
    a: Tensor,  # [B, GH] fp32
    product: Tensor,  # [B, GH] fp32
    b_hh: Tensor | None,  # [GH]
    norm_hh: Tensor | None,  # [GH]
    norm_c: Tensor | None,  # [H], LSTM
    bias_c: Tensor | None,  # [H], LSTM
    h_mask: Tensor | None,  # [B, H] fp32
    keep_h: Tensor | None,  # [B, H] bool
    keep_c: Tensor | None,  # [B, H] bool
    zoneout_h: float,
    zoneout_c: float,
    lengths: Tensor | None,  # int64 [B]
    t: int,
    resets_next: Tensor | None,  # bool [B], of the step after
    h_reset: Tensor | None,  # [B, H] fp32, by default zero
    c_reset: Tensor | None,  # [B, H] fp32, by default zero
    h: Tensor,  # in and out [B, H] fp32
    c: Tensor | None,  # in and out [B, H] fp32, LSTM
    operand: Tensor,  # out [B, H]
    y: Tensor,  # out [B, H]
    cells: Tensor | None,  # out [B, H] fp32, LSTM
    gates: Tensor | None,  # out [B, SH]
    hidden: Tensor | None,  # out [B, GH]
    rstd: Tensor | None,  # out [B] fp32
) -> None:
    """One step. Rows may be strided, elements of a row and the parameters are contiguous; a step's masks are rows.

    In invalid rows y and cells are zero, and h and c stay; gates, hidden and rstd hold anything.
    """
    B, H = y.shape
    if y.numel() == 0:
        return
    rows = (a, product, h_mask, keep_h, keep_c, h_reset, c_reset, h, c, operand, y, cells, gates, hidden)
    BLOCK = triton.next_power_of_2(H)
    _forward_kernel[(B,)](
        a, product, b_hh, norm_hh, norm_c, bias_c, h_mask, keep_h, keep_c, lengths, resets_next, h_reset, c_reset, h, c,
        operand, y, cells, gates, hidden, rstd, zoneout_h, zoneout_c, t, H, *strides(rows),
        MODE=mode, BLOCKS={"LSTM": 4, "GRU": 3}.get(mode, 1), BLOCK=BLOCK, num_warps=min(max(BLOCK // 256, 1), 16),
    )  # fmt: skip


__all__ = ["moments", "regularised_forward", "share_kept", "vector"]
