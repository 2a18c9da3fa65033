"""A recurrent layer, or a stack of them, in one launch of a sequence kernel each way, for any cell without a
projection."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rnnattn.backends.products import matmul, recurrent_multiply
from rnnattn.backends.rows import Rows
from rnnattn.backends.sequence_tiles import ALIGNED
from rnnattn.backends.stepwise import biases, contiguous
from rnnattn.backends.stepwise_backward import start
from rnnattn.reference import (
    CELLS,
    STACK,
    LayerWeights,
    Resets,
    accumulation_dtype,
    layer_gradients,
    reverses_of,
    scan_resets,
    split_weights,
)


class Launch(NamedTuple):
    """How a layer is cut into programs: the part of a `sequence_plan.Plan` that the kernels take."""

    units: int
    parts: int  # of the backward's sums side by side
    chunk: int
    chunks: int
    ahead: int  # chunks of h (db) on their way at once
    apart: bool  # whether their products are added up by themselves
    batch_tile: int
    warps: int
    registers: int  # that the assembler is to take for a thread; 0 for as many as it likes
    resident: int  # groups in one launch


class SequenceKernels(Protocol):
    """`sequence_forward` and `sequence_backward` of rnnattn.kernels."""

    def forward(self, mode: str, *arguments: Any) -> None: ...

    def backward(self, mode: str, *arguments: Any) -> None: ...


def layer_forward(
    kernels: SequenceKernels,
    launch: Launch,
    precision: str,
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
    """`rnnattn.reference.recurrent_layer_forward`, of one row and step at least."""
    cell, stacked, lengths = CELLS[mode], direction == STACK and len(h0) > 1, rows.lengths
    N, (K, B, H), acc = rows.N, h0.shape, accumulation_dtype(x.dtype)
    steps, reverses = x.shape[:-1], reverses_of(direction, K)
    parts = split_weights(weights, has_biases, K)
    w_ih = parts[0].w_ih if stacked else torch.cat([w.w_ih for w in parts])
    gates_x = matmul(x.flatten(0, -2), w_ih.t(), recurrent_multiply(x))
    bias = torch.stack([_bias(w, cell.shared, H) for w in parts]).to(acc) if has_biases else None
    w_hh, width = _padded([w.w_hh for w in parts])
    w_x = _padded([w.w_ih for w in parts[1:]])[0] if stacked else None
    states = x.new_empty(N + 2 * B, K, H) if width == H else x.new_zeros(N + 2 * B, K, width)
    for k, reverse in enumerate(reverses):
        (states[-B:, k, :H] if reverse else states[:B, k, :H]).copy_(h0[k])
    gates = x.new_empty(K, *steps, cell.saved * H) if save and cell.saved else None
    cells = x.new_empty(K, *steps, H, dtype=acc) if save and cell.has_c else None
    h_n, c_n = x.new_empty(K, B, H), None if c0 is None else x.new_empty(K, B, H)
    anew = [scan_resets(resets, reset_to_initial, h0[k], None, lengths, reverse) for k, reverse in enumerate(reverses)]
    kernels.forward(
        mode, gates_x, w_hh, w_x, bias, states, None if c0 is None else c0.to(acc).contiguous(), lengths,
        _order(rows), rows.slots, _flags(anew), reset_to_initial, reverses == (True,), gates, cells, h_n, c_n,
        launch.units, launch.chunk, launch.chunks, launch.ahead, launch.apart, launch.batch_tile, launch.warps,
        launch.registers, launch.resident, precision,
    )  # fmt: skip
    y = x.new_empty(*steps, K * H)  # no view: the caller may do with it what it likes
    y.view(N, K, H).copy_(states[B : B + N, :, :H])
    return y, h_n, x.new_empty(0) if c_n is None else c_n, gates, cells


def layer_backward(
    kernels: SequenceKernels,
    launch: Launch,
    precision: str,
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
    """`rnnattn.reference.recurrent_layer_backward`, of one row and step at least."""
    cell, stacked, lengths = CELLS[mode], direction == STACK and len(h0) > 1, rows.lengths
    N, K, acc = rows.N, len(h0), accumulation_dtype(x.dtype)
    reverses = reverses_of(direction, K)
    parts = split_weights(weights, has_biases, K)
    GH, outputs, multiply = cell.blocks * h0.shape[-1], y.chunk(K, -1), recurrent_multiply(x)
    anew = [scan_resets(resets, reset_to_initial, h0[k], None, lengths, reverse) for k, reverse in enumerate(reverses)]
    h_prev: Tensor | None = None
    if needs_dweights or not cell.shared:
        each = zip(outputs, h0, anew, reverses, strict=True)
        h_prev = torch.stack([rows.previous(y_k, h_k, reset, reverse) for y_k, h_k, reset, reverse in each])
    dy, gates_k, cells_k = contiguous(dy, gates if cell.saved else None, cells if cell.has_c else None)
    c_full = None if c0 is None else c0.to(acc).contiguous()
    dh, dc = start(dh_n, h0), None if c0 is None else start(dc_n, c0)
    da = x.new_empty(N, K, -(-GH // ALIGNED) * ALIGNED)
    db = None if cell.shared else torch.empty_like(da)
    kernels.backward(
        mode, dy, None if dcells is None else dcells.to(acc).contiguous(), _padded([w.w_hh for w in parts])[0],
        _padded([w.w_ih for w in parts[1:]])[0] if stacked else None, None if cell.saved else y.contiguous(),
        None if cell.shared else h_prev, gates_k, cells_k, c_full, lengths, _order(rows), rows.slots,
        _flags(anew), reset_to_initial, reverses == (True,), dh, dc, da, db, launch.units, launch.parts, launch.chunk,
        launch.chunks, launch.ahead, launch.batch_tile, launch.warps, launch.registers, launch.resident, precision,
    )  # fmt: skip
    dx: Tensor | None = None
    if needs_dx:  # of all directions in one product
        scans = 1 if stacked else K
        dx = multiply(da[:, :scans, :GH].reshape(N, -1), torch.cat([w.w_ih for w in parts[:scans]])).view(x.shape)
    dweights: list[Tensor] | None = None
    if needs_dweights and h_prev is not None:
        dweights, valid = [], None if rows.packed else lengths
        for k, w in enumerate(parts):
            da_k, db_k = da[:, k, :GH], None if db is None else db[:, k, :GH]
            x_k = outputs[k - 1] if stacked and k else x
            dweights += layer_gradients(da_k, db_k, None, x_k, h_prev[k], None, None, w, valid, multiply)
    return dx, dh.to(x.dtype), x.new_empty(0) if dc is None else dc.to(x.dtype), dweights


def _padded(weights: list[Tensor]) -> tuple[Tensor, int]:
    """[len, GH, width] of matrices [GH, H], and width: H made a multiple of what the kernels read at once."""
    H = weights[0].shape[1]
    width = -(-H // ALIGNED) * ALIGNED
    return F.pad(torch.stack(weights), (0, width - H)), width


def _bias(w: LayerWeights, shared: bool, H: int) -> Tensor:
    """What is added to both products: a GRU's b_hn and b_in apart."""
    bias, bias_q = biases(w, shared, H)
    assert bias is not None
    return bias if bias_q is None else torch.cat([bias[: 2 * H], bias_q.to(bias.dtype), bias[2 * H :]])


def _order(rows: Rows) -> Tensor | None:
    """Rows by falling length, so that those of a tile end together; packed ones are so."""
    if rows.lengths is None or rows.packed:
        return None
    return rows.lengths.argsort(descending=True, stable=True)


def _flags(anew: list[Resets | None]) -> Tensor | None:
    """bool [K, T, B]: where each direction starts anew."""
    found = [reset.before[..., 0] for reset in anew if reset is not None]
    return torch.stack(found) if found else None
