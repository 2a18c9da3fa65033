"""What torch.autocast means for the operations: they run, and return, in its dtype.

So torch runs its own recurrent layers with cuDNN and oneDNN. Where it has neither (a GRU on a CPU) it
multiplies in that dtype and promotes the results to the state's; here they stay in it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for on x's device; None where it is off."""
    if not torch._C._is_any_autocast_enabled():
        return None
    device = x.device.type
    if not _is_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _is_available(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


_is_available._dynamo_marked_constant = True  # type: ignore[attr-defined]  # which torch 2.11 cannot trace


def as_forward(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward that computes in the types of its forward, also where it is asked for while autocast is on."""

    @functools.wraps(backward)
    def run(*arguments: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return backward(*arguments)
        with torch._C._DisableAutocast():
            return backward(*arguments)

    return run


def lowered(t: MaybeTensor, dtype: torch.dtype) -> MaybeTensor:
    """As autocast casts: floating tensors but float64."""
    return t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype)
