"""The backward of `stepwise`: one fused kernel and one GEMM per step, then the GEMMs of the weight gradients."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from rnnattn.backends.stepwise import StepKernels, matmul, wide
from rnnattn.reference import (
    CELLS,
    DIRECTIONS,
    LayerWeights,
    Resets,
    accumulation_dtype,
    layer_gradients,
    previous_states,
    scan_resets,
    split_weights,
    valid_steps,
    zero_invalid,
)


def layer_backward(
    kernels: StepKernels,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dcells: Tensor | None,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    lengths: Tensor | None,
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
    (T, B, I), (K, _, R), acc = x.shape, h0.shape, accumulation_dtype(x.dtype)
    if dy is not None and dy.stride(-1) != 1:
        dy = dy.contiguous()
    dcells = None if dcells is None else zero_invalid(dcells, lengths)
    dx = x.new_zeros(T * B, I, dtype=acc) if needs_dx else None
    dh0, dc0 = torch.empty_like(h0), x.new_empty(0) if c0 is None else torch.empty_like(c0)
    dweights: list[Tensor] | None = [] if needs_dweights else None
    for k, w in enumerate(split_weights(weights, has_biases, K)):
        y_k, dy_k = y[..., k * R : (k + 1) * R], None if dy is None else dy[..., k * R : (k + 1) * R]
        gates_k, cells_k = gates[k] if cell.saved else None, cells[k] if cell.has_c else None
        c0_k = None if c0 is None else c0[k].to(acc).contiguous()
        h0_k = h0[k].contiguous()
        reset = scan_resets(resets, reset_to_initial, h0_k, c0_k, lengths, reverses[k])
        h_prev = started_from(y_k, h0_k, lengths, reset, reverses[k])
        dh_n_k, dc_n_k = None if dh_n is None else dh_n[k], None if dc_n is None else dc_n[k]
        da, db, dh_out, dh, dc = _scan(
            kernels, mode, dy_k, start(dh_n_k, h0_k), None if c0_k is None else start(dc_n_k, c0_k),
            None if dcells is None else dcells[k], c0_k, w, lengths, reset, y_k, h_prev, gates_k, cells_k, reverses[k],
        )  # fmt: skip
        dh0[k] = dh
        if dc is not None:
            dc0[k] = dc
        if dx is not None:
            dx += matmul(da.flatten(0, 1), w.w_ih)
        if dweights is not None:
            dweights += layer_gradients(
                da, db, dh_out if dh_out is None else dh_out.to(x.dtype), x, h_prev, gates_k, cells_k, w, lengths
            )
    return None if dx is None else dx.view(T, B, I).to(x.dtype), dh0, dc0, dweights


def started_from(y: Tensor, h0: Tensor, lengths: Tensor | None, reset: Resets | None, reverse: bool) -> Tensor:
    """h_prev [T, B, R] of one direction, where its scan is reset too."""
    h_prev = previous_states(y, h0, lengths, reverse)
    return h_prev if reset is None else torch.where(reset.before, reset.h, h_prev)


def start(d: Tensor | None, state: Tensor) -> Tensor:
    """The gradient d of last states, to be written over."""
    acc = accumulation_dtype(state.dtype)
    if d is None:
        return torch.zeros(state.shape, dtype=acc, device=state.device)
    return d.to(acc, copy=True, memory_format=torch.contiguous_format)


def _scan(
    kernels: StepKernels,
    mode: str,
    dy: Tensor | None,
    dh: Tensor,
    dc: Tensor | None,
    dcells: Tensor | None,
    c0: Tensor | None,
    w: LayerWeights,
    lengths: Tensor | None,
    reset: Resets | None,
    y: Tensor,
    h_prev: Tensor,
    gates: Tensor | None,
    cells: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """da [T, B, GH], db where that is another, dh_out [T, B, R] (the whole gradient of h_t) with a projection,
    dh0 and dc0."""
    (T, B, _), shared = y.shape, CELLS[mode].shared
    w_hh, w_hr = wide(w.w_hh), None if w.w_hr is None else wide(w.w_hr)
    valid = None if lengths is None else valid_steps(lengths, T)[..., None]
    da = y.new_empty(T, B, w_hh.shape[0])
    db = None if shared else torch.empty_like(da)
    dh_out = None if w_hr is None else torch.zeros(T, B, y.shape[-1], dtype=dh.dtype, device=y.device)
    flags = None if reset is None else reset.before[..., 0].contiguous()
    gathers = reset is not None and reset.to_initial
    dh_reset = torch.zeros_like(dh) if gathers else None
    dc_reset = torch.zeros_like(dc) if gathers and dc is not None else None
    c_reset = c0 if gathers else None
    product: Tensor | None = None
    around: Tensor | None = dh  # GRU's part, and what rows behind their lengths hand on: for others there is none
    if shared and lengths is None:
        product, around = dh, None
    steps = list(reversed(range(T)) if reverse else range(T))
    after: Tensor | None = None
    for n in reversed(range(T)):
        t = steps[n]
        c_prev = c0 if cells is None or n == 0 else cells[steps[n - 1]]
        here = None if flags is None else flags[t]
        dy_t, db_t = None if dy is None else dy[t], None if db is None else db[t]
        if dc is not None and dcells is not None:
            # A kernel cuts all of dc where the step after was reset; what cells give to c_t is added after a cut here.
            product, around = (None if d is None else _kept_from(d, after, dh_reset) for d in (product, around))
            dc, after = _kept_from(dc, after, dc_reset).add_(dcells[t]), None
        saved = (
            None if gates is None else gates[t], y[t] if gates is None else None, None if shared else h_prev[t],
            None if cells is None else cells[t], c_prev, lengths, t, here,
        )  # fmt: skip
        if w_hr is None or dh_out is None:
            kernels.backward(
                mode, dy_t, product, around, dc, *saved, after, c_reset, dh_reset, dc_reset, da[t], db_t
            )  # fmt: skip
        else:
            carried = _kept_from(_sum(product, around), after, dh_reset)
            dc = None if dc is None else _kept_from(dc, after, dc_reset)
            dh_t = _sum(dy_t, carried)
            dh_out[t] = dh_t if valid is None else torch.where(valid[t], dh_t, 0)
            around = None if valid is None else torch.where(valid[t], 0, carried)
            dh_raw = matmul(dh_t.to(w_hr.dtype), w_hr)  # at the weights' precision where they are 16-bit (on CUDA)
            kernels.backward(mode, None, dh_raw, None, dc, *saved, None, c_reset, None, None, da[t], None)
        product, after = matmul(da[t] if db_t is None else db_t, w_hh), here
    dh = _sum(_kept_from(_sum(product, around), after, dh_reset), dh_reset)
    dc = None if dc is None else _sum(_kept_from(dc, after, dc_reset), dc_reset)
    return da, db, dh_out, dh, dc


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
