"""Attention pooling with linear scores, forward and backward, each in one pass over x.

    s_t    = v . x_t,    p = softmax(s) over the kept steps,    pooled = sum_t p_t x_t

    dp_t   = x_t . d_pooled + d_weights_t
    ds_t   = p_t (dp_t - delta),    delta = sum_t p_t dp_t
    dx_t   = p_t d_pooled + ds_t v,    dv = sum_bt ds_t x_t

A program walks over one part of one row in tiles of BLOCK_T steps. In the forward pass every line of
the tile keeps an online softmax (m, l, acc) of its own, and the lines are merged once at the end: the
loop has no reduction over time. The backward pass sums dv the same way, per program, then by torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rnnattn.kernels.pool_parts import (
    alignment,
    combine,
    kept_steps,
    last_step,
    line_addresses,
    multiprocessors,
    part_outputs,
    split_time,
    store_part,
)

TILE = 8192  # elements of a tile of x: 32 registers for x and 32 for the sum, of 256 threads
PROGRAMS = 4  # per multiprocessor


def tile_config(D: int, T: int) -> dict[str, int]:
    """Tile and warps: whole rows of x, at most 64 of them."""
    block_d = triton.next_power_of_2(D)
    block_t = min(64, max(16, triton.next_power_of_2(T)), max(1, TILE // block_d))
    return {"D": D, "BLOCK_T": block_t, "BLOCK_D": block_d, "num_warps": 8 if block_t * block_d >= TILE else 4}


@triton.jit(do_not_specialize=["T", "steps"])
def _forward_kernel(
    x,  # [B, T, D]
    v,  # [D]
    lengths,  # [B] int64, or None
    mask,  # [B, T] bool, or None
    scores,  # out [B, T] fp32 at kept steps, or None
    pooled,  # out [B, S, D] fp32
    lse,  # out [B, S] fp32
    T,
    steps,
    x_stride_b,
    x_stride_t,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = part * steps
    end = last_step(lengths, row, tl.minimum(begin + steps, T))
    d = tl.arange(0, BLOCK_D)
    in_d = d < D
    v_d = tl.load(v + d, in_d, 0.0).to(tl.float32)
    m = tl.full([BLOCK_T], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_T], tl.float32)
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for t0 in range(begin, end, BLOCK_T):
        t = (t0 + tl.arange(0, BLOCK_T)).to(tl.int64)
        keep = kept_steps(lengths, mask, row, t, end, T)
        x_lines = line_addresses(x + row * x_stride_b, x_stride_t, t, d, ALIGN)
        x_t = tl.load(x_lines, keep[:, None] & in_d[None, :], 0.0).to(tl.float32)
        s = tl.where(keep, tl.sum(x_t * v_d[None, :], 1), float("-inf"))
        if scores is not None:
            tl.store(scores + row * T + t, s, keep)
        m_new = tl.maximum(m, s)
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha, p = tl.exp(m - shift), tl.exp(s - shift)
        l = l * alpha + p
        acc = acc * alpha[:, None] + p[:, None] * x_t
        m = m_new
    m_all = tl.max(m, 0)
    alpha = tl.exp(m - tl.where(m_all == float("-inf"), 0.0, m_all))
    acc_all = tl.sum(acc * alpha[:, None], 0)
    store_part(pooled, lse, row * tl.num_programs(1) + part, d, in_d, D, m_all, tl.sum(l * alpha, 0), acc_all)


@triton.jit(do_not_specialize=["T", "steps"])
def _backward_kernel(
    d_pooled,  # [B, D]
    d_weights,  # [B, T], or None
    delta,  # [B] fp32
    lse,  # [B] fp32
    x,  # [B, T, D]
    v,  # [D]
    lengths,  # [B] int64, or None
    mask,  # [B, T] bool, or None
    dx,  # out [B, T, D] contiguous
    dv,  # out [B, S, D] fp32
    T,
    steps,
    x_stride_b,
    x_stride_t,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = part * steps
    end = tl.minimum(begin + steps, T)
    d = tl.arange(0, BLOCK_D)
    in_d = d < D
    v_d = tl.load(v + d, in_d, 0.0).to(tl.float32)
    d_pooled_d = tl.load(d_pooled + row * D + d, in_d, 0.0).to(tl.float32)
    row_lse, row_delta = tl.load(lse + row), tl.load(delta + row)
    dv_acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for t0 in range(begin, end, BLOCK_T):
        t = (t0 + tl.arange(0, BLOCK_T)).to(tl.int64)
        keep = kept_steps(lengths, mask, row, t, end, T)
        x_lines = line_addresses(x + row * x_stride_b, x_stride_t, t, d, ALIGN)
        x_t = tl.load(x_lines, keep[:, None] & in_d[None, :], 0.0).to(tl.float32)
        p = tl.where(keep, tl.exp(tl.sum(x_t * v_d[None, :], 1) - row_lse), 0.0)
        dp = tl.sum(x_t * d_pooled_d[None, :], 1)
        if d_weights is not None:
            dp += tl.where(p > 0.0, tl.load(d_weights + row * T + t, keep, 0.0).to(tl.float32), 0.0)
        ds = tl.where(keep, p * (dp - row_delta), 0.0)
        dx_t = tl.where(keep[:, None], p[:, None] * d_pooled_d[None, :] + ds[:, None] * v_d[None, :], 0.0)
        dx_lines = line_addresses(dx + row * T * D, D, t, d, ALIGN)
        tl.store(dx_lines, dx_t, (t < end)[:, None] & in_d[None, :])
        dv_acc += ds[:, None] * x_t
    part_row = row * tl.num_programs(1) + part
    tl.store(dv + part_row * D + d, tl.sum(dv_acc, 0), in_d)


def linear_pool_forward(
    x: Tensor,  # [B, T, D], any strides over B and T
    v: Tensor,  # [D]
    lengths: Tensor | None,  # int64 [B]
    mask: Tensor | None,  # bool [B, T], True = keep
    scores: Tensor | None,  # out fp32 [B, T], written at kept steps
) -> tuple[Tensor, Tensor]:
    """pooled [B, D] and lse [B], fp32; B, T and D are at least 1."""
    B, T, D = x.shape
    config = tile_config(D, T)
    S, steps = split_time(B, T, config["BLOCK_T"], PROGRAMS * multiprocessors(x.device))
    pooled, lse = part_outputs(x, S)
    _forward_kernel[B, S](
        x, v, lengths, mask, scores, pooled, lse, T, steps, x.stride(0), x.stride(1), ALIGN=alignment(x), **config
    )
    pooled, lse = combine(pooled, lse)
    return pooled, lse


def linear_pool_backward(
    d_pooled: Tensor,  # [B, D]
    d_weights: Tensor | None,  # [B, T]
    delta: Tensor,  # fp32 [B], sum_t p_t dp_t
    lse: Tensor,  # fp32 [B]
    x: Tensor,  # [B, T, D], any strides over B and T
    v: Tensor,  # [D]
    lengths: Tensor | None,  # int64 [B]
    mask: Tensor | None,  # bool [B, T]
) -> tuple[Tensor, Tensor]:
    """dx [B, T, D] and dv [D], in the dtypes of x and v; dx is zero at steps that are not kept."""
    B, T, D = x.shape
    config = tile_config(D, T)
    S, steps = split_time(B, T, config["BLOCK_T"], PROGRAMS * multiprocessors(x.device))
    dx, dv = x.new_empty(B, T, D), x.new_empty(B, S, D, dtype=torch.float32)
    _backward_kernel[B, S](
        d_pooled, d_weights, delta, lse, x, v, lengths, mask, dx, dv,
        T, steps, x.stride(0), x.stride(1), ALIGN=alignment(x), **config,
    )  # fmt: skip
    return dx, dv.sum((0, 1)).to(v.dtype)


__all__ = ["linear_pool_backward", "linear_pool_forward", "tile_config"]
