"""A stack of recurrent layers of any cell, or a step of one: argument checks, choice of backend, dropout in between.

`functional.lstm`, `gru` and `rnn` say what the arguments mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rnnattn import autograd, backends
from rnnattn.autocast import autocast_dtype, lowered
from rnnattn.backends import Call
from rnnattn.checks import check_recompute, check_recurrent, checked_resets, checked_steps
from rnnattn.packing import Packing
from rnnattn.reference import CELLS, STACK, has_projection, zero_invalid
from rnnattn.regularised import Regularisation, regularised_layer
from rnnattn.transforms import is_recorded, is_traced, is_transformed, want_equations, wants_grad


def run_stack(
    mode: str,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    lengths: Tensor | Sequence[int] | Packing | None = None,
    resets: Tensor | None = None,
    reset_to_initial: bool = False,
    recompute: str | None = None,
    return_cells: bool = False,
    regularisation: Regularisation | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """output, h_n, c_n (None for a cell without c) and cells (None if not asked for); mode is a key of
    `reference.CELLS`. With a Packing for lengths the sequences are packed rows, and there are no resets."""
    low = autocast_dtype(input)
    if low is not None:
        with torch.autocast(input.device.type, enabled=False):
            return run_stack(
                mode, lowered(input, low), lowered(h0, low), lowered(c0, low), [lowered(w, low) for w in weights],
                has_biases, num_layers, dropout, training, bidirectional, batch_first, lengths, resets,
                reset_to_initial, recompute, return_cells, regularisation,
            )  # fmt: skip
    weights = list(weights)
    x = input.transpose(0, 1) if batch_first else input
    K = 2 if bidirectional else 1
    packing = lengths if isinstance(lengths, Packing) else None
    T, B, lengths = checked_steps(op_name(mode), x, lengths)
    check_recurrent(op_name(mode), CELLS[mode].blocks, x, B, h0, c0, weights, has_biases, num_layers, K)
    resets = checked_resets(resets, input, batch_first)
    ragged, has_resets, regularised = lengths is not None, resets is not None, regularisation is not None
    in_chunks = check_recompute(recompute, resets is not None and reset_to_initial, return_cells) and not is_recorded()
    backend, as_one, looked_on = "reference", False, want_equations(x, h0, c0, *weights)
    if not looked_on:
        call = _call(
            mode, T, B, x, h0, c0, weights, num_layers, K, ragged, has_resets, in_chunks, return_cells,
            dropout != 0 and training, regularised,
        )  # fmt: skip
        backend = backends.select(call).backend
        # Layers below all that are trained are left out of a backward of their own.
        frozen = call.grad and not wants_grad(x, h0, c0, *weights[: len(weights) // num_layers])
        as_one = not frozen and backends.get(backend).stacks(call)
    padded_for = packing if regularised or not backends.get(backend).reads_packed else None
    if padded_for is not None:
        x, packing = padded_for.padded(x), None
        lengths = None if lengths is None else lengths.to(x.device, non_blocking=True)
    cells = None
    if backend == "torch":
        y, h_n, c_n = backends.TORCH.recurrent(
            mode, x, h0, c0, weights, has_biases, num_layers, dropout, training, bidirectional, lengths,
            None if packing is None else packing.batch_sizes,
        )  # fmt: skip
    else:
        y, h_n, c_n, cells = _layers(
            mode, x, h0, c0, weights, has_biases, num_layers, dropout, training, K, lengths, resets, reset_to_initial,
            backend, as_one, in_chunks and not (looked_on or is_transformed()),
            return_cells, regularisation, padded_for,
        )  # fmt: skip
    if cells is not None:
        cells = cells if packing is not None else zero_invalid(cells, lengths)
        cells = cells.movedim(0, -2).flatten(-2).to(y.dtype)  # [T, B, K * H]
    if padded_for is not None:
        y, cells = padded_for.packed(y), None if cells is None else padded_for.packed(cells)
    if batch_first:
        y, cells = y.transpose(0, 1), None if cells is None else cells.transpose(0, 1)
    return y, h_n, c_n, cells


def run_step(
    mode: str,
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """h' and c' (None for a cell without c) of one step; x [B, I], states [B, H]."""
    given = [b for b in (b_ih, b_hh) if b is not None]
    biases = [torch.zeros_like(given[0]) if b is None else b for b in (b_ih, b_hh)] if given else []
    x, c0 = x.to_dense() if x.is_sparse else x, None if c is None else c[None]  # a product takes sparse rows
    _, h_n, c_n, _ = run_stack(mode, x[None], h[None], c0, [w_ih, w_hh, *biases], has_biases=len(biases) > 0)
    return h_n[0].clone(), None if c_n is None else c_n[0].clone()  # no views, which cannot be detached in place


def _layers(
    mode: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    K: int,
    lengths: Tensor | None,
    resets: Tensor | None,
    reset_to_initial: bool,
    backend: str,
    as_one: bool,
    in_chunks: bool,
    with_cells: bool,
    regularisation: Regularisation | None,
    packing: Packing | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """y, h_n, c_n, and cells [K, T, B, H] of the last layer, as they are in the operator; packing: of rows that are
    padded here."""
    if as_one:
        y, h, c, cells = autograd.recurrent_layer(
            x, h0, c0, weights, lengths, resets, reset_to_initial, has_biases, STACK, mode, backend, with_cells
        )
        return y[..., -h0.shape[-1] :].contiguous(), h, c, None if cells is None else cells[-1:]
    direction = "bidirectional" if K == 2 else "forward"
    per_layer = len(weights) // num_layers
    h_n: list[Tensor] = []
    c_n: list[Tensor] = []
    cells = None
    for layer in range(num_layers):
        if layer > 0 and dropout != 0 and training:
            # What is packed is dropped packed, whoever runs it, so that a seed draws the same.
            rows = torch.dropout(x if packing is None else packing.packed(x), dropout, True)
            x = rows if packing is None else packing.padded(rows)
        states = slice(layer * K, (layer + 1) * K)
        own = weights[layer * per_layer : (layer + 1) * per_layer]
        if regularisation is not None:
            x, own = regularisation.dropped(x, own, K)
        inputs = x, h0[states], None if c0 is None else c0[states], own, lengths, resets
        wanted = with_cells and layer == num_layers - 1
        if regularisation is not None and regularisation.of_scan:
            x, h, c, cells = regularised_layer(
                *inputs, reset_to_initial, has_biases, direction, mode, backend, wanted, regularisation, layer
            )
        elif in_chunks and wants_grad(x, *inputs[1:3], *own):
            x, h, c = autograd.recurrent_layer_in_chunks(*inputs, has_biases, direction, mode, backend)
        else:
            x, h, c, cells = autograd.recurrent_layer(
                *inputs, reset_to_initial, has_biases, direction, mode, backend, wanted
            )
        h_n.append(h)
        if c is not None:
            c_n.append(c)
    if num_layers == 1:
        return x, h_n[0], c_n[0] if c_n else None, cells
    return x, torch.cat(h_n), torch.cat(c_n) if c_n else None, cells


def op_name(mode: str) -> str:
    """The function that users call: lstm, gru or rnn."""
    return mode.split("_")[0].lower()


def takes_cpp(mode: str, dtype: torch.dtype, I: int, H: int) -> bool:
    """Whether calls on a CPU without lengths and resets run on backend cpp, with and without gradients; how long they
    are, of how many rows and layers makes no difference."""
    call = Call(op_name(mode), "cpu", dtype, 1, 1, I, H)
    return all(backends.select(replace(call, grad=grad)).backend == "cpp" for grad in (False, True))


def _call(
    mode: str,
    T: int,
    B: int,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    num_layers: int,
    K: int,
    ragged: bool,
    resets: bool,
    in_chunks: bool,
    cells: bool,
    dropout: bool,
    regularised: bool,
) -> Call:
    """What `backends.select` needs to know."""
    I, R = x.shape[-1], h0.shape[-1]
    H, projected = R if c0 is None else c0.shape[-1], has_projection(weights, num_layers * K)
    return Call(
        op_name(mode), x.device.type, x.dtype, B, T, I, H, num_layers, K, R if projected else 0, ragged,
        wants_grad(x, h0, c0, *weights), torch.compiler.is_compiling(), resets, in_chunks, cells,
        dropout, regularised, is_traced(),
    )  # fmt: skip
