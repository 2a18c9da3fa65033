"""The backward of `stepwise`: one fused kernel and one GEMM per step, then the GEMMs of the weight gradients."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from rnnattn.backends.products import Multiply, matmul, recurrent_multiply, wide
from rnnattn.backends.rows import Rows, following
from rnnattn.backends.stepwise import StepKernels
from rnnattn.reference import (
    CELLS,
    DIRECTIONS,
    LayerWeights,
    Resets,
    accumulation_dtype,
    layer_gradients,
    scan_resets,
    split_weights,
    valid_steps,
    zero_invalid,
)


def layer_backward(
    kernels: StepKernels,
    rows: Rows,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dcells: Tensor | None,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    resets: Tensor | None,
    reset_to_initial: bool,
    y: Tensor,
    gates: Tensor,
    cells: Tensor,
    has_biases: bool,
    direction: str,
    mode: str,
    needs_dx: bool,
    needs_dweights: bool,
) -> tuple[Tensor | None, Tensor, Tensor, list[Tensor] | None]:
    """`rnnattn.reference.recurrent_layer_backward`."""
    cell, reverses = CELLS[mode], DIRECTIONS[direction]
    (K, _, R), acc = h0.shape, accumulation_dtype(x.dtype)
    lengths = None if rows.packed else rows.lengths  # packed, a step has no row whose length is over
    if dy is not None and dy.stride(-1) != 1:
        dy = dy.contiguous()
    dcells = None if dcells is None else zero_invalid(dcells, lengths)
    dx: Tensor | None = None
    multiply = recurrent_multiply(x)
    dh0, dc0 = torch.empty_like(h0), x.new_empty(0) if c0 is None else torch.empty_like(c0)
    dweights: list[Tensor] | None = [] if needs_dweights else None
    for k, w in enumerate(split_weights(weights, has_biases, K)):
        y_k, dy_k = y[..., k * R : (k + 1) * R], None if dy is None else dy[..., k * R : (k + 1) * R]
        gates_k, cells_k = gates[k] if cell.saved else None, cells[k] if cell.has_c else None
        c0_k = None if c0 is None else c0[k].to(acc).contiguous()
        h0_k = h0[k].contiguous()
        reset = scan_resets(resets, reset_to_initial, h0_k, c0_k, lengths, reverses[k])
        h_prev = rows.previous(y_k, h0_k, reset, reverses[k]) if needs_dweights or not cell.shared else None
        dh_n_k, dc_n_k = None if dh_n is None else dh_n[k], None if dc_n is None else dc_n[k]
        da, db, dh_out = _scan(
            kernels, rows, multiply, mode, dy_k, start(dh_n_k, h0_k), None if c0_k is None else start(dc_n_k, c0_k),
            None if dcells is None else dcells[k], c0_k, w, lengths, reset, y_k, h_prev, gates_k, cells_k, reverses[k],
            dh0[k], dc0 if c0_k is None else dc0[k],
        )  # fmt: skip
        if needs_dx:
            part = matmul(da.flatten(0, -2), w.w_ih, multiply)
            dx = part if dx is None else dx.add_(part)
        if dweights is not None and h_prev is not None:
            dh_out = None if dh_out is None else dh_out.to(x.dtype)
            dweights += layer_gradients(da, db, dh_out, x, h_prev, gates_k, cells_k, w, lengths, multiply)
    return None if dx is None else dx.view(x.shape).to(x.dtype), dh0, dc0, dweights


def start(d: Tensor | None, state: Tensor) -> Tensor:
    """The gradient d of last states, to be written over."""
    acc = accumulation_dtype(state.dtype)
    if d is None:
        return torch.zeros(state.shape, dtype=acc, device=state.device)
    return d.to(acc, copy=True, memory_format=torch.contiguous_format)


def _scan(
    kernels: StepKernels,
    rows: Rows,
    multiply: Multiply,
    mode: str,
    dy: Tensor | None,
    dh_last: Tensor,
    dc_last: Tensor | None,
    dcells: Tensor | None,
    c0: Tensor | None,
    w: LayerWeights,
    lengths: Tensor | None,
    reset: Resets | None,
    y: Tensor,
    h_prev: Tensor | None,
    gates: Tensor | None,
    cells: Tensor | None,
    reverse: bool,
    dh0: Tensor,
    dc0: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """da [T, B, GH] (packed [N, GH]), db where that is another, and dh_out [T, B, R] (the whole gradient of h_t) with a
    projection. dh0 [B, R] and dc0 [B, H] are written to."""
    T, shared = rows.T, CELLS[mode].shared
    w_hh, w_hr = wide(w.w_hh), None if w.w_hr is None else wide(w.w_hr)
    valid = None if lengths is None else valid_steps(lengths, T)[..., None]
    da = y.new_empty(*y.shape[:-1], w_hh.shape[0])
    db = None if shared else torch.empty_like(da)
    dh_out = None if w_hr is None else torch.zeros(y.shape, dtype=dh_last.dtype, device=y.device)
    flags = None if reset is None else reset.before[..., 0].contiguous()
    gathers = reset is not None and reset.to_initial
    dh_reset = torch.zeros_like(dh_last) if gathers else None
    dc_reset = torch.zeros_like(dc_last) if gathers and dc_last is not None else None
    c_reset = c0 if gathers else None
    product: Tensor | None = None
    around: Tensor | None = dh_last  # GRU's part, and what rows behind their lengths hand on: for others there is none
    if shared and lengths is None:
        product, around = dh_last, None
    steps = list(reversed(range(T)) if reverse else range(T))
    after: Tensor | None = None
    held, dc = rows.B, dc_last
    for n in reversed(range(T)):
        t = steps[n]
        size, of_step = rows.sizes[t], functools.partial(rows.of_step, t)
        if size != held:
            product, held = following(_sum(product, around), size, dh_last, dh0), size
            around = None if around is None else torch.zeros_like(product)
            dc = None if dc is None or dc_last is None else following(dc, size, dc_last, dc0)
        c_prev = None
        if cells is not None and c0 is not None:
            c_prev = following(c0 if n == 0 else rows.of_step(steps[n - 1], cells), size, c0)
        here = None if flags is None else flags[t]
        dy_t, da_t, db_t = None if dy is None else of_step(dy), of_step(da), None if db is None else of_step(db)
        if dc is not None and dcells is not None:
            # A kernel cuts all of dc where the step after was reset; what cells give to c_t is added after a cut here.
            product, around = (None if d is None else _kept_from(d, after, dh_reset) for d in (product, around))
            dc, after = _kept_from(dc, after, dc_reset).add_(of_step(dcells)), None
        saved = (
            None if gates is None else of_step(gates), of_step(y) if gates is None else None,
            None if shared or h_prev is None else of_step(h_prev), None if cells is None else of_step(cells), c_prev,
            lengths, t, here,
        )  # fmt: skip
        if w_hr is None or dh_out is None:
            kernels.backward(
                mode, dy_t, product, around, dc, *saved, after, c_reset, dh_reset, dc_reset, da_t, db_t
            )  # fmt: skip
        else:
            carried = _kept_from(_sum(product, around), after, dh_reset)
            dc = None if dc is None else _kept_from(dc, after, dc_reset)
            dh_t = _sum(dy_t, carried)
            of_step(dh_out).copy_(dh_t if valid is None else torch.where(valid[t], dh_t, 0))
            around = None if valid is None else torch.where(valid[t], 0, carried)
            # At the weights' precision where they are 16-bit (on CUDA).
            dh_raw = matmul(dh_t.to(w_hr.dtype), w_hr, multiply)
            kernels.backward(mode, None, dh_raw, None, dc, *saved, None, c_reset, None, None, da_t, None)
        product, after = matmul(da_t if db_t is None else db_t, w_hh, multiply), here
    dh0[:held] = _sum(_kept_from(_sum(product, around), after, dh_reset), dh_reset)
    if dc is not None:
        dc0[:held] = _sum(_kept_from(dc, after, dc_reset), dc_reset)
    return da, db, dh_out


def _sum(*terms: Tensor | None) -> Tensor:
    """Of those that there are."""
    return functools.reduce(torch.add, (term for term in terms if term is not None))


def _kept_from(d: Tensor, resets_after: Tensor | None, d_reset: Tensor | None) -> Tensor:
    """The gradient d of the states that left a step: none where the step after was reset; d_reset gathers it."""
    if resets_after is None:
        return d
    cut = resets_after[:, None]
    if d_reset is not None:
        d_reset += torch.where(cut, d, 0)
    return torch.where(cut, 0, d)
