"""Calls that go directly to the C++ kernels, by csrc/layer_call.cpp.

The checks and the choice of a backend that all others pass in Python take longer than a small layer's step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rnnattn import backends
from rnnattn.autocast import autocast_dtype
from rnnattn.backends.cpp import call_layer
from rnnattn.reference import CELLS
from rnnattn.stack import takes_cpp


def states_of(hx: Any, with_c: bool) -> tuple[Any, Any]:
    """h and c as a direct call takes them, None for zeros; what is neither goes through as h, for others to refuse."""
    if not with_c or hx is None or type(hx) is not tuple or len(hx) != 2 or hx[0] is None:
        return hx, None
    return hx


class DirectCalls:
    """Base of the modules that call so. The first call of a kind tells, by the long way, whether others may."""

    # The backend that is set, mode and dtype; and whether such calls run on the C++ kernels.
    _direct: tuple[tuple[str, str, torch.dtype], bool] | None = None

    def _call_directly(
        self, mode: str, input: Any, hx: Any, weights: list[Any], num_layers: int, dropout: float, has_biases: bool,
        bidirectional: bool, batch_first: bool, is_cell: bool, lengths: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """What the module returns; None where anything is out of the ordinary, wrong arguments among it.

        weights: None for one that is not to be had. dropout: of this call. lengths: as `checked_lengths` gives them; an
        input [N, I] is of packed rows then.
        """
        # Compiling comes first: a graph that looked at what eager calls leave behind would be compiled again after one.
        if torch.compiler.is_compiling() or self._direct is None or backends.is_recording():
            return None
        (selected, remembered_mode, dtype), allowed = self._direct
        if not allowed or selected != backends.selected() or remembered_mode != mode:
            return None
        h, c = states_of(hx, CELLS[mode].has_c)
        return call_layer()(
            input, h, c, lengths, weights, dtype, mode, num_layers, dropout, has_biases, bidirectional, batch_first,
            is_cell,
        )  # fmt: skip

    def _remember(self, mode: str, input: Any, hidden_size: int) -> None:
        """Takes note of a call that has passed all checks."""
        if type(input) is not Tensor or torch.compiler.is_compiling() or backends.is_recording():
            return
        dtype = autocast_dtype(input) or input.dtype
        kind = backends.selected(), mode, dtype
        if self._direct is None or self._direct[0] != kind:
            allowed = input.is_cpu and takes_cpp(mode, dtype, input.shape[-1], hidden_size)
            self._direct = kind, allowed
