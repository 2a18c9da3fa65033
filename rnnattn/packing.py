"""Packed sequences: where the rows of a batch lie in them, for kernels that read them so and for those that do not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rnnattn.transforms import is_recorded, is_tracing, is_transformed, want_equations


class Packing:
    """The layout of packed rows [N, F]: of step 0 all B rows, longest first, then of each step those still running."""

    def __init__(self, batch_sizes: Tensor, rows: int) -> None:
        """batch_sizes: int64 [T] on the CPU, as a PackedSequence has them, of that many rows in all.

        Raises:
            RuntimeError: they are not, or rise somewhere; not while a graph is recorded, which is for others too.
        """
        if not is_recorded():
            _check_batch_sizes(batch_sizes, rows)
        self.batch_sizes, self.N = batch_sizes, rows
        B: Any = batch_sizes[0]
        self.shape: tuple[int, int] = batch_sizes.shape[0], B if is_tracing() else int(B)  # T, B
        self._indices: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of_lengths(cls, lengths: Tensor, rows: int) -> Packing:
        """Of rows of these lengths [B], which fall."""
        return cls(batch_sizes_of(lengths.cpu()), rows)

    def lengths(self) -> Tensor:
        """int64 [B] on the CPU: of each row, how many batch sizes are above its place."""
        return torch.searchsorted(-self.batch_sizes, -self._count(self.shape[1]))

    def padded(self, data: Tensor) -> Tensor:
        """[T, B, F] of packed rows [N, F]. Behind a row's length it holds what nobody is to read."""
        rows, slots = self._moves()
        padded: Tensor = _moved(data, slots.to(data.device), rows.to(data.device)).unflatten(0, self.shape)
        return padded

    def packed(self, sequence: Tensor) -> Tensor:
        """[N, F] of a padded sequence [T, B, F]."""
        rows, slots = self._moves()
        return _moved(sequence.flatten(0, 1), rows.to(sequence.device), slots.to(sequence.device))

    def _moves(self) -> tuple[Tensor, Tensor]:
        """Where each slot of the packed rows stands among the padded ones, and the reverse."""
        if self._indices is None:
            T, B = self.shape
            offsets, steps = self.batch_sizes.cumsum(0) - self.batch_sizes, self._count(T)
            step = torch.repeat_interleave(steps, self.batch_sizes, output_size=self.N)
            slots = (offsets[:, None] + self._count(B)).clamp(max=self.N - 1).flatten()
            self._indices = self._count(self.N) + (steps * B - offsets)[step], slots
        return self._indices

    def _count(self, n: int) -> Tensor:
        return torch.arange(n, device=self.batch_sizes.device)


def batch_sizes_of(lengths: Tensor) -> Tensor:
    """int64 [T]: how many rows each step has, of lengths [B] on the CPU, which fall; T is the first."""
    return torch.searchsorted(-lengths, -torch.arange(int(lengths[0]), device="cpu"))


def _check_batch_sizes(batch_sizes: Tensor, rows: int) -> None:
    if batch_sizes.dtype != torch.int64 or batch_sizes.dim() != 1 or len(batch_sizes) == 0:
        given = f"{batch_sizes.dtype} of shape {list(batch_sizes.shape)}"
        raise RuntimeError(f"batch_sizes: expected int64 of shape [T] with T > 0, got {given}")
    sizes: list[int] = batch_sizes.tolist()
    if sizes != sorted(sizes, reverse=True) or sizes[-1] < 1:
        raise RuntimeError(f"batch_sizes: expected positive numbers that never rise, got {sizes}")
    if sum(sizes) != rows:
        raise RuntimeError(f"batch_sizes: expected a sum of {rows}, the rows of packed data, got {sum(sizes)}")


def _moved(t: Tensor, taken: Tensor, given: Tensor) -> Tensor:
    """t's rows `taken`; the rows of its gradient are the rows `given` of theirs. Where rows are taken twice that holds
    if all but one of theirs have none, or nobody reads it."""
    if is_recorded() or is_transformed() or want_equations(t):
        return t.index_select(0, taken)
    moved: Tensor = _Rows.apply(t, taken, given)
    return moved


class _Rows(torch.autograd.Function):
    """index_select, and in its backward index_select too: index_add goes row by row, and so do the slices of torch's
    own padding, whose backward takes a third of a layer's time."""

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
