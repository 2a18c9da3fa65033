"""Attention pooling: argument checks, choice of backend. `functional.attention_pool` says what the arguments mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rnnattn import autograd, backends
from rnnattn.autocast import autocast_dtype, lowered
from rnnattn.backends import Call
from rnnattn.checks import check_pool, checked_lengths, checked_mask
from rnnattn.transforms import is_traced, want_equations, wants_grad


def run_pool(
    input: Tensor,
    v: Tensor,
    w: Tensor | None,
    b: Tensor | None,
    lengths: Tensor | Sequence[int] | None,
    mask: Tensor | None,
    need_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """pooled, and the weights if asked for."""
    low = autocast_dtype(input)
    if low is not None:
        with torch.autocast(input.device.type, enabled=False):
            return run_pool(
                lowered(input, low), lowered(v, low), lowered(w, low), lowered(b, low), lengths, mask, need_weights
            )
    check_pool(input, v, w, b)
    B, T, _ = input.shape
    if lengths is not None and mask is not None:
        raise ValueError("attention_pool: expected lengths or mask, got both")
    lengths = checked_lengths(lengths, B, T, input.device)
    checked_mask(mask, (B, T), input.device)
    ragged = lengths is not None or mask is not None
    backend = "reference"
    if not want_equations(input, v, w, b):
        backend = backends.select(_pool_call(input, w, ragged, wants_grad(input, v, w, b))).backend
    if backend == "torch":
        pooled, p = backends.TORCH.attention_pool(input, v, w, b, lengths, mask)
        return pooled, p if need_weights else None
    return autograd.attention_pool(input, v, w, b, lengths, mask, need_weights, backend)


def _pool_call(x: Tensor, w: Tensor | None, ragged: bool, grad: bool) -> Call:
    """What `backends.select` needs to know of a pooling call; x is [B, T, D]."""
    B, T, D = x.shape
    A = 0 if w is None else w.shape[0]
    return Call(
        "attention_pool", x.device.type, x.dtype, B, T, D, A, ragged=ragged, grad=grad,
        compiling=torch.compiler.is_compiling(), traced=is_traced(),
    )  # fmt: skip
