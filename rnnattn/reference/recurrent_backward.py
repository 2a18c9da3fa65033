"""The backward of `recurrent`: gradients by the explicit equations, the weights' by GEMMs after the scan."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rnnattn.reference.cells import CELLS, Cell, Step
from rnnattn.reference.layout import (
    DIRECTIONS,
    STACK,
    LayerWeights,
    Resets,
    accumulation_dtype,
    previous_states,
    scan_resets,
    split_weights,
    valid_steps,
    zero_invalid,
)
from rnnattn.reference.stack import stack_backward


def recurrent_layer_backward(
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
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients of `recurrent_layer_forward` by the explicit equations.

    Args:
        dy, dh_n, dc_n, dcells: cotangents of y, h_n, c_n and cells, or None for zero. dcells is not read at invalid
            steps: what is carried on there is no result of the layer.
        y, gates, cells: what the forward returned; the rest as given to it.

    Returns:
        dx [T, B, I], dh0 [K, B, R], dc0 [K, B, H] (or empty) and, per direction, what
        `layer_gradients` returns.
    """
    if direction == STACK:
        settings = has_biases, "forward", mode

        def one(dy, dh_n, dc_n, dcells, x, h0, c0, weights, y, gates, cells, needs_dx):  # type: ignore[no-untyped-def]
            inputs = dy, dh_n, dc_n, dcells, x, h0, c0, weights, lengths, resets, reset_to_initial, y, gates, cells
            return recurrent_layer_backward(*inputs, *settings)

        return stack_backward(one, dy, dh_n, dc_n, dcells, x, h0, c0, weights, y, gates, cells)  # type: ignore[return-value]
    reverses, cell = DIRECTIONS[direction], CELLS[mode]
    K, R = len(reverses), h0.shape[-1]
    acc = accumulation_dtype(x.dtype)
    dcells = None if dcells is None else zero_invalid(dcells, lengths).to(acc)
    dx = torch.zeros(x.shape, dtype=acc, device=x.device)
    dh0, dc0 = torch.empty_like(h0), x.new_empty(0) if c0 is None else torch.empty_like(c0)
    dweights: list[Tensor] = []
    for k, w in enumerate(split_weights(weights, has_biases, K)):
        y_k = y[..., k * R : (k + 1) * R]
        dy_k = None if dy is None else dy[..., k * R : (k + 1) * R]
        h_prev = previous_states(y_k, h0[k], lengths, reverses[k])
        gates_k, cells_k = gates[k] if cell.saved else None, cells[k] if cell.has_c else None
        c0_k, dc = None, None
        if c0 is not None:
            c0_k = c0[k].to(acc)
            dc = torch.zeros_like(c0_k) if dc_n is None else dc_n[k].to(acc)
        reset = scan_resets(resets, reset_to_initial, h0[k], c0_k, lengths, reverses[k])
        if reset is not None:
            h_prev = torch.where(reset.before, reset.h, h_prev)
        dh = torch.zeros_like(h0[k], dtype=acc) if dh_n is None else dh_n[k].to(acc)
        da, db, dh_out, dh, dc = _scan_backward(
            cell, dy_k, dh, dc, None if dcells is None else dcells[k], c0_k, w, lengths, reset, y_k, h_prev, gates_k,
            cells_k, reverses[k],
        )  # fmt: skip
        dh0[k] = dh
        if dc is not None:
            dc0[k] = dc
        dx += da @ w.w_ih.to(acc)
        dweights += layer_gradients(da, None if cell.shared else db, dh_out, x, h_prev, gates_k, cells_k, w, lengths)
    return dx.to(x.dtype), dh0, dc0, dweights


def _scan_backward(
    cell: Cell,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """da and db [T, B, GH], dh_out [T, B, R] (the whole gradient of h_t), dh0 and dc0."""
    (T, B, R), acc = y.shape, dh.dtype
    w_hh, w_hr = w.w_hh.to(acc), None if w.w_hr is None else w.w_hr.to(acc)
    valid = None if lengths is None else valid_steps(lengths, T)[..., None]
    da, db = (torch.zeros(T, B, w_hh.shape[0], dtype=acc, device=y.device) for _ in range(2))
    dh_out = torch.zeros(T, B, R, dtype=acc, device=y.device)
    dh_reset, dc_reset = torch.zeros_like(dh), None if dc is None else torch.zeros_like(dc)  # of all replaced states
    steps = list(reversed(range(T)) if reverse else range(T))
    for n in reversed(range(T)):
        t = steps[n]
        c_prev = c0 if cells is None or n == 0 else cells[steps[n - 1]]
        if reset is not None:
            _, c_prev = reset.states(t, h_prev[t], c_prev)
        step = Step(
            None if gates is None else gates[t].to(acc), y[t].to(acc), h_prev[t].to(acc),
            None if cells is None else cells[t], c_prev,
        )  # fmt: skip
        dh_t = dh if dy is None else dh + dy[t].to(acc)
        if dc is not None and dcells is not None:
            dc = dc + dcells[t]
        da_t, db_t, around, dc_prev = cell.backward(dh_t if w_hr is None else dh_t @ w_hr, dc, step)
        dh_prev = db_t @ w_hh
        if around is not None:
            dh_prev = dh_prev + around
        if valid is not None:
            da_t, db_t, dh_t = (torch.where(valid[t], d, 0) for d in (da_t, db_t, dh_t))
            dh_prev = torch.where(valid[t], dh_prev, dh)
            dc_prev = None if dc_prev is None or dc is None else torch.where(valid[t], dc_prev, dc)
        if reset is not None:
            before = reset.before[t]
            dh_prev, dh_reset = torch.where(before, 0, dh_prev), dh_reset + torch.where(before, dh_prev, 0)
            if dc_prev is not None and dc_reset is not None:
                dc_prev, dc_reset = torch.where(before, 0, dc_prev), dc_reset + torch.where(before, dc_prev, 0)
        da[t], db[t], dh_out[t], dh, dc = da_t, db_t, dh_t, dh_prev, dc_prev
    if reset is not None and reset.to_initial:
        dh, dc = dh + dh_reset, None if dc is None or dc_reset is None else dc + dc_reset
    return da, db, dh_out, dh, dc


def layer_gradients(
    da: Tensor,
    db: Tensor | None,
    dh_out: Tensor | None,
    x: Tensor,
    h_prev: Tensor,
    gates: Tensor | None,
    cells: Tensor | None,
    w: LayerWeights,
    lengths: Tensor | None,
    multiply: Callable[[Tensor, Tensor], Tensor] = torch.mm,
) -> list[Tensor]:
    """Weight gradients of one direction: GEMMs over all steps at once, after the scan.

    Args:
        da, db: [T, B, GH], gradients of a and b, zero at invalid steps; db is None where it is da. The
            GEMMs run in their dtype. All that has T, B may be of packed rows instead, [N, ...]; lengths are None then.
        dh_out: [T, B, R], the whole gradient of h_t; it, gates and cells are read with a projection only.
        h_prev: [T, B, R] of `previous_states`. The rest as in `recurrent_layer_backward`.
        multiply: of two matrices, in their dtype.

    Returns:
        dw_ih, dw_hh, then with biases the gradient of both where db is None, else of b_ih and of b_hh,
        and with a projection dw_hr.
    """
    dtype, acc = x.dtype, da.dtype
    da_t = da.flatten(0, -2).t()
    db_t = da_t if db is None else db.flatten(0, -2).t()
    gradients = [
        multiply(da_t, zero_invalid(x, lengths).to(acc).flatten(0, -2)),
        multiply(db_t, h_prev.to(acc).flatten(0, -2)),
    ]
    if w.b_ih is not None:
        gradients += [d.sum(1) for d in ((da_t,) if db is None else (da_t, db_t))]
    if w.w_hr is not None:
        assert dh_out is not None and gates is not None and cells is not None
        o = gates[..., 3 * cells.shape[-1] :]
        h_raw = (o.to(cells.dtype) * cells.tanh()).to(dtype).to(acc)
        gradients.append(multiply(dh_out.flatten(0, -2).to(acc).t(), h_raw.flatten(0, -2)))
    return [gradient.to(dtype) for gradient in gradients]
