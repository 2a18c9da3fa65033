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

ALIGNED = 16  # numbers of a row that the kernels read at once
CHUNK_BYTES = 512  # of a row of h: larger chunks took more registers; half of it where operands pass through them
FMA_CHUNK, MOST_FMA_CHUNKS = 32, 32  # without tensor cores: columns of a chunk, which passes through registers
BACKWARD_CHUNK = 64  # of a part
SMALLEST_CHUNK, MOST_CHUNKS = 64, 8
SCRATCH = 3 << 10  # bytes of shared memory for changes of layout; in T0 as much as the sums take more
MOST_UNDERWAY = 96  # registers of a thread for what is on its way


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
    layers: int = 1  # of a stack that runs as one, in one direction

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
    def together(self) -> int:
        """Programs that wait for each other: a group, or those of all layers of a stack."""
        return self.slices * self.layer.layers

    @functools.cached_property
    def sets(self) -> int:
        """Of programs that wait for each other."""
        return self.layer.directions * self.batch_tiles

    @functools.cached_property
    def programs(self) -> int:
        return self.sets * self.together

    @functools.cached_property
    def matrices(self) -> int:
        """That a program holds: W_hh, in a stack W_ih of its layer, too."""
        return 1 if self.layer.layers == 1 else 2

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
        generation = self.device.capability // 10
        wide = self.M >= 64 and not self.layer.backward
        if wide and generation == 10:  # true fp32, too
            return "tcgen05"
        if not self.layer.tensor_cores:
            return "fma"
        return "wgmma" if wide and generation == 9 else "mma.sync"

    @functools.cached_property
    def apart(self) -> bool:
        """Whether the products of chunks are added up by themselves: those of warp groups would be given out anew."""
        return self.instruction == "wgmma"

    @functools.cached_property
    def parts(self) -> int:
        """One for each warp."""
        return self.warps if self.layer.backward else 1

    @functools.cached_property
    def chunk(self) -> int:
        """Columns of a chunk, or of a part of it: larger ones where not all would fit at once, as there are fewer."""
        widest = CHUNK_BYTES // self.layer.dtype.itemsize if self.layer.tensor_cores else FMA_CHUNK
        if self.instruction == "mma.sync":
            widest //= 2
        if self.layer.backward:
            widest = min(BACKWARD_CHUNK, widest)
            return min(widest, max(16, 1 << (-(-self.columns // self.parts) - 1).bit_length()))
        if self.slices == 1:
            return self.units
        if not self.layer.tensor_cores:
            return chunk(self.layer.H, FMA_CHUNK, MOST_FMA_CHUNKS)
        size = chunk(self.layer.H, widest)
        rows = self.M * self.matrices + self.batch_tile
        all_of_it = -(-self.layer.H // size) * size * rows * self.layer.dtype.itemsize
        return size if all_of_it + SCRATCH <= self.device.shared else chunk(self.layer.H, 2 * widest)

    @functools.cached_property
    def chunks(self) -> int:
        return -(-self.columns // (self.parts * self.chunk))

    @functools.cached_property
    def weights(self) -> int:
        """Bytes of the tiles of all matrices."""
        return self.matrices * self.M * self.parts * self.chunk * self.chunks * self.layer.dtype.itemsize

    @functools.cached_property
    def operand(self) -> int:
        """Bytes of a chunk of the second operand."""
        return self.parts * self.chunk * self.batch_tile * self.layer.dtype.itemsize

    @functools.cached_property
    def ahead(self) -> int:
        """Chunks of it in shared memory, or on their way there, at once."""
        room = (self.device.shared - SCRATCH - self.weights) // self.operand
        return max(1, min(self.chunks, room, MOST_UNDERWAY * 4 * self.threads // self.operand))

    @functools.cached_property
    def underway(self) -> float:
        """Registers of a thread for what is on its way."""
        return self.ahead * self.operand / 4 / self.threads

    @functools.cached_property
    def sums(self) -> float:
        """Registers of a thread for the product."""
        return self.M * self.parts * self.batch_tile / self.threads

    @functools.cached_property
    def shared(self) -> int:
        return self.weights + self.ahead * self.operand

    @functools.cached_property
    def exchanged(self) -> int:
        """Bytes that a program takes in per step: h (db) of its layer, in a stack as much of the layer beside it."""
        return self.matrices * self.columns * self.batch_tile * self.layer.dtype.itemsize

    @functools.cached_property
    def warps(self) -> int:
        """Four for small tiles, where a thread then holds twice as much; eight for others and without tensor cores."""
        layer, itemsize = self.layer, self.layer.dtype.itemsize
        operand = layer.H * self.batch_tile * itemsize
        need = 3 * self.M * self.batch_tile / 128 + operand / 512  # as in `spills`, of four warps
        if layer.backward:
            few = self.row_blocks * self.units * self.batch_tile <= 2048 and operand <= 16 << 10
        elif self.instruction == "mma.sync":
            few = itemsize == 2 and need <= 40
        else:
            few = self.instruction == "wgmma" and need <= 56
        return 4 if few and layer.tensor_cores and layer.layers == 1 else 8

    @functools.cached_property
    def registers(self) -> int:
        """All that there are, where the assembler was seen to stop at fewer and spill; 0 where it spilled with all."""
        small = self.instruction == "mma.sync" and self.layer.H * self.layer.dtype.itemsize <= 512
        return 255 if self.layer.backward or self.layer.blocks == 1 or small else 0

    @functools.cached_property
    def threads(self) -> int:
        return 32 * self.warps

    def objection(self) -> str | None:
        """Why this does not fit, or None."""
        device, H = self.device, self.layer.H
        if self.units >= 2 * max(H, 16):
            return f"{self.units} units are too many for H={H}"
        if self.slices == 1 and self.units < 16:  # of a tile's columns, too
            return f"{self.units} units are too few for one program"
        sums = 4 * self.M * self.batch_tile if self.slices == 1 else 0
        if (wanted := self.shared + SCRATCH + sums) > device.shared:
            there = f"{device.name} gives {device.shared >> 10}"
            return f"a program of {self.units} units wants {wanted >> 10} KB of shared memory, {there}"
        if self.together > 1 and self.together > device.sms:
            return (
                f"{self.together} programs of {self.units} units wait for each other, {device.name} has "
                f"{device.sms} SMs"
            )
        if self.spills:
            return f"{self.units} units and {self.batch_tile} rows would spill registers"
        return None

    @property
    def spills(self) -> bool:
        """Whether a thread would want more registers than there are, by what was compiled: the figures of
        benchmarks/results/sequence-kernels-*.csv, no theory."""
        layer, itemsize, rows = self.layer, self.layer.dtype.itemsize, self.batch_tile
        if layer.backward:
            hopper, half = self.device.capability // 10 == 9, itemsize == 2
            most_chunks = (8 if hopper else 4) if half else 2
            most_sums = 32.0 if hopper or half else min(16.0, 40 / self.chunks)
            if layer.H % ALIGNED or not layer.tensor_cores:
                most_sums = min(most_sums, 8)
            return self.sums > most_sums or rows > 32 or (rows == 32 and self.chunks > most_chunks)
        if self.chunks > self.ahead and (itemsize > 2 or self.ahead == 1 or rows > 16 or layer.layers > 1):
            return True
        if layer.H % ALIGNED and self.M > 64:  # rows that are read number by number
            return True
        need = 3 * self.sums + self.underway
        if self.instruction == "wgmma":
            return need > (48 if layer.layers > 1 else 104 if itemsize == 2 else 72)
        if self.instruction == "tcgen05":  # the addresses of its operands are kept for the whole of H
            return need > 64 or layer.H > 256
        if self.instruction == "fma":
            return self.sums > 4
        if rows > 16 and (itemsize > 2 or self.chunks > 2):
            return True
        return need > (32 if layer.layers > 1 else 64) if itemsize == 2 else self.sums > 8


def chunk(H: int, largest: int, most: int = MOST_CHUNKS) -> int:
    """The power of two, none below 64 unless H or the largest is, whose multiples cover H with the least to spare; of
    equals the largest."""
    if H < min(largest, SMALLEST_CHUNK):
        return max(16, 1 << (H - 1).bit_length())
    sizes = [largest >> n for n in range(largest.bit_length()) if largest >> n >= min(largest, SMALLEST_CHUNK)]
    sizes = [size for size in sizes if -(-H // size) <= most] or sizes[:1]
    return min(sizes, key=lambda size: -(-H // size) * size)
