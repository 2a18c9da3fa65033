"""A recurrent layer step by step: torch's GEMMs and one fused kernel per step, for any cell.

The driver that backends without a sequence kernel share. A backend brings the pointwise part of a step
(`StepKernels`); everything else (order of steps, lengths, resets, projection) is here, and for the backward in
`stepwise_backward`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from rnnattn.backends.products import matmul, recurrent_multiply, wide
from rnnattn.backends.rows import Rows, following
from rnnattn.reference import (
    CELLS,
    DIRECTIONS,
    LayerWeights,
    accumulation_dtype,
    scan_resets,
    split_weights,
    valid_steps,
)


class StepKernels(Protocol):
    """The pointwise part of a step of the cell `mode`, a key of `reference.CELLS` with its G blocks and S saved values.

    acc is the accumulation type (fp32 for 16-bit and fp32). Rows may be strided, elements of a row are
    contiguous. A row b with t >= lengths[b] is invalid; one with resets[b] starts from other states: those
    given as h_reset and c_reset, with gates_reset = W_hh h_reset, or zeros.
    """

    def forward(
        self,
        mode: str,
        gates_x: Tensor,  # [B, GH] acc, W_ih x_t + b_ih + b_hh (GRU: without b_hn)
        gates_h: Tensor,  # [B, GH] acc, W_hh h_{t-1}
        bias_q: Tensor | None,  # [H] b_hn, GRU with biases
        h_prev: Tensor | None,  # [B, H]; GRU, and what an invalid row of h keeps
        c_prev: Tensor | None,  # [B, H] acc; LSTM
        lengths: Tensor | None,  # int64 [B]
        t: int,
        resets: Tensor | None,  # bool [B]
        gates_reset: Tensor | None,  # [B, GH] acc
        h_reset: Tensor | None,  # [B, H]; GRU
        c_reset: Tensor | None,  # [B, H] acc; LSTM
        gates: Tensor | None,  # out [B, SH]; zero in invalid rows
        c: Tensor | None,  # out [B, H] acc, c_prev in invalid rows; LSTM
        y: Tensor,  # out [B, H], h_t; zero in invalid rows
        h: Tensor | None,  # out [B, H], h_t; h_prev in invalid rows; may be None with lengths too
    ) -> None: ...

    def backward(
        self,
        mode: str,
        dy: Tensor | None,  # [B, H]
        product: Tensor | None,  # [B, H] acc, W_hh^T db of the step after
        dh: Tensor | None,  # in/out [B, H] acc, the rest of the gradient of h_t -> of h_{t-1}; may be None for zero
        dc: Tensor | None,  # in/out [B, H] acc, gradient of c_t -> of c_{t-1}; kept in invalid rows; LSTM
        gates: Tensor | None,  # [B, SH]
        y: Tensor | None,  # [B, H]; RNN
        h_prev: Tensor | None,  # [B, H], what the step started from; GRU
        c: Tensor | None,  # [B, H] acc; LSTM
        c_prev: Tensor | None,  # [B, H] acc; LSTM
        lengths: Tensor | None,
        t: int,
        resets: Tensor | None,  # bool [B], of this step
        resets_after: Tensor | None,  # bool [B], of the step after, which takes no gradient of those states
        c_reset: Tensor | None,  # [B, H] acc; LSTM
        dh_reset: Tensor | None,  # in/out [B, H] acc, sums of what the step after did not take
        dc_reset: Tensor | None,  # in/out [B, H] acc; LSTM
        da: Tensor,  # out [B, GH], gradient of gates_x; zero in invalid rows
        db: Tensor | None,  # out [B, GH], of gates_h, where that is another; GRU
    ) -> None: ...


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """The operands of kernels, those that there are."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def layer_forward(
    kernels: StepKernels,
    rows: Rows,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    resets: Tensor | None,
    reset_to_initial: bool,
    has_biases: bool,
    direction: str,
    mode: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """`rnnattn.reference.recurrent_layer_forward`."""
    cell, reverses = CELLS[mode], DIRECTIONS[direction]
    T, (K, _, R), steps = rows.T, h0.shape, x.shape[:-1]
    H, acc, multiply = weights[0].shape[0] // cell.blocks, accumulation_dtype(x.dtype), recurrent_multiply(x)
    y = x.new_empty(*steps, K * R)
    h_n, c_n = torch.empty_like(h0), x.new_empty(0) if c0 is None else torch.empty_like(c0)
    gates = x.new_empty(K, *steps, cell.saved * H) if save and cell.saved else None
    cells = x.new_empty(K, *steps, H, dtype=acc) if save and cell.has_c else None
    lengths = None if rows.packed else rows.lengths  # packed, a step has no row whose length is over
    valid = None if lengths is None else valid_steps(lengths, T)
    for k, w in enumerate(split_weights(weights, has_biases, K)):
        gates_x = matmul(x.flatten(0, -2), w.w_ih.t(), multiply).unflatten(0, steps)
        bias, bias_q = biases(w, cell.shared, H)
        if bias is not None:
            gates_x += bias
        w_hh_t = wide(w.w_hh.t())
        w_hr_t = None if w.w_hr is None else wide(w.w_hr.t())
        h_first, c_first = h0[k].contiguous(), None if c0 is None else c0[k].to(acc).contiguous()
        reset = scan_resets(resets, reset_to_initial, h_first, c_first, lengths, reverses[k])
        flags = None if reset is None else reset.before[..., 0].contiguous()
        h_reset, c_reset = (h_first, c_first) if flags is not None and reset_to_initial else (None, None)
        gates_reset = None if h_reset is None else matmul(h_reset, w_hh_t, multiply)
        spare = () if c_first is None else (torch.empty_like(c_first), torch.empty_like(c_first))
        takes_h = w_hr_t is None and (lengths is not None or not cell.shared)
        h, c, y_k = h_first, c_first, y[..., k * R : (k + 1) * R]
        for n, t in enumerate(reversed(range(T)) if reverses[k] else range(T)):
            y_t, size = rows.of_step(t, y_k), rows.sizes[t]
            h = following(h, size, h_first, h_n[k])
            if c is not None and c_first is not None:
                c = following(c, size, c_first, c_n[k])
            c_next = rows.of_step(t, cells[k]) if cells is not None else spare[n % 2][:size] if spare else None
            h_next = y_t if lengths is None else torch.empty_like(h)
            projected = None if w_hr_t is None else x.new_empty(size, H)
            kernels.forward(
                mode, rows.of_step(t, gates_x), matmul(h, w_hh_t, multiply), bias_q, h if takes_h else None, c,
                lengths, t, None if flags is None else flags[t], gates_reset, None if cell.shared else h_reset, c_reset,
                None if gates is None else rows.of_step(t, gates[k]), c_next, y_t if projected is None else projected,
                None if lengths is None or projected is not None else h_next,
            )  # fmt: skip
            if projected is not None and w_hr_t is not None:
                h_next = matmul(projected, w_hr_t, multiply).to(x.dtype)
                y_t.copy_(h_next)
                if valid is not None:
                    h_next = torch.where(valid[t][:, None], h_next, h)
            h, c = h_next, c_next
        h_n[k, : len(h)] = h
        if c is not None:
            c_n[k, : len(c)] = c
    return y, h_n, c_n, gates, cells


def biases(w: LayerWeights, shared: bool, H: int) -> tuple[Tensor | None, Tensor | None]:
    """What is added to the input product, and what stays inside r * (...)."""
    if w.b_ih is None or w.b_hh is None:
        return None, None
    acc = accumulation_dtype(w.b_ih.dtype)
    if shared:
        return w.b_ih.to(acc) + w.b_hh.to(acc), None
    bias = w.b_ih.to(acc, copy=True)
    bias[: 2 * H] += w.b_hh[: 2 * H]
    return bias, w.b_hh[2 * H :].contiguous()
