"""Outputs that a backward needs and a caller may write into: torch.nn's layers allow that where they need them not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rnnattn.autograd.eager import is_eager, is_last_use
from rnnattn.transforms import is_transformed


def watched(ctx: Any, y: Tensor, x: Tensor) -> Tensor | None:
    """What `ctx.save_for_backward` is to have of the output y of a call on x: None where `ctx.output` holds it.

    What is saved is not to change, so `ctx.output` is another tensor over the same memory, with the version that tells
    whether it did. Who keeps what is saved in a way of his own, as a checkpoint does, has to have all of it, and looks
    at no versions. In a compiled graph a change of y raises.
    """
    ctx.output, ctx.version = None, None
    if not is_eager(x):
        return y.clone() if is_transformed() else y
    ctx.version = y._version
    if _has_hooks():
        return y
    ctx.output = y.detach()
    return None


def _has_hooks() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def returned(ctx: Any, saved: Tensor | None, again: Callable[[], Tensor]) -> Tensor:
    """The output as it was returned, computed again where it was written into; saved: what `watched` gave."""
    y: Tensor | None = ctx.output if saved is None else saved
    if y is None:
        raise RuntimeError("Trying to backward through the graph a second time")
    if ctx.version is not None and y._version != ctx.version:
        with torch.no_grad():
            y = again()
    if ctx.output is not None and is_last_use():
        ctx.output = None
    return y
