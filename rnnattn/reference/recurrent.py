"""One recurrent layer over a sequence in plain PyTorch: any cell of `cells.CELLS`.

    a_t = W_ih x_t + b_ih,    b_t = W_hh h_{t-1} + b_hh
    h_t, c_t = cell(a_t, b_t, h_{t-1}, c_{t-1})
    h_t = W_hr h_t                                    (LSTM with a projection, Sak et al. 2014)

Arithmetic runs in the accumulation type (fp32 for 16-bit inputs, else the input's own); h_t is
rounded to the input's type where it leaves the step, and before a projection; c_t never is. Step t of
row b is valid where t < lengths[b]; other steps carry the state on, give y = 0, and x and dy are not
read there.

Where resets[t, b], row b begins an episode at t: step t starts not from h_{t-1}, c_{t-1} but from zeros, or
from h0, c0. A reverse scan goes from t to t - 1, so that there step t - 1 does: nothing crosses the border
between two episodes, in either direction, and neither does a gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rnnattn.reference.cells import CELLS, Cell
from rnnattn.reference.layout import (
    DIRECTIONS,
    STACK,
    LayerWeights,
    accumulation_dtype,
    scan_resets,
    split_weights,
    valid_steps,
    zero_invalid,
)
from rnnattn.reference.stack import stack_forward


def recurrent_layer_forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    lengths: Tensor | None,
    resets: Tensor | None,
    reset_to_initial: bool,
    has_biases: bool,
    direction: str,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One layer over a sequence; differentiable by autograd.

    G blocks of weights and S saved values a unit are the cell's: 4 and 4 (LSTM), 3 and 4 (GRU), 1 and 0 (RNN).

    Args:
        x: [T, B, I].
        h0, c0: [K, B, R] and [K, B, H]; c0 is None for a cell without c (all but the LSTM).
        weights: K times w_ih [GH, I], w_hh [GH, R], (b_ih, b_hh [GH]), (w_hr [R, H], LSTM only).
        lengths: integers [B] on x's device, 0 <= lengths <= T, or None for T everywhere.
        resets: bool [T, B] on x's device, True where an episode begins, or None; reset_to_initial: its state
            is h0 and c0, not zeros.
        direction: a key of `DIRECTIONS`, or STACK (`stack`). mode: a key of `CELLS`.

    Returns:
        y [T, B, K * R], h_n [K, B, R], c_n [K, B, H] in x's dtype, and what the backward needs:
        gates [K, T, B, SH] in x's dtype, zero at invalid steps (LSTM i, f, g, o after the activation;
        GRU r, z, n, and q before the reset), and cells [K, T, B, H] in the accumulation type, the state
        carried on at invalid steps. What the cell does not have is an empty tensor.
    """
    if direction == STACK:
        settings = lengths, resets, reset_to_initial, has_biases, "forward", mode
        return stack_forward(lambda x, h, c, w: recurrent_layer_forward(x, h, c, w, *settings), x, h0, c0, weights)
    reverses, cell = DIRECTIONS[direction], CELLS[mode]
    scans = [
        _scan_forward(cell, x, h0[k], None if c0 is None else c0[k], w, lengths, resets, reset_to_initial, reverses[k])
        for k, w in enumerate(split_weights(weights, has_biases, len(reverses)))
    ]
    y, h_n, *rest = zip(*scans, strict=True)
    c_n, gates, cells = (x.new_empty(0) if parts[0] is None else torch.stack(parts) for parts in rest)
    return torch.cat(y, -1), torch.stack(h_n), c_n, gates, cells


def _scan_forward(
    cell: Cell,
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    w: LayerWeights,
    lengths: Tensor | None,
    resets: Tensor | None,
    reset_to_initial: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    T, dtype, acc = x.shape[0], x.dtype, accumulation_dtype(x.dtype)
    w_ih, w_hh, b_ih, b_hh, w_hr = (None if p is None else p.to(acc) for p in w)
    assert w_ih is not None and w_hh is not None
    a = F.linear(zero_invalid(x, lengths).to(acc), w_ih, b_ih)  # [T, B, GH]
    c = None if c is None else c.to(acc)
    valid = None if lengths is None else valid_steps(lengths, T)[..., None]
    reset = scan_resets(resets, reset_to_initial, h, c, lengths, reverse)

    y: list[Tensor] = [h] * T
    gates: list[Tensor] = [h] * T
    cells: list[Tensor] = [h] * T
    for t in reversed(range(T)) if reverse else range(T):
        if reset is not None:
            h, c = reset.states(t, h, c)
        h_acc = h.to(acc)
        h_t, c_t, saved = cell.forward(a[t], F.linear(h_acc, w_hh, b_hh), h_acc, c)
        h_t = h_t.to(dtype)
        if w_hr is not None:
            h_t = (h_t.to(acc) @ w_hr.t()).to(dtype)
        y[t] = h_t if valid is None else torch.where(valid[t], h_t, 0)
        h = h_t if valid is None else torch.where(valid[t], h_t, h)
        if c is not None and c_t is not None:
            c = cells[t] = c_t if valid is None else torch.where(valid[t], c_t, c)
        if saved is not None:
            gates[t] = saved.to(dtype) if valid is None else torch.where(valid[t], saved.to(dtype), 0)

    B, H = a.shape[1], a.shape[2] // cell.blocks
    return (
        _stacked(y, x.new_empty(0, B, h.shape[-1])),
        h,
        None if c is None else c.to(dtype),
        _stacked(gates, x.new_empty(0, B, cell.saved * H)) if cell.saved else None,
        _stacked(cells, a.new_empty(0, B, H)) if cell.has_c else None,
    )


def _stacked(steps: list[Tensor], empty: Tensor) -> Tensor:
    """[T, ...]; `empty` where T is 0, which torch.stack refuses."""
    return torch.stack(steps) if steps else empty
