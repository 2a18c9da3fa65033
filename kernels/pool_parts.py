"""What the pooling kernels share: which steps count, and how the parts of a row become one.

When a batch has too few rows to fill the machine, each row of x is split over time into S parts. A
part's pooled vector is normalised over the part and comes with the part's lse, so that a part looks
like a whole row, and

    lse    = log sum_s exp(lse_s)
    pooled = sum_s exp(lse_s - lse) pooled_s
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

COMBINE_BLOCK = 256  # features per program of the combining kernel


@triton.jit
def kept_steps(lengths, mask, row, t, end, T):
    """Whether step t of a row counts; t < end <= T. The others must not be read: they may hold NaN."""
    keep = t < end
    if lengths is not None:
        keep = keep & (t < tl.load(lengths + row))
    if mask is not None:
        keep = tl.load(mask + row * T + t, keep, 0) != 0
    return keep


@triton.jit
def last_step(lengths, row, end):
    """Where a loop over a row's kept steps may stop."""
    if lengths is not None:
        end = tl.minimum(end, tl.load(lengths + row)).to(tl.int32)
    return end


@triton.jit
def line_addresses(x, stride, n, d, ALIGN: tl.constexpr):
    """[lines, columns] addresses of x[n, d]; every line starts at a multiple of ALIGN bytes."""
    return tl.multiple_of(x + n[:, None] * stride + d[None, :], [1, ALIGN])


@triton.jit
def store_part(pooled, lse, part, d, in_d, D, m, l, acc):
    """Writes sum_t exp(s_t - m) x_t = acc and sum_t exp(s_t - m) = l as a normalised part."""
    empty = l == 0.0
    l = tl.where(empty, 1.0, l)
    tl.store(lse + part, tl.where(empty, float("-inf"), m + tl.log(l)))
    tl.store(pooled + part * D + d, acc / l, in_d)


@triton.jit(do_not_specialize=["S"])
def _combine_kernel(
    pooled_parts,  # [B, S, D] fp32
    lse_parts,  # [B, S] fp32
    pooled,  # out [B, D]
    lse,  # out [B] fp32
    S,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_d = d < D
    m = tl.full([], float("-inf"), tl.float32)
    for s in range(S):
        m = tl.maximum(m, tl.load(lse_parts + row * S + s))
    m = tl.where(m == float("-inf"), 0.0, m)
    l = tl.zeros([], tl.float32)
    acc = tl.zeros([BLOCK], tl.float32)
    for s in range(S):
        p = tl.exp(tl.load(lse_parts + row * S + s) - m)
        l += p
        acc += p * tl.load(pooled_parts + (row * S + s) * D + d, in_d, 0.0)
    store_part(pooled, lse, row, d, in_d, D, m, l, acc)


def multiprocessors(device: torch.device) -> int:
    """How many programs run at once, roughly; on a CPU (the interpreter) few, so that splitting happens."""
    if device.type == "cpu":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def split_time(B: int, T: int, block: int, programs: int) -> tuple[int, int]:
    """Parts S per row and steps per part (a multiple of block), for about `programs` programs."""
    blocks = triton.cdiv(T, block)
    per_part = triton.cdiv(blocks, max(1, min(blocks, programs // B)))
    return triton.cdiv(blocks, per_part), per_part * block


def alignment(x: Tensor) -> int:
    """The power of two, at most 16, of which every line of x starts at a multiple, in bytes."""
    size = x.element_size()
    return math.gcd(16, x.data_ptr(), x.shape[-1] * size, *(stride * size for stride in x.stride()[:-1]))


def part_outputs(x: Tensor, S: int) -> tuple[Tensor, Tensor]:
    """pooled [B, S, D] and lse [B, S], fp32, for a kernel to fill; final, [B, D] and [B], if S is 1."""
    B, _, D = x.shape
    shape = (B,) if S == 1 else (B, S)
    return x.new_empty(*shape, D, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)


def combine(pooled_parts: Tensor, lse_parts: Tensor) -> tuple[Tensor, Tensor]:
    """pooled [B, D] and lse [B] from what `part_outputs` made."""
    if pooled_parts.dim() == 2:
        return pooled_parts, lse_parts
    B, S, D = pooled_parts.shape
    pooled, lse = pooled_parts.new_empty(B, D), lse_parts.new_empty(B)
    _combine_kernel[B, triton.cdiv(D, COMBINE_BLOCK)](
        pooled_parts, lse_parts, pooled, lse, S, D=D, BLOCK=COMBINE_BLOCK, num_warps=4
    )
    return pooled, lse


__all__ = [
    "alignment",
    "combine",
    "kept_steps",
    "last_step",
    "line_addresses",
    "multiprocessors",
    "part_outputs",
    "split_time",
    "store_part",
]
