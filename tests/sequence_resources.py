"""What the sequence kernels take on NVIDIA GPUs, compiled without one as the planner plans them.

    python -m tests.sequence_resources 90 [--thorough]

Plain: one direction, saving what the backward needs. Full: also lengths, resets to the initial states, both directions.
Packed: packed rows, both directions. Stack: two layers at the same time, plain.
Spilled are accesses of the stack in the loop over time; a stack without them is one of the start, of 8 or 16 bytes.
Bytes are those that the loop over time loads from global memory, of what programs exchange and of everything else: the
weights are not among them.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from rnnattn.backends import sequence_plan
from rnnattn.backends.sequence_device import DEVICES, Device
from rnnattn.reference import CELLS
from tests.triton_resources import DTYPES, SHARED_LIMIT, compiled, cuobjdump

DEVICE = {80: "A100", 90: "H100", 100: "B200"}
SAMPLE = {"bf16": [("LSTM", 256, 16), ("GRU", 128, 16), ("LSTM", 650, 16)], "tf32": [("LSTM", 256, 16)]}
GRID = [("LSTM", H, B) for H in (32, 64, 128, 256, 512, 650, 768, 1024, 1536) for B in (1, 8, 16, 64, 128, 256)]
GRID += [(mode, H, 16) for mode in ("GRU", "RNN_TANH") for H in (64, 128, 512, 1024)]


@dataclass(frozen=True)
class SequenceRow:
    """One kernel of one plan; empty from `units` on where that is to run step by step."""

    kernel: str
    mode: str
    H: int
    B: int
    dtype: str
    variant: str
    architecture: int
    tier: str
    step_us: float
    units: int = 0
    slices: int = 0
    batch_tile: int = 0
    parts: int = 0
    chunk: int = 0
    chunks: int = 0
    warps: int = 0
    registers: int = 0
    stack: int = 0
    spilled: int = 0  # loads and stores of spilled registers in the loop over time
    shared: int = 0
    tensor_core: str = ""
    exchanged: int = 0  # bytes a step
    loaded: int = 0  # bytes a step


def loop_bytes(ptx: str, warps: int) -> tuple[int, int]:
    """Of the loop over time, the one that loads most: exchanged (past the first cache), and others."""
    lines, found = ptx.splitlines(), (0, 0)
    places = {label[1]: n for n, line in enumerate(lines) if (label := re.match(r"(\$L\w+):", line))}
    for end, line in enumerate(lines):
        jump = re.search(r"bra(?:\.uni)?\s+(\$L\w+);", line)
        if jump is None or places.get(jump[1], end) >= end:
            continue
        bytes_of = {True: 0, False: 0}
        for load in lines[places[jump[1]] : end]:
            if (is_load := re.search(r"ld\.global((?:\.\w+)*?)(?:\.v(\d))?\.b(\d+)", load)) and "acquire" not in load:
                width = int(is_load[2] or 1) * int(is_load[3]) // 8
                bytes_of[".cg" in is_load[1]] += width * 32 * warps
        found = max(found, (bytes_of[True], bytes_of[False]), key=sum)
    return found


def spills(cubin: bytes) -> int:
    """Loads and stores of the stack in the loop over time, the longest that there is."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", cuobjdump(cubin, "-sass"))
    jumps = [(int(at, 16), re.search(r"\bBRA\S* .*?0x([0-9a-f]+)", text)) for at, text in lines]
    loops = [(int(jump[1], 16), at) for at, jump in jumps if jump and int(jump[1], 16) < at]
    first, last = max(loops, key=lambda loop: loop[1] - loop[0])
    return sum(first <= int(at, 16) <= last and re.search(r"\b(LDL|STL)\b", text) is not None for at, text in lines)


def launch(
    kernel: str, p: sequence_plan.Plan, mode: str, H: int, B: int, dtype: torch.dtype, variant: str, precision: str
) -> None:
    from rnnattn.kernels import sequence_backward, sequence_forward

    full, packed, stack = (variant == name for name in ("full", "packed", "stack"))
    T, K, cell, wide = 4, 1 if variant == "plain" else 2, CELLS[mode], torch.float32
    GH, width, lstm = cell.blocks * H, -(-H // 16) * 16, mode == "LSTM"

    def new(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    lengths = torch.zeros(B, dtype=torch.int64) if full or packed else None
    of_rows = lengths, lengths if full else None, torch.zeros(T + 2, dtype=torch.int64) if packed else None
    resets = torch.zeros(K, T, B, dtype=torch.bool) if full else None
    gates, cells = new(K, T, B, 4 * H) if cell.saved else None, new(K, T, B, H, dtype=wide) if lstm else None
    states, sums = new(K, B, H), new(K, B, H, dtype=wide)
    w, of_lstm = new(K, GH, width), sums if lstm else None
    w_x, K_x = (w[1:], 1) if stack else (None, K)
    if kernel == "forward":
        sequence_forward(
            mode, new(T * B, K_x * GH, dtype=wide), w, w_x, new(K, 4 * H, dtype=wide), new((T + 2) * B, K, width),
            of_lstm, *of_rows, resets, True, False, gates, cells, states,
            states if lstm else None, p.units, p.chunk, p.chunks, p.ahead, p.apart, p.batch_tile, p.warps,
            p.registers, p.resident, precision,
        )  # fmt: skip
        return
    y, da = new(T, B, K * H), new(T * B, K, -(-GH // 16) * 16)
    sequence_backward(
        mode, y, None, w, w_x, None if cell.saved else y, None if cell.shared else new(K, T, B, H),
        gates, cells, of_lstm, *of_rows, resets, True, False, sums, of_lstm, da, None if cell.shared else da, p.units,
        p.parts, p.chunk, p.chunks, p.ahead, p.batch_tile, p.warps, p.registers, p.resident, precision,
    )  # fmt: skip


def rows(architecture: int, thorough: bool) -> Iterator[SequenceRow]:
    device: Device = DEVICES[DEVICE[architecture]]
    plans: dict[str, tuple[Any, ...]] = {}

    def launches(name: str) -> Iterator[str]:
        dtype = DTYPES[name]
        for mode, H, B in GRID if thorough else SAMPLE.get(name, []):
            for kernel in ("forward", "backward"):
                for variant in ("plain", "full", "packed", "stack"):
                    directions, layers = {"plain": (1, 1), "stack": (1, 2)}.get(variant, (2, 1))
                    p = sequence_plan.plan(
                        device, mode, B, 1000, H, dtype, directions, kernel == "backward", name != "fp32",
                        layers=layers,
                    )  # fmt: skip
                    case = f"{kernel} {mode} H={H} B={B} {variant}"
                    plans[case] = kernel, mode, H, B, name, variant, architecture, p
                    if p.tier != "T2":
                        launch(kernel, p, mode, H, B, dtype, variant, "tf32" if name == "tf32" else "ieee")
                    yield case

    for row, kernel in compiled(architecture, launches):
        *key, p = plans[row.case]
        exchanged, loaded = loop_bytes(kernel.asm["ptx"], row.warps)
        yield SequenceRow(
            *key, p.tier, round(p.step_us, 2), p.units, p.slices, p.batch_tile, p.parts, p.chunk, p.chunks, row.warps,
            row.registers, row.stack, spills(kernel.asm["cubin"]) if row.stack else 0, row.shared, row.tensor_core,
            exchanged, loaded,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("architecture", type=int, choices=sorted(SHARED_LIMIT), help="compute capability")
    parser.add_argument("--thorough", action="store_true", help="all shapes, dtypes and cells")
    options = parser.parse_args()
    table = csv.DictWriter(sys.stdout, SequenceRow.__dataclass_fields__, lineterminator="\n")
    table.writeheader()
    for row in rows(options.architecture, options.thorough):
        table.writerow(asdict(row))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
