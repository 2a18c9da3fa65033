"""A recurrent layer that is trained in little memory: chunks of its sequence, computed again in the backward pass.

With chunks of sqrt(T) steps, what is kept are the states at their borders, sqrt(T) of them, and for one chunk at a
time what a backward needs (Chen et al. 2016, Training deep nets with sublinear memory cost). The forward is run
twice; gradients are those of the whole, the weights' summed over chunks in the accumulation type.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rnnattn import backends
from rnnattn.autocast import as_forward
from rnnattn.autograd.recurrent import of_each_weight
from rnnattn.packing import batch_sizes_of
from rnnattn.reference import CELLS, DIRECTIONS, accumulation_dtype


def recurrent_layer_in_chunks(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    lengths: Tensor | None,
    resets: Tensor | None,
    has_biases: bool,
    direction: str,
    mode: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`autograd.recurrent_layer`, with resets to zeros alone."""
    reverses, each = DIRECTIONS[direction], len(weights) // len(DIRECTIONS[direction])
    scans = []
    for k, reverse in enumerate(reverses):
        h, c = h0[k : k + 1], None if c0 is None else c0[k : k + 1]
        own = weights[k * each : (k + 1) * each]
        scans.append(ChunkedScan.apply(x, h, c, lengths, resets, has_biases, reverse, mode, backend, *own))
    if len(scans) == 1:
        ((y, h_n, c_n),) = scans
    else:
        ys, hs, cs = zip(*scans, strict=True)
        y, h_n, c_n = torch.cat(ys, -1), torch.cat(hs), torch.cat(cs)
    return y, h_n, None if c0 is None else c_n


@dataclass(frozen=True)
class Chunk:
    """Some steps of a scan, and the rows that take part in them: all, or of packed ones those that have not ended."""

    steps: slice  # in a sequence [T, B, F], or among packed rows [N, F]
    rows: slice  # in a state [1, B, F]
    lengths: Tensor | None  # of these rows, counted from the chunk's first step
    resets: Tensor | None
    begins: Tensor | None  # bool [1, B, 1]: rows whose border to the steps behind is one between two episodes
    last: Tensor | None  # of packed rows, where each one's last step lies among the chunk's

    def left(self, cells: Tensor, reverse: bool) -> Tensor:
        """Of the c of all steps [1, T, B, H], or [1, N, H], those that the scan leaves; not a view, which would keep
        them all."""
        if self.last is None:
            return cells[:, 0 if reverse else -1].clone()
        return cells[:, self.rows].clone() if reverse else cells.index_select(1, self.last)

    def among(self, left: Tensor | None, all_rows: Tensor | None) -> Tensor | None:
        """all_rows with what these rows were left in the place of theirs."""
        if left is None or all_rows is None or self.rows.stop is None:
            return left
        return torch.cat([left, all_rows[:, self.rows.stop :]], 1)

    def entering(self, t: Tensor | None) -> Tensor | None:
        """A state, or its gradient, where the scan goes into the chunk from behind: a reverse one crosses the border
        between two episodes there, which the chunk's own resets do not tell."""
        return t if t is None or self.begins is None else t.masked_fill(self.begins, 0)


def chunks_of(x: Tensor, lengths: Tensor | None, resets: Tensor | None, reverse: bool) -> list[Chunk]:
    """In the order of the scan; of packed rows x the lengths fall."""
    if x.dim() == 3:
        return [_of_padded(start, end, lengths, resets, reverse) for start, end in _spans(x.shape[0], reverse)]
    assert lengths is not None
    lengths = lengths.cpu()
    sizes = batch_sizes_of(lengths)
    starts: list[int] = [0, *sizes.cumsum(0).tolist()]
    chunks = []
    for start, end in _spans(len(sizes), reverse):
        n = int(sizes[start])
        within = (lengths[:n] - start).clamp(max=end - start)
        offsets = torch.tensor(starts[start:end]) - starts[start]
        last = (offsets[within - 1] + torch.arange(n)).to(x.device, non_blocking=True)
        chunks.append(Chunk(slice(starts[start], starts[end]), slice(n), within, None, None, last))
    return chunks


def _of_padded(start: int, end: int, lengths: Tensor | None, resets: Tensor | None, reverse: bool) -> Chunk:
    begins = None
    if resets is not None and reverse and end < resets.shape[0]:
        begins = resets[end] if lengths is None else resets[end] & (end < lengths)
    return Chunk(
        slice(start, end),
        slice(None),
        None if lengths is None else (lengths - start).clamp(0, end - start),
        None if resets is None else resets[start:end],
        None if begins is None else begins[None, :, None],
        None,
    )


def _spans(T: int, reverse: bool) -> list[tuple[int, int]]:
    """The first step of each chunk and the one behind its last, in the order of the scan."""
    size = max(1, math.isqrt(T))
    spans = [(start, min(start + size, T)) for start in range(0, T, size)]
    return spans[::-1] if reverse else spans


class ChunkedScan(torch.autograd.Function):
    """One direction: forward(x, h0, c0, lengths, resets, has_biases, reverse, mode, backend, *weights)."""

    @staticmethod
    def forward(ctx: Any, x, h0, c0, lengths, resets, has_biases, reverse, mode, backend, *weights):  # type: ignore[no-untyped-def]
        acc = accumulation_dtype(x.dtype)
        h, c = h0, None if c0 is None else c0.to(acc)
        y = x.new_empty(*x.shape[:-1], h0.shape[-1])
        borders: list[Tensor | None] = []
        ctx.settings = has_biases, reverse, mode, backend
        for chunk in chunks_of(x, lengths, resets, reverse):
            h, c = chunk.entering(h), chunk.entering(c)
            borders += [h, c]
            y[chunk.steps], h_k, c_k, _, _ = _run(ctx.settings, chunk, x, h, c, weights)
            h, c = chunk.among(h_k, h), chunk.among(c_k, c)
        ctx.save_for_backward(x, lengths, resets, *weights, *borders)
        ctx.weights = len(weights)
        ctx.set_materialize_grads(False)
        return y, h, x.new_empty(0) if c is None else c.to(x.dtype)

    @staticmethod
    @as_forward
    @once_differentiable
    def backward(ctx: Any, dy, dh, dc):  # type: ignore[no-untyped-def]
        x, lengths, resets, *rest = ctx.saved_tensors
        weights, borders = rest[: ctx.weights], rest[ctx.weights :]
        has_biases, reverse, mode, backend = ctx.settings
        run = backends.get(backend).recurrent_layer_backward
        direction, has_c = "reverse" if reverse else "forward", CELLS[mode].has_c
        needs_dx, needs_dweights = ctx.needs_input_grad[0], any(ctx.needs_input_grad[9:])
        dx = x.new_empty(x.shape) if needs_dx else None
        sums: list[Tensor] = []
        for n, chunk in reversed(list(enumerate(chunks_of(x, lengths, resets, reverse)))):
            h, c = borders[2 * n], borders[2 * n + 1]
            y_k, _, _, gates, cells = _run(ctx.settings, chunk, x, h, c, weights)
            rows = (slice(None), chunk.rows)
            dx_k, dh_k, dc_k, own = run(
                None if dy is None else dy[chunk.steps], None if dh is None else dh[rows],
                None if dc is None else dc[rows], None, x[chunk.steps], h[rows],
                None if c is None else c[rows], list(weights), chunk.lengths, chunk.resets, False, y_k, gates, cells,
                has_biases, direction, mode, needs_dx, needs_dweights, True,
            )  # fmt: skip
            dh = chunk.entering(chunk.among(dh_k, torch.zeros_like(h) if dh is None else dh))
            if has_c:
                dc = chunk.entering(chunk.among(dc_k, torch.zeros_like(c) if dc is None else dc))
            if dx is not None and dx_k is not None:
                dx[chunk.steps] = dx_k
            if needs_dweights and own is not None:
                parts = [d.to(accumulation_dtype(d.dtype)) for d in own]
                sums = parts if not sums else [total.add_(part) for total, part in zip(sums, parts, strict=True)]
        dweights: list[Tensor | None] = [None] * len(weights)
        if sums:
            own = [total.to(x.dtype) for total in sums]
            dweights = of_each_weight(own, len(weights), has_biases, direction, mode)
        return dx, dh, None if dc is None else dc.to(x.dtype), *[None] * 6, *dweights


def _run(settings, chunk, x, h, c, weights):  # type: ignore[no-untyped-def]
    """y, h_n, c_n, gates and cells of the chunk's steps and rows; c and c_n in the accumulation type."""
    has_biases, reverse, mode, backend = settings
    direction, c = "reverse" if reverse else "forward", None if c is None else c[:, chunk.rows]
    y, h, _, gates, cells = backends.get(backend).recurrent_layer_forward(
        x[chunk.steps], h[:, chunk.rows], c, list(weights), chunk.lengths, chunk.resets, False, has_biases, direction,
        mode, True,
    )  # fmt: skip
    return y, h, None if c is None else chunk.left(cells, reverse), gates, cells


__all__ = ["recurrent_layer_in_chunks"]
