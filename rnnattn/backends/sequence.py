"""A recurrent layer in one launch of a sequence kernel, for any cell without a projection."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rnnattn.backends.stepwise import biases, matmul
from rnnattn.reference import CELLS, DIRECTIONS, accumulation_dtype, scan_resets, split_weights


class Layout(Protocol):
    """The part of a plan that a launch needs."""

    units: int
    chunk: int
    chunks: int
    batch_tile: int
    warps: int


class SequenceKernels(Protocol):
    """`rnnattn.kernels.sequence_forward`."""

    def forward(self, mode: str, *arguments: object) -> None: ...


def layer_forward(
    kernels: SequenceKernels,
    layout: Layout,
    precision: str,
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
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """`rnnattn.reference.recurrent_layer_forward`."""
    cell, reverses = CELLS[mode], DIRECTIONS[direction]
    (T, B, I), (K, _, H), acc = x.shape, h0.shape, accumulation_dtype(x.dtype)
    parts = split_weights(weights, has_biases, K)
    gates_x = matmul(x.reshape(T * B, I), torch.cat([w.w_ih for w in parts]).t()).view(T, B, K * cell.blocks * H)
    pairs = [biases(w, cell.shared, H) for w in parts]
    bias, bias_q = (None if None in given else torch.stack(given).to(acc) for given in zip(*pairs, strict=True))
    width = -(-H // 16) * 16
    states = x.new_empty(T + 2, B, K, H) if width == H else x.new_zeros(T + 2, B, K, width)
    for k, reverse in enumerate(reverses):
        states[T + 1 if reverse else 0, :, k, :H] = h0[k]
    c_full = None if c0 is None else c0.to(acc).contiguous()
    found = [scan_resets(resets, reset_to_initial, h0, None, lengths, reverse) for reverse in reverses]
    flags = None if resets is None else torch.stack([reset.before[..., 0] for reset in found if reset is not None])
    gates = x.new_empty(K, T, B, cell.saved * H) if save and cell.saved else None
    cells = x.new_empty(K, T, B, H, dtype=acc) if save and cell.has_c else None
    h_n, c_n = x.new_empty(K, B, H), None if c0 is None else x.new_empty(K, B, H)
    kernels.forward(
        mode, gates_x, F.pad(torch.stack([w.w_hh for w in parts]), (0, width - H)), bias, bias_q, states, c_full, lengths,
        None if lengths is None else lengths.argsort(descending=True, stable=True), flags, reset_to_initial,
        direction == "reverse", gates, cells, h_n, c_n, layout.units, layout.chunk, layout.chunks, layout.batch_tile, layout.warps,
        precision,
    )  # fmt: skip
    y = states[1 : T + 1, ..., :H].reshape(T, B, K * H)
    return y, h_n, x.new_empty(0) if c_n is None else c_n, gates, cells
