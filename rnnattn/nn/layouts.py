"""Packed and nested sequences in the place of padded ones: run as these, with lengths, and given back as they came."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from rnnattn.nn.nested import like, padded

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
    module.check_input(data, batch_sizes)
    if hx is not None and order is not None:
        hx = tuple(hx[n].index_select(1, order) for n in range(len(module._names)))
    in_order = PackedSequence(data, batch_sizes, None, None)
    input, lengths = pad_packed_sequence(in_order)
    if hx is None:
        hx = module._zero_states(input, input.shape[1])
    else:
        module._check_state_shape(hx, data, batch_sizes)
    sequences, states = module._run_stack(input, hx, False, lengths, None, False, return_cells)
    if back is not None:
        states = tuple(state.index_select(1, back) for state in states)
    return [PackedSequence(pack_padded_sequence(s, lengths).data, batch_sizes, order, back) for s in sequences], states
