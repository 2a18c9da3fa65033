"""Where the rows of each step of a layer lie: in [T, B, I], or in a packed sequence [N, I]."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rnnattn.packing import batch_sizes_of
from rnnattn.reference import Resets, previous_states


@dataclass(frozen=True)
class Rows:
    """T steps of B rows, N in all; packed ones are those of step 0, longest first, then of each step those still
    running."""

    T: int
    B: int
    N: int
    lengths: Tensor | None  # int64 [B], on the device
    # Of packed rows: how many each step has, int64 [T] on the CPU, and on the device int64 [T + 2], where B initial
    # states, each step's rows and B initial states begin.
    batch_sizes: Tensor | None = None
    slots: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, B: int, lengths: Tensor | None, resets: Tensor | None) -> Rows:
        """Those of x. The lengths of packed rows, if these are on a device, had better be on the CPU: they are read.

        Raises:
            RuntimeError: packed rows that the lengths are not of, or with resets.
        """
        if x.dim() == 3:
            T = x.shape[0]
            return cls(T, B, T * B, None if lengths is None else lengths.contiguous())
        if resets is not None:
            raise RuntimeError("resets: expected none with a packed sequence")
        if lengths is None or lengths.shape != (B,) or B == 0:
            raise RuntimeError(f"lengths: expected those of the {B} rows of a packed sequence")
        lengths = lengths.cpu()
        found: list[int] = lengths.tolist()
        if found != sorted(found, reverse=True) or found[-1] < 1 or sum(found) != len(x):
            raise RuntimeError(
                f"lengths: expected positive ones of a packed sequence in falling order with a sum of {len(x)}"
            )
        sizes = batch_sizes_of(lengths)
        slots = torch.cat([sizes.new_tensor([0, B]), B + sizes.cumsum(0)])
        there = torch.cat([slots, lengths]).to(x.device, non_blocking=True)  # in one transfer
        return cls(found[0], B, len(x), there[len(slots) :], sizes, there[: len(slots)])

    @property
    def packed(self) -> bool:
        return self.batch_sizes is not None

    @cached_property
    def sizes(self) -> list[int]:
        """How many rows each step has."""
        return [self.B] * self.T if self.batch_sizes is None else self.batch_sizes.tolist()

    def of_step(self, t: int, sequence: Tensor) -> Tensor:
        """The rows of step t in a [T, B, F], or packed [N, F]."""
        return sequence.narrow(0, self._starts[t], self.sizes[t]) if self.packed else sequence[t]

    @cached_property
    def _starts(self) -> list[int]:
        assert self.batch_sizes is not None
        starts: list[int] = (self.batch_sizes.cumsum(0) - self.batch_sizes).tolist()
        return starts

    def previous(self, y: Tensor, h0: Tensor, reset: Resets | None, reverse: bool) -> Tensor:
        """The h that each step started from, shaped as y [T, B, R] or [N, R]; h0 [B, R]."""
        if self.slots is not None:
            return torch.cat([h0, y, h0]).index_select(0, self._slot_before(self.slots, reverse))
        h_prev = previous_states(y, h0, self.lengths, reverse)
        return h_prev if reset is None else torch.where(reset.before, reset.h, h_prev)

    def _slot_before(self, slots: Tensor, reverse: bool) -> Tensor:
        """Of each packed row, the one among h0, the packed rows and h0 that its step started from."""
        sizes, count = slots.diff(), torch.arange(self.N, device=slots.device)
        step = torch.repeat_interleave(sizes[1:], output_size=self.N)
        row = count + self.B - slots[step + 1]
        if not reverse:
            return slots[step] + row
        goes_on = torch.cat([sizes[2:], sizes.new_zeros(1)])[step] > row  # after this step
        return torch.where(goes_on, slots[step + 2], self.B + self.N) + row


def following(left: Tensor, n: int, begin: Tensor, ended: Tensor | None = None) -> Tensor:
    """Of what a step left for each of its rows, what the next one finds for its n.

    Where it has more, those begin as in `begin`. Where it has fewer, `ended` is written what the others were left; also
    before the first step, of rows that are yet to begin, and again when they end.
    """
    there = len(left)
    if ended is not None and there > n:
        ended[n:there] = left[n:]
    return left[:n] if there >= n else torch.cat([left, begin[there:n]])
