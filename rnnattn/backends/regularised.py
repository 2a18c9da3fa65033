"""All gradients of a regularised scan from those of its pre-activations, which a backend's scan gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rnnattn.backends.products import matmul
from rnnattn.reference import previous_states, scan_resets

# (dy, dh_n, dc_n, dcells, h_prev [T, B, H], c_prev [T, B, H], h0, c0, w_hh, norm_hh, norm_c, bias_c, h_mask, keep_h,
# keep_c, zoneout_h, zoneout_c, lengths, resets, reset_to_initial, reverse, mode, gates, hidden, rstd)
# -> da, db, d_hidden [T, B, GH], dh0, dc0 [B, H], d_norm_c and d_bias_c as sums of each row [B, H].
# Empty: what there is not; db where it is da, d_hidden where it is db.
Scan = Callable[..., Sequence[Tensor]]


def scan_gradients(
    scan: Scan,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dcells: Tensor | None,
    a: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    w_hh: Tensor,
    b_hh: Tensor | None,
    norm_hh: Tensor | None,
    norm_c: Tensor | None,
    bias_c: Tensor | None,
    h_mask: Tensor | None,
    *settings: Any,
) -> list[Tensor | None]:
    """`rnnattn.backends.Backend.regularised_scan_backward`."""
    *switches, y, cells, gates, hidden, rstd, needs_dweights = settings
    lengths, resets, reset_to_initial, reverse, _ = switches[4:]
    for name, t in {"h0": h0, "c0": c0, "h_mask": h_mask, "resets": resets, "y": y, "cells": cells}.items():
        if t is not None and t.numel() and t.untyped_storage().nbytes() == 0:
            raise RuntimeError(f"{name}: expected a tensor with data, got one whose storage was freed")
    c_first = None if c0 is None else c0.to(cells.dtype)
    h_prev = previous_states(y, h0, lengths, reverse)
    c_prev = None if c_first is None else previous_states(cells, c_first, lengths, reverse)
    reset = scan_resets(resets, reset_to_initial, h0, c_first, lengths, reverse)
    if reset is not None:
        h_prev = torch.where(reset.before, reset.h, h_prev)
        c_prev = None if c_prev is None or reset.c is None else torch.where(reset.before, reset.c, c_prev)
    da, db, d_hidden, dh0, dc0, d_norm_c, d_bias_c = scan(
        dy, dh_n, dc_n, dcells, h_prev, c_prev, h0, c0, w_hh, norm_hh, norm_c, bias_c, h_mask, *switches, gates, hidden,
        rstd,
    )  # fmt: skip
    of_inputs = [da, dh0, None if c0 is None else dc0]
    if not needs_dweights:
        return [*of_inputs, *[None] * 5]
    db = da if db.numel() == 0 else db
    d_hidden = db if d_hidden.numel() == 0 else d_hidden
    dtype = h0.dtype if h0.is_cuda else a.dtype  # of the GEMM: a GPU multiplies 16-bit numbers at their own rate
    states = h_prev if h_mask is None else h_prev * h_mask
    return [
        *of_inputs,
        matmul(d_hidden.flatten(0, 1).t().to(dtype), states.flatten(0, 1).to(dtype)).to(w_hh.dtype),
        None if b_hh is None else db.sum((0, 1)).to(b_hh.dtype),
        None if norm_hh is None else (db * hidden).sum((0, 1)).to(norm_hh.dtype),
        None if norm_c is None else d_norm_c.sum(0).to(norm_c.dtype),
        None if bias_c is None else d_bias_c.sum(0).to(bias_c.dtype),
    ]
