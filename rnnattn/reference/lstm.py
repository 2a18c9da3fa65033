"""One LSTM layer over a sequence, forward and backward, in plain PyTorch.

    i, f, o = sigmoid(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)      (rows i, f, o)
    g       = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)         (rows g)
    c_t     = f * c_{t-1} + i * g
    h_t     = W_hr (o * tanh(c_t))                                 (W_hr: only with a projection)

Source: Hochreiter & Schmidhuber 1997 with forget gates (Gers et al. 2000); projection after
Sak et al. 2014; gate order and biases as in torch.nn.LSTM.

Arithmetic runs in the accumulation type (fp32 for 16-bit inputs, else the input's own); h_t is
rounded to the input's type where it leaves the step, c_t never is. Step t of row b is valid
where t < lengths[b]; other steps carry the state on, give y = 0, and x and dy are not read there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# direction -> whether each scan of the layer runs backwards in time
DIRECTIONS: dict[str, tuple[bool, ...]] = {
    "forward": (False,),
    "reverse": (True,),
    "bidirectional": (False, True),
}


class LayerWeights(NamedTuple):
    """The parameters of one direction of a layer."""

    w_ih: Tensor  # [4H, I]
    w_hh: Tensor  # [4H, R]
    b_ih: Tensor | None  # [4H]
    b_hh: Tensor | None  # [4H]
    w_hr: Tensor | None  # [R, H]


def split_weights(weights: list[Tensor], has_biases: bool, directions: int) -> list[LayerWeights]:
    """Parts a flat list (torch's `_flat_weights` order for one layer) into directions."""
    per_direction = len(weights) // directions
    parts = []
    for k in range(directions):
        w = list(weights[k * per_direction : (k + 1) * per_direction])
        b_ih, b_hh = (w[2], w[3]) if has_biases else (None, None)
        has_projection = per_direction == (5 if has_biases else 3)
        parts.append(LayerWeights(w[0], w[1], b_ih, b_hh, w[-1] if has_projection else None))
    return parts


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def valid_steps(lengths: Tensor, steps: int) -> Tensor:
    """bool [T, B], True where step t of row b lies inside the row's length."""
    return torch.arange(steps, device=lengths.device)[:, None] < lengths[None, :]


def lstm_layer_forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: list[Tensor],
    lengths: Tensor | None,
    has_biases: bool,
    direction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One layer over a sequence; differentiable by autograd.

    Args:
        x: [T, B, I].
        h0, c0: [K, B, R] and [K, B, H].
        weights: K times w_ih [4H, I], w_hh [4H, R], (b_ih, b_hh [4H]), (w_hr [R, H]).
        lengths: integers [B] on x's device, 0 <= lengths <= T, or None for T everywhere.
        direction: a key of `DIRECTIONS`.

    Returns:
        y [T, B, K * R], h_n [K, B, R], c_n [K, B, H] in x's dtype, and what the backward needs:
        gates [K, T, B, 4H] after the activation in x's dtype, zero at invalid steps, and
        cells [K, T, B, H] in the accumulation type, the state carried on at invalid steps.
    """
    reverses = DIRECTIONS[direction]
    scans = [
        _scan_forward(x, h0[k], c0[k], w, lengths, reverses[k])
        for k, w in enumerate(split_weights(weights, has_biases, len(reverses)))
    ]
    y, h_n, c_n, gates, cells = zip(*scans, strict=True)
    return torch.cat(y, -1), torch.stack(h_n), torch.stack(c_n), torch.stack(gates), torch.stack(cells)


def _scan_forward(
    x: Tensor, h: Tensor, c: Tensor, w: LayerWeights, lengths: Tensor | None, reverse: bool
) -> tuple[Tensor, ...]:
    T, B, _ = x.shape
    H = c.shape[-1]
    acc = accumulation_dtype(x.dtype)
    x = _zero_invalid(x, lengths).to(acc)
    gates_x = x @ w.w_ih.to(acc).t()  # [T, B, 4H]
    if w.b_ih is not None and w.b_hh is not None:
        gates_x = gates_x + (w.b_ih.to(acc) + w.b_hh.to(acc))
    w_hh, c = w.w_hh.to(acc), c.to(acc)
    valid = None if lengths is None else valid_steps(lengths, T)

    y: list[Tensor] = [h] * T
    gates: list[Tensor] = [h] * T
    cells: list[Tensor] = [c] * T
    for t in reversed(range(T)) if reverse else range(T):
        i, f, g, o = (gates_x[t] + h.to(acc) @ w_hh.t()).chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c_t = f * c + i * g
        h_t = o * c_t.tanh()
        if w.w_hr is not None:
            h_t = h_t.to(x.dtype) @ w.w_hr.to(acc).t()
        h_t, gates_t = h_t.to(h.dtype), torch.cat([i, f, g, o], -1).to(h.dtype)
        y_t = h_t
        if valid is not None:
            v = valid[t][:, None]
            h_t, c_t = torch.where(v, h_t, h), torch.where(v, c_t, c)
            y_t, gates_t = torch.where(v, y_t, 0), torch.where(v, gates_t, 0)
        h, c = h_t, c_t
        y[t], gates[t], cells[t] = y_t, gates_t, c_t

    if T == 0:
        empty = x.new_zeros
        return empty(0, B, h.shape[-1]).to(h.dtype), h, c.to(h.dtype), empty(0, B, 4 * H).to(h.dtype), empty(0, B, H)
    return torch.stack(y), h, c.to(h.dtype), torch.stack(gates), torch.stack(cells)


def lstm_layer_backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: list[Tensor],
    lengths: Tensor | None,
    y: Tensor,
    gates: Tensor,
    cells: Tensor,
    has_biases: bool,
    direction: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients of `lstm_layer_forward` by the explicit equations.

    Args:
        dy, dh_n, dc_n: cotangents of y, h_n and c_n, or None for zero.
        y, gates, cells: what the forward returned; the rest as given to it.

    Returns:
        dx [T, B, I], dh0 [K, B, R], dc0 [K, B, H] and, per direction, dw_ih, dw_hh,
        (db, which is the gradient of b_ih and of b_hh), (dw_hr).
    """
    reverses = DIRECTIONS[direction]
    K, R = len(reverses), h0.shape[-1]
    acc = accumulation_dtype(x.dtype)
    dx = torch.zeros(x.shape, dtype=acc, device=x.device)
    dh0, dc0 = torch.empty_like(h0), torch.empty_like(c0)
    dweights: list[Tensor] = []
    for k, w in enumerate(split_weights(weights, has_biases, K)):
        d_gates, dh_out, dh, dc = _scan_backward(
            None if dy is None else dy[..., k * R : (k + 1) * R],
            None if dh_n is None else dh_n[k],
            None if dc_n is None else dc_n[k],
            c0[k], w, lengths, gates[k], cells[k], reverses[k], h0.shape,
        )  # fmt: skip
        dh0[k], dc0[k] = dh, dc
        dx += d_gates @ w.w_ih.to(acc)
        dweights += layer_gradients(
            d_gates, dh_out, x, y[..., k * R : (k + 1) * R], h0[k],
            gates[k], cells[k], w, lengths, reverses[k],
        )  # fmt: skip
    return dx.to(x.dtype), dh0, dc0, dweights


def _scan_backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    c0: Tensor,
    w: LayerWeights,
    lengths: Tensor | None,
    gates: Tensor,
    cells: Tensor,
    reverse: bool,
    state_shape: torch.Size,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d_gates [T, B, 4H] and dh_out [T, B, R] (the whole gradient of h_t), dh0 and dc0."""
    T, B, H = cells.shape
    acc = cells.dtype
    valid = None if lengths is None else valid_steps(lengths, T)
    zeros = torch.zeros
    dh = zeros(B, state_shape[-1], dtype=acc, device=c0.device) if dh_n is None else dh_n.to(acc)
    dc = zeros(B, H, dtype=acc, device=c0.device) if dc_n is None else dc_n.to(acc)
    d_gates = zeros(T, B, 4 * H, dtype=acc, device=c0.device)
    dh_out = zeros(T, B, state_shape[-1], dtype=acc, device=c0.device)
    steps = list(reversed(range(T)) if reverse else range(T))
    for n in reversed(range(T)):
        t = steps[n]
        c_prev = cells[steps[n - 1]] if n > 0 else c0.to(acc)
        dh_t = dh if dy is None else dh + dy[t].to(acc)
        dh_raw = dh_t if w.w_hr is None else dh_t @ w.w_hr.to(acc)
        i, f, g, o = gates[t].to(acc).chunk(4, -1)
        tanh_c = cells[t].tanh()
        dc_t = dc + dh_raw * o * (1 - tanh_c * tanh_c)
        d_gates_t = torch.cat(
            [
                dc_t * g * i * (1 - i),
                dc_t * c_prev * f * (1 - f),
                dc_t * i * (1 - g * g),
                dh_raw * tanh_c * o * (1 - o),
            ],
            -1,
        )
        dh_prev, dc_prev = d_gates_t @ w.w_hh.to(acc), dc_t * f
        if valid is not None:
            v = valid[t][:, None]
            d_gates_t, dh_t = torch.where(v, d_gates_t, 0), torch.where(v, dh_t, 0)
            dh_prev, dc_prev = torch.where(v, dh_prev, dh), torch.where(v, dc_prev, dc)
        d_gates[t], dh_out[t], dh, dc = d_gates_t, dh_t, dh_prev, dc_prev
    return d_gates, dh_out, dh, dc


def layer_gradients(
    d_gates: Tensor,
    dh_out: Tensor | None,
    x: Tensor,
    y: Tensor,
    h0: Tensor,
    gates: Tensor,
    cells: Tensor,
    w: LayerWeights,
    lengths: Tensor | None,
    reverse: bool,
) -> list[Tensor]:
    """Weight gradients of one direction: GEMMs over all steps at once, after the scan.

    Args:
        d_gates: [T, B, 4H], zero at invalid steps; the GEMMs run in its dtype.
        dh_out: [T, B, R], the whole gradient of h_t; read with a projection only.
        y: [T, B, R], this direction's outputs. The rest as in `lstm_layer_backward`.
    """
    acc, flat_t = d_gates.dtype, d_gates.flatten(0, 1).t()
    x = _zero_invalid(x, lengths).to(acc)
    h_prev = _previous_states(y, h0, lengths, reverse).to(acc)
    gradients = [flat_t @ x.flatten(0, 1), flat_t @ h_prev.flatten(0, 1)]
    if w.b_ih is not None:
        gradients.append(flat_t.sum(1))
    if w.w_hr is not None:
        assert dh_out is not None
        o = gates[..., 3 * cells.shape[-1] :]
        h_raw = (o.to(cells.dtype) * cells.tanh()).to(y.dtype).to(acc)
        gradients.append(dh_out.flatten(0, 1).to(acc).t() @ h_raw.flatten(0, 1))
    return [gradient.to(y.dtype) for gradient in gradients]


def _previous_states(y: Tensor, h0: Tensor, lengths: Tensor | None, reverse: bool) -> Tensor:
    """[T, B, R]: the h that step t started from. At a row's last valid step a reverse scan
    starts from h0, not from the zero that stands in y behind it."""
    T = y.shape[0]
    if not reverse:
        return torch.cat([h0[None], y])[:T]
    h_prev = torch.cat([y, h0[None]])[1:]
    if lengths is not None:
        starts = torch.arange(1, T + 1, device=y.device)[:, None] >= lengths[None, :]
        h_prev = torch.where(starts[..., None], h0[None], h_prev)
    return h_prev


def _zero_invalid(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x with zeros at invalid steps, so that whatever stands there (NaN too) stays out."""
    if lengths is None:
        return x
    return torch.where(valid_steps(lengths, x.shape[0])[..., None], x, 0)
