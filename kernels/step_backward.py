"""The backward of `step_forward`: from the gradients dh of h and dc of c those of a, b and the states before.

    LSTM      dc += dh * o * (1 - tanh(c)^2)
              da = dc g i (1 - i), dc c_prev f (1 - f), dc i (1 - g^2), dh tanh(c) o (1 - o);  dc_prev = dc * f
    GRU       d_n = dh (1 - z) (1 - n^2)
              da = d_n q r (1 - r), dh (h_prev - n) z (1 - z), d_n
              db = da_r, da_z, d_n r;  dh_prev = W_hh^T db + dh * z
    RNN_TANH  da = dh (1 - h^2)
    RNN_RELU  da = dh where h > 0

For LSTM and RNN db is da and dh_prev = W_hh^T da. An invalid row carries dh and dc on and gives
zeros in da and db; its dy is not read. Where resets_after[b], the step after did not start from this one's states.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rnnattn.kernels.math import tanh
from rnnattn.kernels.step_rows import BLOCK, WARPS, aligned, kept_from, load, started_from, store, strides

# As in step_forward.
POINTERS = ["dy", "product", "gates", "y", "h_prev", "c", "c_prev", "resets", "resets_after", "da", "db"]


@triton.jit(do_not_specialize=["t"], do_not_specialize_on_alignment=POINTERS)
def _backward_kernel(
    dy,  # [B, H], or None
    product,  # [B, H] fp32, or None
    dh,  # in and out [B, H] fp32, or None
    dc,  # in and out [B, H] fp32, or None
    gates,  # [B, SH], or None
    y,  # [B, H], or None
    h_prev,  # [B, H], or None
    c,  # [B, H] fp32, or None
    c_prev,  # [B, H] fp32, or None
    lengths,  # [B] int64, or None
    resets,  # [B] bool, or None
    resets_after,  # [B] bool, or None
    c_reset,  # [B, H] fp32, or None
    dh_reset,  # in and out [B, H] fp32, or None
    dc_reset,  # in and out [B, H] fp32, or None
    da,  # out [B, GH]
    db,  # out [B, GH], or None
    t,
    H,
    dy_stride,
    product_stride,
    dh_stride,
    dc_stride,
    gates_stride,
    y_stride,
    h_prev_stride,
    c_stride,
    c_prev_stride,
    c_reset_stride,
    dh_reset_stride,
    dc_reset_stride,
    da_stride,
    db_stride,
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
    carried = tl.zeros([BLOCK], tl.float32)
    if product is not None:
        carried += load(product, row, product_stride, unit, inside, ALIGNED)
    if dh is not None:
        carried += load(dh, row, dh_stride, unit, inside, ALIGNED)
    carried = kept_from(carried, resets_after, dh_reset, row, dh_reset_stride, unit, inside, ALIGNED)
    dh_t = carried
    if dy is not None:
        dh_t += load(dy, row, dy_stride, unit, inside, ALIGNED)
    around = tl.zeros([BLOCK], tl.float32)  # of dh_{t-1}, what does not pass through the hidden product
    if MODE == "RNN_TANH":
        state = load(y, row, y_stride, unit, inside, ALIGNED)
        d_0 = dh_t * (1.0 - state * state)
    elif MODE == "RNN_RELU":
        state = load(y, row, y_stride, unit, inside, ALIGNED)
        d_0 = tl.where(state > 0, dh_t, 0.0)
    else:
        s_0 = load(gates, row, gates_stride, unit, inside, ALIGNED)
        s_1 = load(gates, row, gates_stride, unit + H, inside, ALIGNED)
        s_2 = load(gates, row, gates_stride, unit + 2 * H, inside, ALIGNED)
        s_3 = load(gates, row, gates_stride, unit + 3 * H, inside, ALIGNED)
        if MODE == "LSTM":
            before = load(c_prev, row, c_prev_stride, unit, inside, ALIGNED)
            before = started_from(before, resets, c_reset, row, c_reset_stride, unit, inside, ALIGNED)
            tanh_c = tanh(load(c, row, c_stride, unit, inside, ALIGNED))
            dc_next = load(dc, row, dc_stride, unit, inside, ALIGNED)
            dc_next = kept_from(dc_next, resets_after, dc_reset, row, dc_reset_stride, unit, inside, ALIGNED)
            dc_t = dc_next + dh_t * s_3 * (1.0 - tanh_c * tanh_c)
            store(dc, row, dc_stride, unit, tl.where(valid, dc_t * s_1, dc_next), inside, ALIGNED)
            d_0 = dc_t * s_2 * s_0 * (1.0 - s_0)
            d_1 = dc_t * before * s_1 * (1.0 - s_1)
            d_2 = dc_t * s_0 * (1.0 - s_2 * s_2)
            d_3 = dh_t * tanh_c * s_3 * (1.0 - s_3)
            store(da, row, da_stride, unit + 3 * H, tl.where(valid, d_3, 0.0), inside, ALIGNED)
        else:
            before = load(h_prev, row, h_prev_stride, unit, inside, ALIGNED)
            d_2 = dh_t * (1.0 - s_1) * (1.0 - s_2 * s_2)
            d_0 = d_2 * s_3 * s_0 * (1.0 - s_0)
            d_1 = dh_t * (before - s_2) * s_1 * (1.0 - s_1)
            around = dh_t * s_1
            store(db, row, db_stride, unit, tl.where(valid, d_0, 0.0), inside, ALIGNED)
            store(db, row, db_stride, unit + H, tl.where(valid, d_1, 0.0), inside, ALIGNED)
            store(db, row, db_stride, unit + 2 * H, tl.where(valid, d_2 * s_0, 0.0), inside, ALIGNED)
        store(da, row, da_stride, unit + H, tl.where(valid, d_1, 0.0), inside, ALIGNED)
        store(da, row, da_stride, unit + 2 * H, tl.where(valid, d_2, 0.0), inside, ALIGNED)
    store(da, row, da_stride, unit, tl.where(valid, d_0, 0.0), inside, ALIGNED)
    if dh is not None:
        store(dh, row, dh_stride, unit, tl.where(valid, around, carried), inside, ALIGNED)


def step_backward(
    mode: str,
    dy: Tensor | None,  # [B, H], the gradient of y
    product: Tensor | None,  # [B, H] fp32, what the step after passes through the hidden product
    dh: Tensor | None,  # in and out [B, H] fp32, and around it; given with lengths and for GRU
    dc: Tensor | None,  # in and out [B, H] fp32, the gradient of c, then of c_prev; LSTM
    gates: Tensor | None,  # [B, SH]
    y: Tensor | None,  # [B, H], RNN
    h_prev: Tensor | None,  # [B, H], what the step started from; GRU
    c: Tensor | None,  # [B, H] fp32, LSTM
    c_prev: Tensor | None,  # [B, H] fp32, LSTM
    lengths: Tensor | None,  # int64 [B]
    t: int,
    resets: Tensor | None,  # bool [B], of this step
    resets_after: Tensor | None,  # bool [B], of the step after
    c_reset: Tensor | None,  # [B, H] fp32
    dh_reset: Tensor | None,  # in and out [B, H] fp32, sums of the gradients of replaced states
    dc_reset: Tensor | None,  # in and out [B, H] fp32
    da: Tensor,  # out [B, GH]
    db: Tensor | None,  # out [B, GH], GRU
) -> None:
    """The gradients of one step; in invalid rows dh and dc carry on what came and da and db are zero."""
    B, H = da.shape[0], da.shape[1] // {"LSTM": 4, "GRU": 3}.get(mode, 1)
    if da.numel() == 0:
        return
    tensors = (dy, product, dh, dc, gates, y, h_prev, c, c_prev, c_reset, dh_reset, dc_reset, da, db)
    _backward_kernel[B, triton.cdiv(H, BLOCK)](
        dy, product, dh, dc, gates, y, h_prev, c, c_prev, lengths, resets, resets_after, c_reset, dh_reset, dc_reset,
        da, db, t, H, *strides(tensors),
        MODE=mode, ALIGNED=aligned(H, tensors), BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


__all__ = ["step_backward"]
