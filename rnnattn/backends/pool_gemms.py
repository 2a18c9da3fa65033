"""The backward of attention pooling around a backend's kernels: per-row terms and, for additive
scores, the GEMMs, over chunks of steps so that nothing of size [B, T, A] exists.

Equations: `rnnattn.reference.attention_pool`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from rnnattn.backends.products import matmul, wide

CHUNK = 2**23  # elements of a workspace


class AdditiveKernel(Protocol):
    """The part between the GEMMs, for the N = rows * T steps of a chunk; all tensors are contiguous."""

    def __call__(
        self,
        product: Tensor,  # fp32 [N, A], W x_t
        x: Tensor,  # [N, D]
        v: Tensor,  # [A]
        b: Tensor | None,  # [A]
        keep: Tensor | None,  # bool [N]
        d_pooled: Tensor,  # fp32 [rows, D]
        d_weights: Tensor | None,  # fp32 [N]
        delta: Tensor,  # fp32 [rows]
        lse: Tensor,  # fp32 [rows]
        T: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """du [N, A] in x's dtype, p fp32 [N], dv and db fp32 [A]; du and p are zero where not kept."""


def dense_rows(x):  # type: ignore[no-untyped-def]
    """x (or None) with a contiguous last dimension, which is all that the kernels ask of it."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def row_cotangent(d_pooled: Tensor | None, pooled: Tensor, lse: Tensor) -> Tensor:
    """d_pooled fp32 [B, D], zero in rows that keep nothing: they pass no gradient, whatever stands there."""
    if d_pooled is None:
        return torch.zeros_like(pooled)
    return d_pooled.float().masked_fill(torch.isinf(lse)[:, None], 0).contiguous()


def softmax_weights(scores: Tensor, lse: Tensor) -> Tensor:
    """p = exp(scores - lse) [B, T]; scores are -inf where not kept, lse where a row keeps nothing."""
    return torch.where(torch.isinf(scores), 0, (scores - lse[:, None]).exp())


def row_delta(d_pooled: Tensor, pooled: Tensor, d_weights: Tensor | None, p: Tensor | None) -> Tensor:
    """sum_t p_t dp_t [B] fp32, where dp_t = x_t . d_pooled + d_weights_t and sum_t p_t x_t = pooled.

    Args:
        d_pooled, pooled: [B, D], d_pooled in fp32. d_weights: [B, T]; p: [B, T] fp32, given with it.
    """
    delta = (pooled * d_pooled).sum(1)
    if d_weights is None or p is None:
        return delta
    return delta + (p * torch.where(p > 0, d_weights, 0)).sum(1)


def additive_backward(
    kernel: AdditiveKernel,
    d_pooled: Tensor,  # fp32 [B, D]
    d_weights: Tensor | None,  # fp32 [B, T]
    delta: Tensor,  # fp32 [B]
    lse: Tensor,  # fp32 [B]
    x: Tensor,  # [B, T, D]
    v: Tensor,  # [A]
    w: Tensor,  # [A, D]
    b: Tensor | None,  # [A]
    keep: Tensor | None,  # bool [B, T]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dx, dv, dw, db."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dw = torch.zeros(w.shape, dtype=torch.float32, device=w.device)
    dv, db = (torch.zeros(v.shape, dtype=torch.float32, device=v.device) for _ in range(2))
    w_rows, w_columns = wide(w), wide(w.t())
    for rows, time in _chunks(x.shape[0], x.shape[1], max(1, CHUNK // max(w.shape))):
        x_c, keep_c = x[rows, time], None if keep is None else keep[rows, time]
        if keep_c is not None:
            x_c = torch.where(keep_c[..., None], x_c, 0)
        nb, nt, D = x_c.shape
        x_c = x_c.reshape(nb * nt, D).contiguous()
        du, p, dv_c, db_c = kernel(
            matmul(x_c, w_columns), x_c, v, b, None if keep_c is None else keep_c.reshape(nb * nt),
            d_pooled[rows], None if d_weights is None else d_weights[rows, time].reshape(nb * nt),
            delta[rows], lse[rows], nt,
        )  # fmt: skip
        dx_c = matmul(du, w_rows).view(nb, nt, D)
        dx[rows, time] = torch.addcmul(dx_c, p.view(nb, nt, 1), d_pooled[rows, None])
        dw += matmul(du.t(), x_c)
        dv += dv_c
        db += db_c
    return dx, dv.to(v.dtype), dw.to(w.dtype), None if b is None else db.to(b.dtype)


def _chunks(B: int, T: int, limit: int) -> Iterator[tuple[slice, slice]]:
    """Blocks (batch rows, time steps) of at most `limit` steps that cover [B, T]: whole rows, or parts of one."""
    if B == 0 or T == 0:
        return
    nt = min(T, limit)
    nb = min(B, limit // nt)
    for b0 in range(0, B, nb):
        for t0 in range(0, T, nt):
            yield slice(b0, b0 + nb), slice(t0, t0 + nt)
