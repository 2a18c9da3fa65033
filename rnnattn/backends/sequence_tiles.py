"""What one program of the sequence engine holds for its units and rows, and whether a GPU has room for it.

The forward's tile of weights is [M, Kp], M = 4 * units rows (GRU: one block of the four is unused; RNN: M = units), and
Kp is H in chunks of one power of two; where one program has all units, they are the chunk. The backward multiplies by
the transpose, dh = W_hh^T db: its tile is [units, Kp], and Kp the GH columns of db in chunks of parts * `chunk`, parts
that warps multiply side by side. The second operand, h or db, passes through shared memory, `ahead` chunks of it at
once: all of them where they fit, as each further turn waits for L2 anew.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from rnnattn.backends.sequence_device import Device
from rnnattn.reference import CELLS

SMALLEST_CHUNK, MOST_CHUNKS = 64, 8
CHUNK_BYTES = 512  # of a row of h: larger ones took more registers
BACKWARD_CHUNK = 64  # of a part
MOST_AHEAD = 384  # bytes of a thread on their way
SCRATCH = 3 << 10  # bytes of shared memory for changes of layout: compiled sketches took none to 4 KB
MOST_SUMS = 64  # registers of a thread for sums of the product, beside as many for gates, states and addresses;
MOST_SUMS_OF_PARTS = 32  # of parts of them that are to be added up
MOST_FMA_OPERANDS = 96  # registers of a thread for both operands, where no tensor cores are used


@dataclass(frozen=True)
class Layer:
    """What is to be computed."""

    mode: str
    B: int
    H: int
    dtype: torch.dtype
    directions: int
    backward: bool
    tensor_cores: bool

    @property
    def blocks(self) -> int:
        return CELLS[self.mode].blocks


@dataclass(frozen=True)
class Tiles:
    """A layer in programs of so many units and rows."""

    device: Device
    layer: Layer
    units: int
    batch_tile: int

    @functools.cached_property
    def slices(self) -> int:
        return -(-self.layer.H // self.units)

    @functools.cached_property
    def batch_tiles(self) -> int:
        return -(-self.layer.B // self.batch_tile)

    @functools.cached_property
    def groups(self) -> int:
        return self.layer.directions * self.batch_tiles

    @functools.cached_property
    def row_blocks(self) -> int:
        """Of the tile, with room for a GRU's fourth."""
        return 1 if self.layer.blocks == 1 else 4

    @functools.cached_property
    def M(self) -> int:
        return self.units if self.layer.backward else self.row_blocks * self.units

    @functools.cached_property
    def columns(self) -> int:
        """Of the tile, without what fills the last chunk up."""
        return self.layer.blocks * self.layer.H if self.layer.backward else self.layer.H

    @functools.cached_property
    def instruction(self) -> str:
        """Of the product. Triton takes those of a warp group and of the tensor memory for 64 rows and more, and not
        for parts side by side."""
        if not self.layer.tensor_cores:
            return "fma"
        if self.M < 64 or self.layer.backward:
            return "mma.sync"
        return {9: "wgmma", 10: "tcgen05"}.get(self.device.capability // 10, "mma.sync")

    @functools.cached_property
    def parts(self) -> int:
        """One for each warp."""
        return self.warps if self.layer.backward else 1

    @functools.cached_property
    def chunk(self) -> int:
        """Columns of a chunk, or of a part of it."""
        if self.layer.backward:
            return min(BACKWARD_CHUNK, max(16, 1 << (-(-self.columns // self.parts) - 1).bit_length()))
        if self.slices == 1:
            return self.units
        return chunk(self.layer.H, CHUNK_BYTES // self.layer.dtype.itemsize)

    @functools.cached_property
    def chunks(self) -> int:
        return -(-self.columns // (self.parts * self.chunk))

    @functools.cached_property
    def weights(self) -> int:
        """Bytes of the tile."""
        return self.M * self.parts * self.chunk * self.chunks * self.layer.dtype.itemsize

    @functools.cached_property
    def operand(self) -> int:
        """Bytes of a chunk of the second operand."""
        return self.parts * self.chunk * self.batch_tile * self.layer.dtype.itemsize

    @functools.cached_property
    def ahead(self) -> int:
        """Chunks of it in shared memory, or on their way there, at once."""
        room = (self.device.shared - SCRATCH - self.weights) // self.operand
        return max(1, min(self.chunks, room, MOST_AHEAD * 32 * self.warps // self.operand))

    @functools.cached_property
    def shared(self) -> int:
        return self.weights + self.ahead * self.operand

    @functools.cached_property
    def exchanged(self) -> int:
        """Bytes of h (db) that a program takes in per step."""
        return self.columns * self.batch_tile * self.layer.dtype.itemsize

    @functools.cached_property
    def warps(self) -> int:
        """Eight where four were seen to spill: for many sums, a large tile to load, many rows; and without tensor
        cores."""
        tile = self.M * self.columns * self.layer.dtype.itemsize
        few = self.M * self.batch_tile <= 4096 and tile <= 64 << 10 and self.batch_tile * self.columns <= 16 << 10
        return 4 if few and self.layer.tensor_cores else 8

    def objection(self) -> str | None:
        """Why this does not fit, or None."""
        device, threads, itemsize = self.device, self.warps * 32, self.layer.dtype.itemsize
        if not self.layer.backward and self.chunks > MOST_CHUNKS:
            return f"{MOST_CHUNKS} chunks of {self.chunk} (larger ones spill registers) do not cover H={self.layer.H}"
        if self.units >= 2 * max(self.layer.H, 16):
            return f"{self.units} units are too many for H={self.layer.H}"
        if (wanted := self.shared + SCRATCH) > device.shared:
            there = f"{device.name} gives {device.shared >> 10}"
            return f"a program of {self.units} units wants {wanted >> 10} KB of shared memory, {there}"
        if self.slices > 1 and self.slices > device.sms:
            return (
                f"{self.slices} programs of {self.units} units wait for each other, {device.name} has {device.sms} SMs"
            )
        most = MOST_SUMS_OF_PARTS if self.layer.backward else MOST_SUMS
        if self.M * self.parts * self.batch_tile > most * threads:
            return f"the sums of {self.units} units and {self.batch_tile} rows would spill registers"
        if not self.layer.tensor_cores and (self.weights + self.operand) // itemsize > MOST_FMA_OPERANDS * threads:
            return f"the operands of {self.units} units, H={self.layer.H} do not fit in registers (no tensor cores)"
        return None


def chunk(H: int, largest: int) -> int:
    """The power of two, none below 64 unless H is, whose multiples cover H with the least to spare; of equals the
    largest."""
    if H < SMALLEST_CHUNK:
        return max(16, 1 << (H - 1).bit_length())
    sizes = [largest >> n for n in range(largest.bit_length()) if largest >> n >= SMALLEST_CHUNK]
    sizes = [size for size in sizes if -(-H // size) <= MOST_CHUNKS] or sizes[:1]
    return min(sizes, key=lambda size: -(-H // size) * size)
