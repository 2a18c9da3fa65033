"""An LSTM layer step by step: torch's GEMMs and one fused cell kernel per step.

The driver that backends without a sequence kernel share. A backend brings the cell kernels
(`CellKernels`); everything else (order of steps, lengths, projection, weight gradients) is here.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from rnnattn.reference import (
    DIRECTIONS,
    accumulation_dtype,
    layer_gradients,
    previous_states,
    split_weights,
    valid_steps,
)


class CellKernels(Protocol):
    """The pointwise part of a step. acc is the accumulation type (fp32 for 16-bit and fp32).

    Rows may be strided, elements of a row are contiguous. A row b with t >= lengths[b] is invalid.
    """

    def forward(
        self,
        gates_x: Tensor,  # [B, 4H] acc, W_ih x_t + b_ih + b_hh
        gates_h: Tensor,  # [B, 4H] acc, W_hh h_{t-1}
        c_prev: Tensor,  # [B, H] acc
        h_prev: Tensor | None,  # [B, H] the state an invalid row keeps; given where h is
        lengths: Tensor | None,  # int64 [B]
        t: int,
        gates: Tensor | None,  # out [B, 4H], activated; zero in invalid rows
        c: Tensor,  # out [B, H] acc, c_prev in invalid rows
        y: Tensor,  # out [B, H], h_t; zero in invalid rows
        h: Tensor | None,  # out [B, H], h_t; h_prev in invalid rows; may be None with lengths too
    ) -> None: ...

    def backward(
        self,
        dh: Tensor,  # [B, H] acc, the whole gradient of o * tanh(c_t)
        dc: Tensor,  # in/out [B, H] acc, gradient of c_t -> of c_{t-1}; kept in invalid rows
        gates: Tensor,  # [B, 4H], activated
        c: Tensor,  # [B, H] acc
        c_prev: Tensor,  # [B, H] acc
        lengths: Tensor | None,
        t: int,
        d_gates: Tensor,  # out [B, 4H] in the dtype of gates, zero in invalid rows
    ) -> None: ...


def wide(a: Tensor) -> Tensor:
    """An operand of `matmul`, made ready once: torch has 16-bit GEMMs with fp32 results on CUDA only."""
    return a if a.is_cuda else a.to(accumulation_dtype(a.dtype))


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of 2-D operands with the result in the accumulation type, not rounded in between."""
    acc = accumulation_dtype(a.dtype)
    if a.is_cuda and a.dtype != acc:
        return torch.mm(a, b, out_dtype=acc)
    return torch.mm(wide(a), wide(b))


def lstm_layer_forward(
    cell: CellKernels,
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: list[Tensor],
    lengths: Tensor | None,
    has_biases: bool,
    direction: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """`rnnattn.reference.recurrent_layer_forward` for an LSTM."""
    reverses = DIRECTIONS[direction]
    (T, B, I), (K, _, R), H = x.shape, h0.shape, c0.shape[-1]
    acc = accumulation_dtype(x.dtype)
    y = x.new_empty(T, B, K * R)
    h_n, c_n = torch.empty_like(h0), torch.empty_like(c0)
    gates = x.new_empty(K, T, B, 4 * H) if save else None
    cells = x.new_empty(K, T, B, H, dtype=acc) if save else None
    valid = None if lengths is None else valid_steps(lengths, T)
    for k, w in enumerate(split_weights(weights, has_biases, K)):
        gates_x = matmul(x.reshape(T * B, I), w.w_ih.t()).view(T, B, 4 * H)
        if w.b_ih is not None and w.b_hh is not None:
            gates_x += w.b_ih.to(acc) + w.b_hh.to(acc)
        w_hh_t = wide(w.w_hh.t())
        w_hr_t = None if w.w_hr is None else wide(w.w_hr.t())
        h, c = h0[k].contiguous(), c0[k].to(acc).contiguous()
        spare = torch.empty_like(c), torch.empty_like(c)
        for n, t in enumerate(reversed(range(T)) if reverses[k] else range(T)):
            gates_h = matmul(h, w_hh_t)
            gates_t = None if gates is None else gates[k, t]
            c_next = spare[n % 2] if cells is None else cells[k, t]
            y_t = y[t, :, k * R : (k + 1) * R]
            if w_hr_t is None:
                h_next = y_t if lengths is None else torch.empty_like(h)
                cell.forward(
                    gates_x[t], gates_h, c, None if lengths is None else h, lengths, t,
                    gates_t, c_next, y_t, None if lengths is None else h_next,
                )  # fmt: skip
            else:
                h_raw = x.new_empty(B, H)
                cell.forward(gates_x[t], gates_h, c, None, lengths, t, gates_t, c_next, h_raw, None)
                h_next = matmul(h_raw, w_hr_t).to(x.dtype)
                y_t.copy_(h_next)
                if valid is not None:
                    h_next = torch.where(valid[t][:, None], h_next, h)
            h, c = h_next, c_next
        h_n[k], c_n[k] = h, c
    return y, h_n, c_n, gates, cells


def lstm_layer_backward(
    cell: CellKernels,
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
    needs_dx: bool,
    needs_dweights: bool,
) -> tuple[Tensor | None, Tensor, Tensor, list[Tensor] | None]:
    """`rnnattn.reference.recurrent_layer_backward` for an LSTM."""
    reverses = DIRECTIONS[direction]
    (T, B, I), (K, _, R), H = x.shape, h0.shape, c0.shape[-1]
    acc = cells.dtype
    valid = None if lengths is None else valid_steps(lengths, T)
    dx = x.new_zeros(T * B, I, dtype=acc) if needs_dx else None
    dh0, dc0 = torch.empty_like(h0), torch.empty_like(c0)
    dweights: list[Tensor] | None = [] if needs_dweights else None
    for k, w in enumerate(split_weights(weights, has_biases, K)):
        w_hh = wide(w.w_hh)
        w_hr = None if w.w_hr is None else wide(w.w_hr)
        columns = slice(k * R, (k + 1) * R)
        d_gates = torch.empty_like(gates[k])
        dh_out = None if w_hr is None else x.new_zeros(T, B, R, dtype=acc)
        dh = torch.zeros_like(h0[k], dtype=acc) if dh_n is None else dh_n[k].to(acc)
        dc = torch.zeros_like(c0[k], dtype=acc) if dc_n is None else dc_n[k].to(acc, copy=True)
        dc = dc.contiguous()
        steps = list(reversed(range(T)) if reverses[k] else range(T))
        for n in reversed(range(T)):
            t = steps[n]
            c_prev = cells[k, steps[n - 1]] if n > 0 else c0[k].to(acc).contiguous()
            dh_t = dh if dy is None else dh + dy[t, :, columns]
            if w_hr is None:
                dh_raw = dh_t.contiguous()
            else:
                dh_raw = _times(dh_t, w_hr)
                assert dh_out is not None
                dh_out[t] = dh_t if valid is None else torch.where(valid[t][:, None], dh_t, 0)
            cell.backward(dh_raw, dc, gates[k, t], cells[k, t], c_prev, lengths, t, d_gates[t])
            dh_prev = matmul(d_gates[t], w_hh)
            dh = dh_prev if valid is None else torch.where(valid[t][:, None], dh_prev, dh)
        dh0[k], dc0[k] = dh, dc
        if dx is not None:
            dx += matmul(d_gates.view(T * B, 4 * H), w.w_ih)
        if dweights is not None:
            dweights += layer_gradients(
                d_gates, None, dh_out if dh_out is None else dh_out.to(x.dtype), x,
                previous_states(y[..., columns], h0[k], lengths, reverses[k]), gates[k], cells[k], w, lengths,
            )  # fmt: skip
    return None if dx is None else dx.view(T, B, I).to(x.dtype), dh0, dc0, dweights


def _times(dh: Tensor, w_hr: Tensor) -> Tensor:
    """dh [B, R] acc times w_hr [R, H], at the weights' precision where they are 16-bit (on CUDA)."""
    return matmul(dh.to(w_hr.dtype), w_hr)
