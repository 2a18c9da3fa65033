"""What the layers of all cells have in common: directions, weights, lengths, resets and the type of sums."""

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
STACK = "stack"  # in the place of a direction: layers on each other (`stack`)


def reverses_of(direction: str, K: int) -> tuple[bool, ...]:
    """Whether each of the K scans runs backwards in time."""
    return (False,) * K if direction == STACK else DIRECTIONS[direction]


class LayerWeights(NamedTuple):
    """The parameters of one direction of a layer; G is the cell's number of blocks (`cells.CELLS`)."""

    w_ih: Tensor  # [GH, I]
    w_hh: Tensor  # [GH, R]
    b_ih: Tensor | None  # [GH]
    b_hh: Tensor | None  # [GH]
    w_hr: Tensor | None  # [R, H]


def has_projection(weights: list[Tensor], scans: int) -> bool:
    """Whether the weights of so many scans have a w_hr each."""
    return len(weights) // scans % 2 == 1


def split_weights(weights: list[Tensor], has_biases: bool, directions: int) -> list[LayerWeights]:
    """Parts a flat list (torch's `_flat_weights` order for one layer) into directions."""
    per_direction = len(weights) // directions
    parts = []
    for k in range(directions):
        w = list(weights[k * per_direction : (k + 1) * per_direction])
        b_ih, b_hh = (w[2], w[3]) if has_biases else (None, None)
        w_hr = w[-1] if has_projection(weights, directions) else None
        parts.append(LayerWeights(w[0], w[1], b_ih, b_hh, w_hr))
    return parts


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def valid_steps(lengths: Tensor, steps: int) -> Tensor:
    """bool [T, B], True where step t of row b lies inside the row's length."""
    return torch.arange(steps, device=lengths.device)[:, None] < lengths[None, :]


def zero_invalid(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x [..., T, B, I] with zeros at invalid steps, so that whatever stands there (NaN too) stays out."""
    if lengths is None:
        return x
    return torch.where(valid_steps(lengths, x.shape[-3])[..., None], x, 0)


class Resets(NamedTuple):
    """Where a scan replaces the state that it carries, and by what."""

    before: Tensor  # bool [T, B, 1], True where it does before step t
    h: Tensor  # [B, R]
    c: Tensor | None  # [B, H], accumulation type
    to_initial: bool  # h and c are the initial states, not zeros

    def states(self, t: int, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What step t starts from in the place of h and c."""
        c = None if c is None or self.c is None else torch.where(self.before[t], self.c, c)
        return torch.where(self.before[t], self.h, h), c


def scan_resets(
    resets: Tensor | None, to_initial: bool, h0: Tensor, c0: Tensor | None, lengths: Tensor | None, reverse: bool
) -> Resets | None:
    """`resets` (bool [T, B]) as one scan meets them.

    True at t is a border between t - 1 and t. A forward scan crosses it before step t, a reverse one
    before step t - 1, so that it never meets one at 0. Nothing at or behind a row's length is a border.
    """
    if resets is None:
        return None
    T = resets.shape[0]
    before = resets if lengths is None else resets & valid_steps(lengths, T)
    if reverse:
        before = torch.cat([before, torch.zeros_like(resets[:1])])[1 : T + 1]
    if not to_initial:
        h0, c0 = torch.zeros_like(h0), None if c0 is None else torch.zeros_like(c0)
    return Resets(before[..., None], h0, c0, to_initial)


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
