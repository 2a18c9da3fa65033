"""Layers on each other as one operation: y of each is x of the next, all of them forwards in time.

As an operation on one layer with `STACK` for its direction: the K of h0, c0, weights and results are layers then, y
[T, B, K R] has the outputs of all of them side by side, as dy has theirs. W_ih is [GH, I] in the first layer, [GH, R]
in the others; there is no projection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Forward = Callable[..., tuple[Tensor, Tensor, Tensor, Any, Any]]
Backward = Callable[..., tuple[Any, Tensor, Tensor, Any]]


def stack_forward(
    layer: Forward, x: Tensor, h0: Tensor, c0: Tensor | None, weights: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Any, Any]:
    """What `recurrent_layer_forward` gives for a stack.

    Args:
        layer: gives the same of one layer from its x, h0 [1, B, R], c0 and weights.
    """
    K, results = h0.shape[0], []
    for k in range(K):
        result = layer(x, h0[k : k + 1], None if c0 is None else c0[k : k + 1], own_weights(weights, K, k))
        x = result[0]
        results.append(result)
    y, h_n, c_n, gates, cells = zip(*results, strict=True)
    return torch.cat(y, -1), torch.cat(h_n), _joined(c_n), _joined(gates), _joined(cells)


def stack_backward(
    layer: Backward,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dcells: Tensor | None,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    y: Tensor,
    gates: Tensor | None,
    cells: Tensor | None,
    needs_dx: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor, list[Tensor] | None]:
    """What `recurrent_layer_backward` gives for a stack.

    Args:
        layer: gives the same of one layer from its part of all that follows.
    """
    K, outputs = h0.shape[0], [part.contiguous() for part in y.chunk(h0.shape[0], -1)]
    dh0, dc0, dweights = [], [], []
    above: Tensor | None = None  # the gradient of y_k that comes from the layer above
    for k in reversed(range(K)):
        dy_k = None if dy is None else dy.chunk(K, -1)[k]
        if above is not None:
            dy_k = above if dy_k is None else dy_k + above
        parts = (_of(t, k, K) for t in (dh_n, dc_n, dcells))
        above, dh, dc, own = layer(
            dy_k, *parts, outputs[k - 1] if k else x, h0[k : k + 1], _of(c0, k, K), own_weights(weights, K, k),
            outputs[k], _of(gates, k, K), _of(cells, k, K), needs_dx or k > 0,
        )  # fmt: skip
        dh0.append(dh)
        dc0.append(dc)
        dweights.append(own)
    of_weights = None if dweights[0] is None else [d for own in reversed(dweights) for d in own]
    return above if needs_dx else None, torch.cat(dh0[::-1]), _joined(dc0[::-1]), of_weights


def own_weights(weights: list[Tensor], K: int, k: int) -> list[Tensor]:
    """Those of layer k."""
    each = len(weights) // K
    return weights[k * each : (k + 1) * each]


def _of(t: Tensor | None, k: int, K: int) -> Tensor | None:
    """Layer k's part; what the cell does not have is None or an empty tensor."""
    return t[k : k + 1] if t is not None and t.dim() > 1 and t.shape[0] == K else t


def _joined(parts: Any) -> Any:
    return torch.cat(parts) if parts[0] is not None and parts[0].dim() > 1 else parts[0]
