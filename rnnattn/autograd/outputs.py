"""Outputs that a backward needs and a caller may write into: torch.nn's layers allow that where they need them not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rnnattn.autograd.eager import is_eager, is_last_use


class _Output:
    """Another tensor over the same memory, which tells by its version what was written there since."""

    def __init__(self, y: Tensor) -> None:
        self.y, self.version = y.detach(), y._version


def watched(ctx: Any, y: Tensor, x: Tensor) -> Tensor | None:
    """What `ctx.save_for_backward` is to have of the output y of a call on x: None where `ctx.output` holds it."""
    ctx.output = None
    if not is_eager(x) or _has_hooks():
        return y
    ctx.output = _Output(y)
    return None


def _has_hooks() -> bool:
    """Whether somebody keeps what is saved in a way of his own, as a checkpoint does: he is to have all of it."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def returned(ctx: Any, saved: Tensor | None, again: Callable[[], Tensor]) -> Tensor:
    """The output as it was returned, computed again where it was written into; saved: what `watched` gave."""
    if saved is not None:
        return saved
    if ctx.output is None:
        raise RuntimeError("Trying to backward through the graph a second time")
    y: Tensor = ctx.output.y
    if y._version != ctx.output.version:
        with torch.no_grad():
            y = again()
    if is_last_use():
        ctx.output = None
    return y
