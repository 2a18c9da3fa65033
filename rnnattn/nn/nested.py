"""Nested tensors in the jagged layout, [B, j, F] with a length of its own for each row, as padded ones with lengths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def padded(kind: str, nested: Any, **others: Any) -> tuple[Tensor, Tensor]:
    """x [B, T, F] with zeros behind the rows' ends, T being the longest row's length, and lengths [B].

    kind: the module that was called; others: its arguments that do not go with a nested tensor, by name.

    Raises:
        ValueError: another layout, rank or order of dimensions, rows with holes between them, or an argument among
            others that is not None.
    """
    for name, value in others.items():
        if value is not None:
            raise ValueError(f"{kind}: expected no {name} with a nested tensor; pad it and use lengths=")
    if nested.layout != torch.jagged:
        raise ValueError(f"{kind}: expected a nested tensor of layout torch.jagged, got {nested.layout}")
    if nested.dim() != 3 or nested._ragged_idx != 1:
        raise ValueError(f"{kind}: expected a nested tensor [B, j, features], got {list(nested.shape)}")
    if nested.lengths() is not None:
        raise ValueError(f"{kind}: expected a nested tensor without holes between its rows; contiguous() gives one")
    lengths: Tensor = nested.offsets().diff()
    return torch.nested.to_padded_tensor(nested, 0.0), lengths


def like(nested: Any, y: Tensor) -> Tensor:
    """y [B, T, ...] with the rows' lengths of nested, and its offsets, so that the two go together in operations."""
    offsets, total = nested.offsets(), nested.values().shape[0]
    rows = torch.arange(len(offsets) - 1, device=y.device).repeat_interleave(offsets.diff(), output_size=total)
    steps = torch.arange(total, device=y.device) - offsets[rows]
    return torch.nested.nested_tensor_from_jagged(
        y[rows, steps], offsets, min_seqlen=nested._maybe_min_seqlen, max_seqlen=nested._maybe_max_seqlen
    )
