"""Attention pooling with additive scores: a fused forward pass, and the rows of the backward pass.

    s_t    = v . tanh(W x_t + b),    p = softmax(s) over the kept steps,    pooled = sum_t p_t x_t

    u_t    = tanh(W x_t + b)
    dp_t   = x_t . d_pooled + d_weights_t
    ds_t   = p_t (dp_t - delta),    delta = sum_t p_t dp_t
    du_t   = ds_t v (1 - u_t^2)                        (before the tanh)
    dv     = sum_bt ds_t u_t,    db = sum_bt du_t
    dx_t   = p_t d_pooled + W^T du_t,    dW = sum_bt du_t x_t^T

Forward: a program scores BLOCK_T steps of a row by products of tiles, A in blocks, so that u exists in
registers only, and pools the same steps while they are still in cache: x comes from memory once.
Backward: the products are GEMMs over a bounded chunk of N rows (b, t), which the caller runs; the kernel
here turns W x into du between them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rnnattn.kernels.math import dot, tanh_absolute
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

TILE = 8192  # elements of x in registers while pooling
FORWARD_PROGRAMS = 2  # per multiprocessor
BACKWARD_PROGRAMS = 512  # each leaves a line of partial sums; fixed, so that sums do not depend on the device


def dot_precision() -> str:
    """How fp32 products are computed: as torch's switch says."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def forward_config(dtype: torch.dtype, A: int, D: int, align: int) -> dict[str, int | str]:
    """Tiles and warps of the forward kernel, for x whose lines start at multiples of `align` bytes.

    The largest that compile for sm_80, sm_90 and sm_100 without spilled registers (8 bytes at some shapes).
    """
    precision = dot_precision() if dtype == torch.float32 else "ieee"
    tile = {"BLOCK_T": 64, "BLOCK_A": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 4}
    if dtype == torch.float32 and precision == "ieee":
        # 32 lines are too few for the tensor core of sm_100, where Triton 3.7 would compute fp32
        # products in TF32 whatever it is told (triton #10176).
        tile |= {"BLOCK_T": 32, "num_warps": 4, "num_stages": 2}
    elif dtype != torch.float32 and A > 64 and align >= 4:  # below 4 bytes x is not copied asynchronously
        tile["BLOCK_A"] = 128
    block_d = triton.next_power_of_2(D)
    rows = max(1, min(tile["BLOCK_T"], TILE // block_d))
    return {"D": D, "BLOCK_D": block_d, "ROWS": rows, "PRECISION": precision, **tile}


def backward_config(A: int, D: int) -> dict[str, int]:
    """Tiles and warps of the backward kernel: whole rows of x and of u."""
    block_a, block_d = triton.next_power_of_2(A), triton.next_power_of_2(D)
    return {
        "A": A,
        "D": D,
        "BLOCK_N": max(1, min(32, TILE // 2 // max(block_a, block_d))),
        "BLOCK_A": block_a,
        "BLOCK_D": block_d,
        "num_warps": 8,
    }


# A is never a constant: for sm_100 Triton 3.7 cannot compile a loop over A of a single turn.
@triton.jit(do_not_specialize=["T", "A", "steps"])
def _forward_kernel(
    x,  # [B, T, D]
    v,  # [A]
    w,  # [A, D] contiguous
    b,  # [A], or None
    lengths,  # [B] int64, or None
    mask,  # [B, T] bool, or None
    scores,  # out [B, T] fp32 at kept steps, or None
    pooled,  # out [B, S, D] fp32
    lse,  # out [B, S] fp32
    T,
    A,
    steps,
    x_stride_b,
    x_stride_t,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = part * steps
    end = last_step(lengths, row, tl.minimum(begin + steps, T))
    d = tl.arange(0, BLOCK_D)
    in_d = d < D
    x_row = x + row * x_stride_b
    m = tl.full([], float("-inf"), tl.float32)
    l = tl.zeros([], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for t0 in range(begin, end, BLOCK_T):
        t = (t0 + tl.arange(0, BLOCK_T)).to(tl.int64)
        keep = kept_steps(lengths, mask, row, t, end, T)
        s = tl.zeros([BLOCK_T], tl.float32)
        for a0 in range(0, A, BLOCK_A):
            a = a0 + tl.arange(0, BLOCK_A)
            in_a = a < A
            u = tl.zeros([BLOCK_T, BLOCK_A], tl.float32)
            for k0 in range(0, D, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                in_k = k < D
                x_lines = line_addresses(x_row, x_stride_t, t, k, ALIGN)
                x_k = tl.load(x_lines, keep[:, None] & in_k[None, :], 0.0)
                w_k = tl.load(w + a[None, :].to(tl.int64) * D + k[:, None], in_a[None, :] & in_k[:, None], 0.0)
                u = dot(x_k, w_k, u, PRECISION)
            if b is not None:
                u += tl.load(b + a, in_a, 0.0).to(tl.float32)[None, :]
            v_a = tl.load(v + a, in_a, 0.0).to(tl.float32)
            s += tl.sum(tanh_absolute(u) * v_a[None, :], 1)
        s = tl.where(keep, s, float("-inf"))
        if scores is not None:
            tl.store(scores + row * T + t, s, keep)
        m_new = tl.maximum(m, tl.max(s, 0))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha, p = tl.exp(m - shift), tl.exp(s - shift)
        l = l * alpha + tl.sum(p, 0)
        acc = acc * alpha
        for r0 in range(0, BLOCK_T, ROWS):
            r = r0 + tl.arange(0, ROWS)
            t_r = (t0 + r).to(tl.int64)
            keep_r = kept_steps(lengths, mask, row, t_r, end, T)
            x_lines = line_addresses(x_row, x_stride_t, t_r, d, ALIGN)
            x_r = tl.load(x_lines, keep_r[:, None] & in_d[None, :], 0.0).to(tl.float32)
            acc += tl.sum(tl.gather(p, r, 0)[:, None] * x_r, 0)
        m = m_new
    store_part(pooled, lse, row * tl.num_programs(1) + part, d, in_d, D, m, l, acc)


@triton.jit(do_not_specialize=["N", "steps"])
def _backward_kernel(
    wx,  # [N, A] fp32, W x
    x,  # [N, D]
    v,  # [A]
    b,  # [A], or None
    keep,  # [N] bool, or None
    d_pooled,  # [N / steps, D]
    d_weights,  # [N], or None
    delta,  # [N / steps] fp32
    lse,  # [N / steps] fp32
    du,  # out [N, A]
    p,  # out [N] fp32
    dv,  # out [programs, A] fp32
    db,  # out [programs, A] fp32
    N,
    steps,
    x_stride,
    A: tl.constexpr,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    a, d = tl.arange(0, BLOCK_A), tl.arange(0, BLOCK_D)
    in_a, in_d = a < A, d < D
    v_a = tl.load(v + a, in_a, 0.0).to(tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_A], tl.float32)
    db_acc = tl.zeros([BLOCK_N, BLOCK_A], tl.float32)
    for n0 in range(program * BLOCK_N, N, tl.num_programs(0) * BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        in_n = n < N
        read = in_n
        if keep is not None:
            read = tl.load(keep + n, in_n, 0) != 0
        row = n // steps
        u = tl.load(wx + n[:, None] * A + a[None, :], read[:, None] & in_a[None, :], 0.0)
        if b is not None:
            u += tl.load(b + a, in_a, 0.0).to(tl.float32)[None, :]
        u = tanh_absolute(u)
        s = tl.where(read, tl.sum(u * v_a[None, :], 1), float("-inf"))
        p_n = tl.exp(s - tl.load(lse + row, read, 0.0))
        x_lines = line_addresses(x, x_stride, n, d, ALIGN)
        x_n = tl.load(x_lines, read[:, None] & in_d[None, :], 0.0).to(tl.float32)
        d_pooled_n = tl.load(d_pooled + row[:, None] * D + d[None, :], read[:, None] & in_d[None, :], 0.0)
        dp = tl.sum(x_n * d_pooled_n.to(tl.float32), 1)
        if d_weights is not None:
            dp += tl.where(p_n > 0.0, tl.load(d_weights + n, read, 0.0).to(tl.float32), 0.0)
        ds = tl.where(read, p_n * (dp - tl.load(delta + row, read, 0.0)), 0.0)
        du_n = ds[:, None] * v_a[None, :] * (1.0 - u * u)
        tl.store(du + n[:, None] * A + a[None, :], du_n, in_n[:, None] & in_a[None, :])
        tl.store(p + n, p_n, in_n)
        dv_acc += ds[:, None] * u
        db_acc += du_n
    tl.store(dv + program * A + a, tl.sum(dv_acc, 0), in_a)
    tl.store(db + program * A + a, tl.sum(db_acc, 0), in_a)


def additive_pool_forward(
    x: Tensor,  # [B, T, D], any strides over B and T
    v: Tensor,  # [A]
    w: Tensor,  # [A, D] contiguous
    b: Tensor | None,  # [A]
    lengths: Tensor | None,  # int64 [B]
    mask: Tensor | None,  # bool [B, T], True = keep
    scores: Tensor | None,  # out fp32 [B, T], written at kept steps
) -> tuple[Tensor, Tensor]:
    """pooled [B, D] and lse [B], fp32; B, T, A and D are at least 1."""
    (B, T, D), A = x.shape, v.shape[0]
    align = alignment(x)
    config = forward_config(x.dtype, A, D, align)
    S, steps = split_time(B, T, int(config["BLOCK_T"]), FORWARD_PROGRAMS * multiprocessors(x.device))
    pooled, lse = part_outputs(x, S)
    _forward_kernel[B, S](
        x, v, w, b, lengths, mask, scores, pooled, lse,
        T, A, steps, x.stride(0), x.stride(1), ALIGN=align, **config,
    )  # fmt: skip
    pooled, lse = combine(pooled, lse)
    return pooled, lse


def additive_pool_backward(
    wx: Tensor,  # fp32 [N, A], W x; rows n = (b, t) with t running fastest
    x: Tensor,  # [N, D]
    v: Tensor,  # [A]
    b: Tensor | None,  # [A]
    keep: Tensor | None,  # bool [N]
    d_pooled: Tensor,  # [N / steps, D] contiguous
    d_weights: Tensor | None,  # [N]
    delta: Tensor,  # fp32 [N / steps], sum_t p_t dp_t
    lse: Tensor,  # fp32 [N / steps]
    steps: int,  # time steps of a batch row in this chunk
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """du [N, A] in x's dtype (zero where not kept), p [N], and this chunk's share of dv and db [A], in fp32."""
    (N, D), A = x.shape, v.shape[0]
    config = backward_config(A, D)
    programs = min(triton.cdiv(N, config["BLOCK_N"]), BACKWARD_PROGRAMS)
    du, p = x.new_empty(N, A), x.new_empty(N, dtype=torch.float32)
    dv, db = x.new_empty(2, programs, A, dtype=torch.float32)
    _backward_kernel[programs,](
        wx, x, v, b, keep, d_pooled, d_weights, delta, lse, du, p, dv, db,
        N, steps, x.stride(0), ALIGN=alignment(x), **config,
    )  # fmt: skip
    return du, p, dv.sum(0), db.sum(0)


__all__ = ["additive_pool_backward", "additive_pool_forward", "backward_config", "forward_config"]
