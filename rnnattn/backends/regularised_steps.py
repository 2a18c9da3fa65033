"""A regularised scan step by step: one GEMM and one fused kernel per step, for any cell.

The driver that backends without a sequence kernel share, as `stepwise` is for the plain layer; a backend brings the
kernels (`RegularisedKernels`).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from rnnattn.backends.products import matmul, wide
from rnnattn.backends.stepwise import contiguous
from rnnattn.reference import CELLS, scan_resets


class RegularisedKernels(Protocol):
    """What lies between the hidden products of two steps: `rnnattn.kernels.regularised_forward` and `_backward`.

    The parameters b_hh, norm_hh, norm_c and bias_c come in the accumulation type.
    """

    def forward(
        self, mode: str, a: Tensor, product: Tensor, b_hh: Tensor | None, norm_hh: Tensor | None,
        norm_c: Tensor | None, bias_c: Tensor | None, h_mask: Tensor | None, keep_h: Tensor | None,
        keep_c: Tensor | None, zoneout_h: float, zoneout_c: float, lengths: Tensor | None, t: int,
        resets_next: Tensor | None, h_reset: Tensor | None, c_reset: Tensor | None, h: Tensor, c: Tensor | None,
        operand: Tensor, y: Tensor, cells: Tensor | None, gates: Tensor | None, hidden: Tensor | None,
        rstd: Tensor | None,
    ) -> None: ...  # fmt: skip

    def backward(
        self, mode: str, dy: Tensor | None, dcells: Tensor | None, product: Tensor | None, dh: Tensor,
        dc: Tensor | None, h_prev: Tensor, c_prev: Tensor | None, gates: Tensor, hidden: Tensor | None,
        rstd: Tensor | None, norm_hh: Tensor | None, norm_c: Tensor | None, bias_c: Tensor | None,
        h_mask: Tensor | None, keep_h: Tensor | None, keep_c: Tensor | None, zoneout_h: float, zoneout_c: float,
        lengths: Tensor | None, t: int, resets_after: Tensor | None, dh_reset: Tensor | None,
        dc_reset: Tensor | None, d_norm_c: Tensor | None, d_bias_c: Tensor | None, da: Tensor, db: Tensor | None,
        d_hidden: Tensor | None,
    ) -> None: ...  # fmt: skip


def scan_forward(
    kernels: RegularisedKernels,
    a: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    w_hh: Tensor,
    b_hh: Tensor | None,
    norm_hh: Tensor | None,
    norm_c: Tensor | None,
    bias_c: Tensor | None,
    h_mask: Tensor | None,
    keep_h: Tensor | None,
    keep_c: Tensor | None,
    zoneout_h: float,
    zoneout_c: float,
    lengths: Tensor | None,
    resets: Tensor | None,
    reset_to_initial: bool,
    reverse: bool,
    mode: str,
    save: bool,
) -> tuple[Tensor, ...]:
    """`rnnattn.backends.Backend.regularised_scan_forward`."""
    (T, B, GH), H, acc, cell = a.shape, h0.shape[-1], a.dtype, CELLS[mode]
    b_hh, norm_hh, norm_c, bias_c = _full(acc, b_hh, norm_hh, norm_c, bias_c)
    h_mask, keep_h, keep_c, lengths = contiguous(h_mask, keep_h, keep_c, lengths)
    h, c = _copy(h0, acc), None if c0 is None else _copy(c0, acc)
    reset = scan_resets(resets, reset_to_initial, h, c, lengths, reverse)
    h_reset = None if reset is None else _copy(reset.h, acc)
    c_reset = None if reset is None or reset.c is None else _copy(reset.c, acc)
    flags = None if reset is None else reset.before[..., 0].contiguous()
    steps = list(reversed(range(T)) if reverse else range(T))
    if reset is not None:
        h, c = reset.states(steps[0], h, c)
    a = a.contiguous()
    y, w_hh_t = h0.new_empty(T, B, H), wide(w_hh.t())
    cells = a.new_empty(T, B, H) if cell.has_c else None
    gates = h0.new_empty(T, B, max(cell.saved, 1) * H) if save else None
    hidden = h0.new_empty(T, B, GH) if save and norm_hh is not None else None
    rstd = a.new_empty(T, B) if save and norm_hh is not None else None
    operand = (h if h_mask is None else h * h_mask).to(w_hh_t.dtype)
    for n, t in enumerate(steps):
        own = None if flags is None or n + 1 == T else flags[steps[n + 1]]
        kernels.forward(
            mode, a[t], matmul(operand, w_hh_t), b_hh, norm_hh, norm_c, bias_c, h_mask, _at(keep_h, t), _at(keep_c, t),
            zoneout_h, zoneout_c, lengths, t, own, h_reset, c_reset, h, c, operand, y[t], _at(cells, t), _at(gates, t),
            _at(hidden, t), _at(rstd, t),
        )  # fmt: skip
    c_n = None if c is None else c.to(h0.dtype)
    return (
        y, h.to(h0.dtype), _or_empty(c_n, h0), _or_empty(cells, a), _or_empty(gates, h0), _or_empty(hidden, h0),
        _or_empty(rstd, a),
    )  # fmt: skip


def scan_backward(
    kernels: RegularisedKernels,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dcells: Tensor | None,
    h_prev: Tensor,
    c_prev: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    w_hh: Tensor,
    norm_hh: Tensor | None,
    norm_c: Tensor | None,
    bias_c: Tensor | None,
    h_mask: Tensor | None,
    keep_h: Tensor | None,
    keep_c: Tensor | None,
    zoneout_h: float,
    zoneout_c: float,
    lengths: Tensor | None,
    resets: Tensor | None,
    reset_to_initial: bool,
    reverse: bool,
    mode: str,
    gates: Tensor,
    hidden: Tensor,
    rstd: Tensor,
) -> list[Tensor]:
    """`rnnattn.backends.regularised.Scan`."""
    (T, B, H), acc, cell = h_prev.shape, rstd.dtype, CELLS[mode]
    new = rstd.new_zeros
    norm_hh, norm_c, bias_c = _full(acc, norm_hh, norm_c, bias_c)
    h_mask, keep_h, keep_c, lengths, dy, dcells, c_prev = contiguous(
        h_mask, keep_h, keep_c, lengths, dy, dcells, c_prev
    )
    h_prev = h_prev.contiguous()
    dh = new(B, H) if dh_n is None else _copy(dh_n, acc)
    dc = None if c0 is None else new(B, H) if dc_n is None else _copy(dc_n, acc)
    reset = scan_resets(resets, reset_to_initial, dh, dc, lengths, reverse)
    flags = None if reset is None else reset.before[..., 0].contiguous()
    gathers = reset is not None and reset_to_initial
    dh_reset, dc_reset = new(B, H) if gathers else None, new(B, H) if gathers and dc is not None else None
    d_norm_c, d_bias_c = (None if p is None else new(B, H) for p in (norm_c, bias_c))
    da = rstd.new_empty(T, B, w_hh.shape[0])
    db, d_hidden = None if cell.shared else torch.empty_like(da), None if norm_hh is None else torch.empty_like(da)
    last = d_hidden if d_hidden is not None else db if db is not None else da
    w_hh, product, after = wide(w_hh), None, None
    steps = list(reversed(range(T)) if reverse else range(T))
    for t in reversed(steps):
        kernels.backward(
            mode, _at(dy, t), _at(dcells, t), product, dh, dc, h_prev[t], _at(c_prev, t), gates[t],
            None if norm_hh is None else hidden[t], None if norm_hh is None else rstd[t], norm_hh, norm_c, bias_c,
            h_mask, _at(keep_h, t), _at(keep_c, t), zoneout_h, zoneout_c, lengths, t, after, dh_reset, dc_reset,
            d_norm_c, d_bias_c, da[t], _at(db, t), _at(d_hidden, t),
        )  # fmt: skip
        product, after = matmul(last[t].to(w_hh.dtype), w_hh), _at(flags, t)
    if product is not None:
        dh = dh + (product if h_mask is None else product * h_mask)
    if after is not None:
        dh = _of_initial(dh, after, dh_reset)
        dc = None if dc is None else _of_initial(dc, after, dc_reset)
    dc0 = None if dc is None or c0 is None else dc.to(c0.dtype)
    return [_or_empty(t, rstd) for t in (da, db, d_hidden, dh.to(h0.dtype), dc0, d_norm_c, d_bias_c)]


def _of_initial(d: Tensor, first: Tensor, gathered: Tensor | None) -> Tensor:
    """The gradient of an initial state: d where the first step started from it, and what replaced states gathered."""
    if gathered is not None:
        return d + gathered
    return torch.where(first[:, None], 0, d)


def _or_empty(t: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if t is None else t


def _at(t: Tensor | None, step: int) -> Tensor | None:
    return None if t is None else t[step]


def _copy(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _full(acc: torch.dtype, *parameters: Tensor | None) -> list[Tensor | None]:
    """Parameters in the accumulation type: autocast leaves those of the norms in fp32, whatever the states have."""
    return contiguous(*(None if p is None else p.to(acc) for p in parameters))
