"""Packed and nested sequences in the place of padded ones: run as these, with lengths, and given back as they came."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rnnattn.nn.nested import like, padded
from rnnattn.transforms import is_transformed, want_equations

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
    padding = _Padding(data, batch_sizes)
    input, lengths = padding.padded(data), padding.lengths
    if hx is None:
        hx = module._zero_states(input, input.shape[1])
    else:
        module._check_state_shape(hx, data, batch_sizes)
    sequences, states = module._run_stack(input, hx, False, lengths, None, False, return_cells)
    if back is not None:
        states = tuple(state.index_select(1, back) for state in states)
    return [PackedSequence(padding.packed(s), batch_sizes, order, back) for s in sequences], states


class _Padding:
    """From packed rows to padded ones and back, each in one copy, of gradients too; torch's own go step by step, and
    its backward takes a third of a layer's time."""

    def __init__(self, data: Tensor, batch_sizes: Tensor) -> None:
        T, B, N = len(batch_sizes), int(batch_sizes[0]), len(data)
        steps, row, slot = (torch.arange(n, device=batch_sizes.device) for n in (T, B, N))
        self.shape = T, B
        self.lengths = (batch_sizes[:, None] > row).sum(0)
        offsets = batch_sizes.cumsum(0) - batch_sizes
        rows = slot + (steps * B - offsets)[torch.repeat_interleave(steps, batch_sizes, output_size=N)]
        # A padded row behind its length holds what nobody reads.
        slots = (offsets[:, None] + row).clamp(max=N - 1).flatten()
        self.rows, self.slots = rows.to(data.device), slots.to(data.device)

    def padded(self, data: Tensor) -> Tensor:
        """[T, B, F] of packed rows [N, F]."""
        padded: Tensor = _moved(data, self.slots, self.rows).unflatten(0, self.shape)
        return padded

    def packed(self, sequence: Tensor) -> Tensor:
        """[N, F] of a padded sequence [T, B, F]."""
        return _moved(sequence.flatten(0, 1), self.rows, self.slots)


def _moved(t: Tensor, taken: Tensor, given: Tensor) -> Tensor:
    """t's rows `taken`; the rows of its gradient are the rows `given` of theirs. Where rows are taken twice that holds
    if all but one of theirs have none, or nobody reads it."""
    if torch.compiler.is_compiling() or is_transformed() or want_equations(t):
        return t.index_select(0, taken)
    moved: Tensor = _Rows.apply(t, taken, given)
    return moved


class _Rows(torch.autograd.Function):
    """index_select, and in its backward index_select too: index_add goes row by row."""

    @staticmethod
    def forward(t: Tensor, taken: Tensor, given: Tensor) -> Tensor:
        return t.index_select(0, taken)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Any:
        taken, given = ctx.saved_tensors
        return _moved(d, given, taken), None, None
