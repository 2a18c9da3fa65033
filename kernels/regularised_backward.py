"""The backward of `regularised_forward`: from the gradients of a step's states those of a, b and the hidden product p.

    dh' = (1 - k_h) dh_t,  dh_{t-1} = k_h dh_t                        dc' and dc_{t-1} likewise
    ds = dh' o (1 - tanh(s)^2),  dc' += N^T(ds g_c)                   s = N(c'; g_c) + b_c, LSTM with g_c
    da, db: as in step_backward, of dh' and dc'
    dp = N^T(db g_hh)                                                 N^T(d) = rstd (d - mean(d) - x mean(d x))

x are the normalised values. dh_{t-1} gets m * W_hh^T dp besides: `product`, of the step after, is that without m.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rnnattn.kernels.math import tanh
from rnnattn.kernels.regularised_forward import moments, share_kept, vector
from rnnattn.kernels.step_rows import kept_from, load, store, strides


@triton.jit
def _add(sums, row, stride, unit, d, inside):
    if sums is not None:
        store(sums, row, stride, unit, load(sums, row, stride, unit, inside, False) + d, inside, False)


@triton.jit
def _gained(db, gain, column, inside):
    return tl.where(inside, db * vector(gain, column, inside), 0.0)


@triton.jit
def _normalised(hidden, row, stride, column, inside):
    return tl.where(inside, load(hidden, row, stride, column, inside, False), 0.0)


@triton.jit(do_not_specialize=["t"])
def _backward_kernel(
    dy,  # [B, H], or None
    dcells,  # [B, H] fp32, or None
    product,  # [B, H] fp32, or None
    dh,  # in and out [B, H] fp32
    dc,  # in and out [B, H] fp32, LSTM
    h_prev,  # [B, H], GRU
    c_prev,  # [B, H] fp32, LSTM
    gates,  # [B, SH]
    hidden,  # [B, GH], or None
    rstd,  # [B] fp32, or None
    norm_hh,  # [GH], or None; so are all parameters and masks
    norm_c,  # [H]
    bias_c,  # [H]
    h_mask,  # [B, H] fp32
    keep_h,  # [B, H] bool
    keep_c,  # [B, H] bool
    lengths,  # [B] int64
    resets_after,  # [B] bool, of the step after
    dh_reset,  # in and out [B, H] fp32, or None
    dc_reset,  # in and out [B, H] fp32, or None
    d_norm_c,  # in and out [B, H] fp32, or None
    d_bias_c,  # in and out [B, H] fp32, or None
    da,  # out [B, GH] fp32
    db,  # out [B, GH] fp32, GRU
    d_hidden,  # out [B, GH] fp32, or None
    zoneout_h,
    zoneout_c,
    t,
    H,
    dy_stride,
    dcells_stride,
    product_stride,
    dh_stride,
    dc_stride,
    h_prev_stride,
    c_prev_stride,
    gates_stride,
    hidden_stride,
    mask_stride,
    keep_h_stride,
    keep_c_stride,
    dh_reset_stride,
    dc_reset_stride,
    d_norm_c_stride,
    d_bias_c_stride,
    da_stride,
    db_stride,
    d_hidden_stride,
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
    carried = load(dh, row, dh_stride, unit, inside, False)
    if product is not None:
        through = load(product, row, product_stride, unit, inside, False)
        if h_mask is not None:
            through *= load(h_mask, row, mask_stride, unit, inside, False)
        carried += through
    carried = kept_from(carried, resets_after, dh_reset, row, dh_reset_stride, unit, inside, False)
    dh_t = carried
    if dy is not None:
        dh_t += load(dy, row, dy_stride, unit, inside, False)
    k_h = share_kept(keep_h, row, keep_h_stride, unit, inside, zoneout_h)
    d_fresh, dh_before = (1.0 - k_h) * dh_t, k_h * dh_t
    s_0 = load(gates, row, gates_stride, unit, inside, False)
    if MODE == "RNN_TANH":
        d_0 = d_fresh * (1.0 - s_0 * s_0)
    elif MODE == "RNN_RELU":
        d_0 = tl.where(s_0 > 0, d_fresh, 0.0)
    else:
        s_1 = load(gates, row, gates_stride, unit + H, inside, False)
        s_2 = load(gates, row, gates_stride, unit + 2 * H, inside, False)
        s_3 = load(gates, row, gates_stride, unit + 3 * H, inside, False)
        if MODE == "LSTM":
            dc_carried = load(dc, row, dc_stride, unit, inside, False)
            dc_carried = kept_from(dc_carried, resets_after, dc_reset, row, dc_reset_stride, unit, inside, False)
            dc_t = dc_carried
            if dcells is not None:
                dc_t += load(dcells, row, dcells_stride, unit, inside, False)
            k_c = share_kept(keep_c, row, keep_c_stride, unit, inside, zoneout_c)
            dc_fresh = (1.0 - k_c) * dc_t
            before = load(c_prev, row, c_prev_stride, unit, inside, False)
            c_fresh = s_1 * before + s_0 * s_2
            if norm_c is not None:
                v = tl.where(inside, c_fresh, 0.0)
                c_mean, c_rstd = moments(H, v, v, v, v, inside, 1)
                x, gain = tl.where(valid, (c_fresh - c_mean) * c_rstd, 0.0), vector(norm_c, unit, inside)
                s = x * gain
                if bias_c is not None:
                    s += vector(bias_c, unit, inside)
                tanh_c = tanh(s)
                ds = tl.where(valid, tl.where(inside, d_fresh * s_3 * (1.0 - tanh_c * tanh_c), 0.0), 0.0)
                _add(d_norm_c, row, d_norm_c_stride, unit, ds * x, inside)
                _add(d_bias_c, row, d_bias_c_stride, unit, ds, inside)
                d = ds * gain
                mean = tl.sum(d, 0) / H
                along = tl.sum(tl.where(inside, d * x, 0.0), 0) / H
                dc_fresh += c_rstd * (d - mean - x * along)
            else:
                tanh_c = tanh(c_fresh)
                dc_fresh += d_fresh * s_3 * (1.0 - tanh_c * tanh_c)
            dc_before = k_c * dc_t + dc_fresh * s_1
            store(dc, row, dc_stride, unit, tl.where(valid, dc_before, dc_carried), inside, False)
            d_0 = dc_fresh * s_2 * s_0 * (1.0 - s_0)
            d_1 = dc_fresh * before * s_1 * (1.0 - s_1)
            d_2 = dc_fresh * s_0 * (1.0 - s_2 * s_2)
            d_3 = d_fresh * tanh_c * s_3 * (1.0 - s_3)
            store(da, row, da_stride, unit + 3 * H, tl.where(valid, d_3, 0.0), inside, False)
        else:
            before = load(h_prev, row, h_prev_stride, unit, inside, False)
            d_2 = d_fresh * (1.0 - s_1) * (1.0 - s_2 * s_2)
            d_0 = d_2 * s_3 * s_0 * (1.0 - s_0)
            d_1 = d_fresh * (before - s_2) * s_1 * (1.0 - s_1)
            d_3 = d_2 * s_0  # of q
            dh_before += d_fresh * s_1
            store(db, row, db_stride, unit, tl.where(valid, d_0, 0.0), inside, False)
            store(db, row, db_stride, unit + H, tl.where(valid, d_1, 0.0), inside, False)
            store(db, row, db_stride, unit + 2 * H, tl.where(valid, d_3, 0.0), inside, False)
        store(da, row, da_stride, unit + H, tl.where(valid, d_1, 0.0), inside, False)
        store(da, row, da_stride, unit + 2 * H, tl.where(valid, d_2, 0.0), inside, False)
    store(da, row, da_stride, unit, tl.where(valid, d_0, 0.0), inside, False)
    store(dh, row, dh_stride, unit, tl.where(valid, dh_before, carried), inside, False)
    if norm_hh is not None:
        x_0 = _normalised(hidden, row, hidden_stride, unit, inside)
        d_0 = _gained(d_0, norm_hh, unit, inside)
        sums, products = d_0, d_0 * x_0
        if BLOCKS > 1:
            x_1 = _normalised(hidden, row, hidden_stride, unit + H, inside)
            x_2 = _normalised(hidden, row, hidden_stride, unit + 2 * H, inside)
            d_1 = _gained(d_1, norm_hh, unit + H, inside)
            d_2 = _gained(d_3 if MODE == "GRU" else d_2, norm_hh, unit + 2 * H, inside)
            sums += d_1 + d_2
            products += d_1 * x_1 + d_2 * x_2
        if BLOCKS > 3:
            x_3 = _normalised(hidden, row, hidden_stride, unit + 3 * H, inside)
            d_3 = _gained(d_3, norm_hh, unit + 3 * H, inside)
            sums += d_3
            products += d_3 * x_3
        mean, along = tl.sum(sums, 0) / (BLOCKS * H), tl.sum(products, 0) / (BLOCKS * H)
        r = tl.load(rstd + row)
        store(d_hidden, row, d_hidden_stride, unit, tl.where(valid, r * (d_0 - mean - x_0 * along), 0.0), inside, False)
        if BLOCKS > 1:
            e_1, e_2 = r * (d_1 - mean - x_1 * along), r * (d_2 - mean - x_2 * along)
            store(d_hidden, row, d_hidden_stride, unit + H, tl.where(valid, e_1, 0.0), inside, False)
            store(d_hidden, row, d_hidden_stride, unit + 2 * H, tl.where(valid, e_2, 0.0), inside, False)
        if BLOCKS > 3:
            e_3 = r * (d_3 - mean - x_3 * along)
            store(d_hidden, row, d_hidden_stride, unit + 3 * H, tl.where(valid, e_3, 0.0), inside, False)


def regularised_backward(
    mode: str,
    dy: Tensor | None,  # [B, H]
    dcells: Tensor | None,  # [B, H] fp32
    product: Tensor | None,  # [B, H] fp32, W_hh^T of the step after's d_hidden
    dh: Tensor,  # in and out [B, H] fp32
    dc: Tensor | None,  # in and out [B, H] fp32, LSTM
    h_prev: Tensor,  # [B, H], what the step started from
    c_prev: Tensor | None,  # [B, H] fp32, LSTM
    gates: Tensor,  # [B, SH]
    hidden: Tensor | None,  # [B, GH]
    rstd: Tensor | None,  # [B] fp32
    norm_hh: Tensor | None,  # [GH]
    norm_c: Tensor | None,  # [H]
    bias_c: Tensor | None,  # [H]
    h_mask: Tensor | None,  # [B, H] fp32
    keep_h: Tensor | None,  # [B, H] bool
    keep_c: Tensor | None,  # [B, H] bool
    zoneout_h: float,
    zoneout_c: float,
    lengths: Tensor | None,  # int64 [B]
    t: int,
    resets_after: Tensor | None,  # bool [B], of the step after
    dh_reset: Tensor | None,  # in and out [B, H] fp32, sums of the gradients of replaced states
    dc_reset: Tensor | None,  # in and out [B, H] fp32
    d_norm_c: Tensor | None,  # in and out [B, H] fp32, sums
    d_bias_c: Tensor | None,  # in and out [B, H] fp32, sums
    da: Tensor,  # out [B, GH] fp32
    db: Tensor | None,  # out [B, GH] fp32, GRU
    d_hidden: Tensor | None,  # out [B, GH] fp32, with norm_hh
) -> None:
    """The gradients of one step; in invalid rows dh and dc carry on what came and da, db and d_hidden are zero."""
    B, H = dh.shape
    if dh.numel() == 0:
        return
    rows = (
        dy, dcells, product, dh, dc, h_prev, c_prev, gates, hidden, h_mask, keep_h, keep_c, dh_reset, dc_reset,
        d_norm_c, d_bias_c, da, db, d_hidden,
    )  # fmt: skip
    BLOCK = triton.next_power_of_2(H)
    _backward_kernel[(B,)](
        dy, dcells, product, dh, dc, h_prev, c_prev, gates, hidden, rstd, norm_hh, norm_c, bias_c, h_mask, keep_h,
        keep_c, lengths, resets_after, dh_reset, dc_reset, d_norm_c, d_bias_c, da, db, d_hidden, zoneout_h, zoneout_c,
        t, H, *strides(rows),
        MODE=mode, BLOCKS={"LSTM": 4, "GRU": 3}.get(mode, 1), BLOCK=BLOCK, num_warps=min(max(BLOCK // 256, 1), 16),
    )  # fmt: skip


__all__ = ["regularised_backward"]
