"""A recurrent layer that is trained in little memory: chunks of its sequence, computed again in the backward pass.

With chunks of sqrt(T) steps, what is kept are the states at their borders, sqrt(T) of them, and for one chunk at a
time what a backward needs (Chen et al. 2016, Training deep nets with sublinear memory cost). The forward is run
twice; gradients are those of the whole, the weights' summed over chunks in the accumulation type.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rnnattn import backends
from rnnattn.autograd.recurrent import of_each_weight
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


class ChunkedScan(torch.autograd.Function):
    """One direction: forward(x, h0, c0, lengths, resets, has_biases, reverse, mode, backend, *weights)."""

    @staticmethod
    def forward(ctx: Any, x, h0, c0, lengths, resets, has_biases, reverse, mode, backend, *weights):  # type: ignore[no-untyped-def]
        acc = accumulation_dtype(x.dtype)
        h, c = h0, None if c0 is None else c0.to(acc)
        y = x.new_empty(*x.shape[:2], h0.shape[-1])
        borders: list[Tensor | None] = []
        ctx.settings = has_biases, reverse, mode, backend
        for start, end in _spans(x.shape[0], reverse):
            h, c = _entering(h, c, resets, lengths, end, reverse)
            borders += [h, c]
            y_k, h, c, _, _ = _chunk(ctx.settings, x, h, c, weights, lengths, resets, start, end)
            y[start:end] = y_k
        ctx.save_for_backward(x, lengths, resets, *weights, *borders)
        ctx.weights = len(weights)
        ctx.set_materialize_grads(False)
        return y, h, x.new_empty(0) if c is None else c.to(x.dtype)

    @staticmethod
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
        for n, (start, end) in reversed(list(enumerate(_spans(x.shape[0], reverse)))):
            h, c = borders[2 * n], borders[2 * n + 1]
            y_k, _, _, gates, cells = _chunk(ctx.settings, x, h, c, weights, lengths, resets, start, end)
            dx_k, dh, dc_k, own = run(
                None if dy is None else dy[start:end], dh, dc if has_c else None, None, x[start:end], h, c,
                list(weights), _within(lengths, start, end), _part(resets, start, end), False, y_k, gates, cells,
                has_biases, direction, mode, needs_dx, needs_dweights, True,
            )  # fmt: skip
            dc = dc_k if has_c else None
            if dx is not None and dx_k is not None:
                dx[start:end] = dx_k
            if needs_dweights and own is not None:
                parts = [d.to(accumulation_dtype(d.dtype)) for d in own]
                sums = parts if not sums else [total.add_(part) for total, part in zip(sums, parts, strict=True)]
            dh, dc = _entering(dh, dc, resets, lengths, end, reverse)
        dweights: list[Tensor | None] = [None] * len(weights)
        if sums:
            own = [total.to(x.dtype) for total in sums]
            dweights = of_each_weight(own, len(weights), has_biases, direction, mode)
        return dx, dh, None if dc is None else dc.to(x.dtype), *[None] * 6, *dweights


def _spans(T: int, reverse: bool) -> list[tuple[int, int]]:
    """The first and the last step of each chunk, in the order of the scan."""
    size = max(1, math.isqrt(T))
    spans = [(start, min(start + size, T)) for start in range(0, T, size)]
    return spans[::-1] if reverse else spans


def _within(lengths: Tensor | None, start: int, end: int) -> Tensor | None:
    return None if lengths is None else (lengths - start).clamp(0, end - start)


def _part(resets: Tensor | None, start: int, end: int) -> Tensor | None:
    return None if resets is None else resets[start:end]


def _chunk(settings, x, h, c, weights, lengths, resets, start, end):  # type: ignore[no-untyped-def]
    """y, h_n, c_n, gates and cells of the steps [start, end); c and c_n in the accumulation type."""
    has_biases, reverse, mode, backend = settings
    lengths, resets = _within(lengths, start, end), _part(resets, start, end)
    direction = "reverse" if reverse else "forward"
    y, h, _, gates, cells = backends.get(backend).recurrent_layer_forward(
        x[start:end], h, c, list(weights), lengths, resets, False, has_biases, direction, mode, True
    )
    if c is not None and cells is not None:
        c = cells[:, 0 if reverse else -1].clone()  # not a view, which would keep them all
    return y, h, c, gates, cells


def _entering(h, c, resets, lengths, end, reverse):  # type: ignore[no-untyped-def]
    """States, or their gradients, where the scan goes into the chunk that ends at `end`. A reverse one crosses the
    border between two episodes there, which the chunk's own resets do not tell."""
    if resets is None or not reverse or end >= resets.shape[0]:
        return h, c
    begins = resets[end] if lengths is None else resets[end] & (end < lengths)
    return tuple(None if t is None else t.masked_fill(begins[None, :, None], 0) for t in (h, c))


__all__ = ["recurrent_layer_in_chunks"]
