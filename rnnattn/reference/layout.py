"""What the layers of all cells have in common: directions, weights, lengths and the type of sums."""

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
    """The parameters of one direction of a layer; G is the cell's number of blocks (`cells.CELLS`)."""

    w_ih: Tensor  # [GH, I]
    w_hh: Tensor  # [GH, R]
    b_ih: Tensor | None  # [GH]
    b_hh: Tensor | None  # [GH]
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


def zero_invalid(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x [T, B, I] with zeros at invalid steps, so that whatever stands there (NaN too) stays out."""
    if lengths is None:
        return x
    return torch.where(valid_steps(lengths, x.shape[0])[..., None], x, 0)


def previous_states(y: Tensor, h0: Tensor, lengths: Tensor | None, reverse: bool) -> Tensor:
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
