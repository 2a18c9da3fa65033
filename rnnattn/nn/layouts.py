"""Packed and nested sequences in the place of padded ones: nested ones run as these, with lengths, packed ones as they
lie; both are given back as they came."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rnnattn.autocast import autocast_dtype
from rnnattn.checks import check_states, factors
from rnnattn.nn.nested import like, padded
from rnnattn.packing import Packing

if TYPE_CHECKING:
    from rnnattn.nn.recurrent import Lengths, States, _Recurrent


def run_nested(
    module: _Recurrent, nested: Tensor, hx: Any, lengths: Lengths, resets: Tensor | None, return_cells: bool
) -> tuple[list[Any], States]:
    """What `module._run_checked` returns for a nested tensor [B, j, I]; lengths and resets must be None."""
    x, own = padded(module._kind, nested, lengths=lengths, resets=resets)
    x = x if module.batch_first else x.transpose(0, 1)
    sequences, states = module._run_checked(x, hx, own, None, False, return_cells)
    return [like(nested, s if module.batch_first else s.transpose(0, 1)) for s in sequences], states


def run_packed(
    module: _Recurrent, packed: PackedSequence, hx: Any, return_cells: bool
) -> tuple[list[PackedSequence], States]:
    """The same for a PackedSequence, in the packed order, so that only the caller's states change places."""
    data, batch_sizes, order, back = packed
    with_c, weight = len(module._names) == 2, module._flat_weights[0]
    if with_c and isinstance(weight, Tensor) and weight.dtype != data.dtype and autocast_dtype(data) is None:
        raise RuntimeError(factors("lstm", "input", data, "weights[0]", weight))  # torch's LSTM has its own error here
    module.check_input(data, batch_sizes)
    if hx is not None and order is not None:
        hx = tuple(hx[n].index_select(1, order) for n in range(len(module._names)))
    packing = Packing(batch_sizes, data.shape[0])
    if hx is None:
        hx = module._zero_states(data, packing.shape[1])
    else:
        if with_c:
            check_states("lstm", hx, 2)
        module._check_state_shape(hx, data, batch_sizes)
    sequences, states = module._run_stack(data, hx, False, packing, None, False, return_cells)
    if back is not None:
        states = tuple(state.index_select(1, back) for state in states)
    return [PackedSequence(s, batch_sizes, order, back) for s in sequences], states
