"""Softmax attention pooling over a sequence, forward and backward, in plain PyTorch.

    s_t    = v . x_t                        ("linear")
    s_t    = v . tanh(W x_t + b)            ("additive")
    p      = softmax(s) over the kept steps
    pooled = sum_t p_t x_t,    lse = log sum_t exp(s_t)

Sources: additive scores after Bahdanau et al. 2015, pooling after Yang et al. 2016; the
gradients follow from dp_t = x_t . d_pooled + dp_t(direct) and ds_t = p_t (dp_t - sum_u p_u dp_u).

Step t of row b is kept where t < lengths[b], or where mask[b, t]. Other steps are not read. A row
that keeps nothing gives zeros (lse = -inf) and passes no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rnnattn.reference.layout import accumulation_dtype


def attention_pool_forward(
    x: Tensor,
    v: Tensor,
    w: Tensor | None,
    b: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pools each row of x; differentiable by autograd.

    Args:
        x: [B, T, D].
        v: [D] for linear scores (w is None), else [A].
        w, b: [A, D] and [A] for additive scores (b may be None).
        lengths: integers [B], or None. mask: bool [B, T], True = keep, or None. Not both.

    Returns:
        pooled [B, D] and lse [B] in the accumulation type (the backward's sum_t p_t dp_t is a difference
        that a rounded pooled would spoil), weights p [B, T] in x's dtype.
    """
    keep = kept_steps(x, lengths, mask)
    acc = accumulation_dtype(x.dtype)
    x_acc = x.to(acc) if keep is None else torch.where(keep[..., None], x, 0).to(acc)
    scores, _ = _scores(x_acc, v, w, b)
    if keep is not None:
        scores = scores.masked_fill(~keep, float("-inf"))
    if x.shape[1] == 0:
        return x_acc.sum(1), scores.to(x.dtype), scores.new_full(x.shape[:1], -torch.inf)
    lse = scores.logsumexp(1)
    p = _weights(scores, lse)
    pooled = (p[:, None, :] @ x_acc)[:, 0]
    return pooled, p.to(x.dtype), lse


def attention_pool_backward(
    d_pooled: Tensor | None,
    d_weights: Tensor | None,
    x: Tensor,
    v: Tensor,
    w: Tensor | None,
    b: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    pooled: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of `attention_pool_forward` by the explicit equations.

    Args:
        d_pooled, d_weights: cotangents of pooled and of the weights, or None for zero.
        pooled, lse: what the forward returned; the rest as given to it.

    Returns:
        dx, dv, dw, db, shaped as the inputs (None where the input is None).
    """
    keep = kept_steps(x, lengths, mask)
    acc = accumulation_dtype(x.dtype)
    x_acc = x.to(acc) if keep is None else torch.where(keep[..., None], x, 0).to(acc)
    scores, u = _scores(x_acc, v, w, b)
    if keep is not None:
        scores = scores.masked_fill(~keep, float("-inf"))
    p = _weights(scores, lse)
    dp = torch.zeros_like(p)
    dx = torch.zeros_like(x_acc)
    if d_pooled is not None:
        g = torch.where(torch.isinf(lse)[:, None], 0, d_pooled.to(acc))  # rows that keep nothing pass no gradient
        dp = dp + (x_acc @ g[..., None])[..., 0]
        dx = p[..., None] * g[:, None, :]
    if d_weights is not None:
        dp = dp + torch.where(p > 0, d_weights.to(acc), 0)
    ds = p * (dp - (p * dp).sum(1, keepdim=True))
    if u is None or w is None:
        dx = dx + ds[..., None] * v.to(acc)
        dv = (ds[..., None] * x_acc).sum((0, 1))
        return dx.to(x.dtype), dv.to(v.dtype), None, None
    dv = (ds[..., None] * u).sum((0, 1))
    du = ds[..., None] * v.to(acc) * (1 - u * u)  # [B, T, A], before the tanh
    dx = dx + du @ w.to(acc)
    dw = du.flatten(0, 1).t() @ x_acc.flatten(0, 1)
    db = None if b is None else du.sum((0, 1)).to(b.dtype)
    return dx.to(x.dtype), dv.to(v.dtype), dw.to(w.dtype), db


def kept_steps(x: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """bool [B, T], or None where every step is kept."""
    if lengths is None:
        return mask
    return torch.arange(x.shape[1], device=x.device)[None, :] < lengths[:, None]


def _scores(x: Tensor, v: Tensor, w: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Scores [B, T] and, for additive ones, u = tanh(W x + b) [B, T, A]."""
    if w is None:
        return x @ v.to(x.dtype), None
    u = x @ w.to(x.dtype).t()
    u = torch.tanh(u if b is None else u + b.to(x.dtype))
    return u @ v.to(x.dtype), u


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse), zero in rows that keep nothing (where it would be exp(-inf + inf))."""
    empty = torch.isinf(lse)[:, None]
    return torch.where(empty, 0, (scores - torch.where(empty, 0, lse[:, None])).exp())
