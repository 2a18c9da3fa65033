"""The signature of a call of one layer: a call with that of one before needs no checks, which take longer than a small
layer's step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rnnattn import backends
from rnnattn.autograd.eager import is_eager


def signature_of(input: Any, states: Any, weights: Sequence[Any], rank: int) -> Any:
    """What the checks of a call and the choice of its backend depend on; None where that is more than tensors tell.

    states: a tuple, or None for zeros. rank: dimensions of an input with a batch.
    """
    states = () if states is None else states
    if type(states) is not tuple or type(input) is not Tensor or not input.is_cpu or input.dim() != rank:
        return None
    if not is_eager(input) or torch.is_autocast_enabled("cpu") or backends.is_recording():
        return None
    tensors = (input, *states, *weights)
    if not all(isinstance(t, Tensor) for t in tensors):
        return None
    grad = torch.is_grad_enabled()
    return backends.selected(), len(states), [(t.shape, t.dtype, t.device, grad and t.requires_grad) for t in tensors]
