"""How the sequence engine runs a recurrent layer, or a stack of them, on a GPU, from its shape alone.

The engine keeps W_hh in shared memory for all T steps. A group computes `batch_tile` rows of one direction; its
`slices` programs own `units` hidden units each and, where there are several, exchange h_t through global memory with
a barrier at every step, so that all of them have to run at the same time, one on an SM. Three tiers:

    T0  a group is one program: h stays in it
    T1  a group is several programs
    T2  stepwise (`stepwise.py`): where nothing fits, the engine has no kernel, or the model says that it is quicker

Layers on each other run at the same time, each some steps behind the one below, where all their groups find room: a
program then holds its rows of W_ih, too, and all L layers take T + L - 1 steps.

The model, in microseconds a step:

    T0, T1   waves * (latency + product) + exchange
        latency    T1: store and release, poll, load of h (db) once for every `ahead` chunks, pointwise; T0: pointwise,
                   a round trip in shared memory; in a stack one more load, in T0 one more poll
        product    its arithmetic at an SM's rate or, if that is more, the reading of its operands from shared memory
        exchange   T1: every program reads its group's h (backward: db), all of them at the bandwidth of L2
        waves      groups that find no room run after the others, in T1 by launches of their own
    T2       directions * (2 launches + weights + product + traffic)
        launches   2.5 each on a GPU whose queue is full; outside a CUDA graph the host takes about 5 for each
        weights    W_hh from L2, or from memory where L2 does not hold it
        product    at the rate of all SMs
        traffic    the product written and read in fp32, through L2

What all have in common, the input product above all, is left out. T decides only whether starting the engine pays:
the kernels' constants are the same for every T, and few for all B.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from rnnattn.backends.sequence_device import Device
from rnnattn.backends.sequence_tiles import ALIGNED, Layer, Tiles

BATCH_TILES = (16, 32, 64)
UNITS = (8, 16, 32, 64, 128, 256)
OLDEST = 80  # compute capability

# Cycles: estimates, not yet measured.
RELEASE, POLL, LOAD, POINTWISE = 500, 400, 250, 250
ROUND_TRIP = 175  # of h through a program's own shared memory
SHARED_BYTES = 128  # that an SM reads from shared memory per cycle

OF_TILES = (
    "units", "parts", "chunk", "chunks", "ahead", "apart", "slices", "batch_tile", "batch_tiles", "programs", "warps",
    "registers", "shared",
)  # fmt: skip

LAUNCH_US = 2.5  # of a step's kernel
START_US = 8.0  # of the engine: a cooperative launch, and weights into shared memory


@dataclass(frozen=True)
class Plan:
    """Everything from `units` on is 0 or empty in T2."""

    tier: str
    step_us: float  # expected time of a step of all rows, directions and layers
    reason: str  # why this tier; in T2, what did not fit
    start_us: float = 0.0  # before the first step
    units: int = 0  # of a program
    parts: int = 0  # of a chunk, side by side
    chunk: int = 0  # columns of a part
    chunks: int = 0
    ahead: int = 0  # of them on their way at once
    apart: bool = False  # whether their products are added up by themselves
    slices: int = 0  # programs of a group
    batch_tile: int = 0  # rows of a group
    batch_tiles: int = 0  # groups of a direction (layer)
    programs: int = 0  # of all waves
    waves: int = 0
    warps: int = 0  # of a program
    registers: int = 0  # that the assembler is to take for a thread; 0 for as many as it likes
    shared: int = 0  # bytes of a program: weights and what is there of h (db), without the compiler's scratch
    layers: int = 1  # that run at the same time

    def __str__(self) -> str:
        if self.tier == "T2":
            return f"T2, a Triton kernel and a GEMM per step, {self.step_us:.1f} us a step expected ({self.reason})"
        waves = f" in {self.waves} waves" if self.waves > 1 else ""
        layers = f" of all {self.layers} layers" if self.layers > 1 else ""
        return (
            f"{self.tier}, all steps{layers} in one Triton launch: {self.programs} programs of {self.units} units and "
            f"{self.batch_tile} rows{waves}, {self.warps} warps, {self.shared >> 10} KB of shared memory each, "
            f"{self.step_us:.1f} us a step expected ({self.reason})"
        )

    @property
    def resident(self) -> int:
        """Groups in one launch; of a stack those of whole ones."""
        return len(self.launches()[0]) // self.slices if self.programs else 0

    def launches(self) -> list[range]:
        """The programs of each launch: all that wait for each other. Those of T0 need not run at the same time, but in
        a stack: one launch."""
        if not self.programs:
            return []
        together = self.slices * self.layers
        waves = self.waves if together > 1 else 1
        size = -(-self.programs // together // waves) * together
        return [range(first, min(first + size, self.programs)) for first in range(0, self.programs, size)]


@dataclass(frozen=True)
class Share:
    """What one program owns."""

    direction: int  # or layer
    rows: range  # of B
    units: range  # of H


def owned(plan: Plan, program: int, B: int, H: int) -> Share:
    """As the kernel computes it: program = (tile * directions + direction) * slices + slice."""
    group, part = divmod(program, plan.slices)
    tile, direction = divmod(group, plan.programs // plan.slices // plan.batch_tiles)
    return Share(
        direction,
        range(tile * plan.batch_tile, min(B, (tile + 1) * plan.batch_tile)),
        range(part * plan.units, min(H, (part + 1) * plan.units)),
    )


def plan(
    device: Device,
    mode: str,
    B: int,
    T: int,
    H: int,
    dtype: torch.dtype,
    directions: int,
    backward: bool = False,
    tensor_cores: bool = True,
    projection: int = 0,
    layers: int = 1,
    off: bool = False,
) -> Plan:
    """The plan with the least modelled time. tensor_cores: whether fp32 may be multiplied as TF32. Of several layers
    (that have one direction) the plan to run them at the same time; in T2 they had better run one after the other.
    off: the engine is not to be taken."""
    layer = Layer(mode, B, H, dtype, directions, backward, tensor_cores or dtype.itemsize == 2, layers)
    stepwise = layers * _stepwise_us(device, layer)
    if off:
        return Plan("T2", stepwise, "the engine is switched off (RNNATTN_SEQUENCE=0)")
    if (reason := _missing(device, layer, projection)) is not None:
        return Plan("T2", stepwise, reason)
    best = _best(device, layer)
    if isinstance(best, str):
        return Plan("T2", stepwise, f"nothing fits: {best}")
    engine = _engine_us(best)
    if engine >= stepwise:
        return Plan(
            "T2", stepwise, f"quicker than the engine, which would take {engine:.1f} us in {_waves(best)} waves"
        )
    if START_US + T * engine >= T * stepwise:
        return Plan("T2", stepwise, f"T={T} steps do not pay for starting the engine")
    if layers > 1:
        one = plan(device, mode, B, T, H, dtype, directions, backward, tensor_cores)
        if START_US + (T + layers - 1) * engine >= layers * (one.start_us + T * one.step_us):
            return Plan("T2", stepwise, f"layers one after the other take less than {engine:.1f} us a step")
    if best.slices == 1:
        tier, reason = "T0", f"one program holds all of W_hh for {best.batch_tile} rows"
    else:
        tier, reason = "T1", f"{best.slices} programs share W_hh for {best.batch_tile} rows"
    taken = {name: getattr(best, name) for name in OF_TILES}
    return Plan(tier, engine, reason, START_US, waves=_waves(best), layers=layers, **taken)


@functools.lru_cache(maxsize=4096)
def _best(device: Device, layer: Layer) -> Tiles | str:
    """The tiles with the least modelled time, or why none fit; what a new T does not change."""
    candidates = [Tiles(device, layer, units, batch_tile) for units in UNITS for batch_tile in BATCH_TILES]
    fitting = [tiles for tiles in candidates if tiles.objection() is None]
    if not fitting:
        return str(candidates[0].objection())
    fitting = [tiles for tiles in fitting if tiles.units > UNITS[0]] or fitting  # with 16 a warp group multiplies
    return min(fitting, key=lambda tiles: (_engine_us(tiles), tiles.units, tiles.batch_tile))


def _missing(device: Device, layer: Layer, projection: int) -> str | None:
    dtype = layer.dtype
    if device.capability < OLDEST:
        return f"the engine needs compute capability 8.0, {device.name} has {device.capability / 10}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the engine has float32, bfloat16 and float16, not {dtype}"
    if projection:
        return "the engine has no projection"
    if layer.B * layer.directions * layer.layers * 4 * (layer.H + ALIGNED) >= 2**31:
        return f"offsets in a step take 32 bits, B={layer.B} rows of H={layer.H} more"
    return None


def _engine_us(tiles: Tiles) -> float:
    device, layer = tiles.device, tiles.layer
    load = LOAD * -(-tiles.chunks // tiles.ahead)
    latency = POINTWISE + (ROUND_TRIP if tiles.slices == 1 else RELEASE + POLL + load)
    if layer.layers > 1:
        latency += load + (POLL if tiles.slices == 1 else 0)
    read = tiles.exchanged + tiles.weights
    arithmetic = 2 * tiles.weights // layer.dtype.itemsize * tiles.batch_tile / _flops(device, layer)
    cycles = _waves(tiles) * (latency + max(arithmetic, read / SHARED_BYTES))
    exchange = tiles.programs * tiles.exchanged if tiles.together > 1 else 0
    return (cycles / device.clock + exchange / device.l2_bandwidth) * 1e6


def _waves(tiles: Tiles) -> int:
    return -(-tiles.sets // (tiles.device.sms // tiles.together))


def _stepwise_us(device: Device, layer: Layer) -> float:
    rows = layer.blocks * layer.H
    weights = rows * layer.H * layer.dtype.itemsize
    read = weights / (device.l2_bandwidth if weights <= device.l2_bytes else device.memory_bandwidth)
    product = 2 * layer.B * rows * layer.H / (_flops(device, layer) * device.sms * device.clock)
    traffic = 2 * layer.B * rows * 4 / device.l2_bandwidth
    return layer.directions * (2 * LAUNCH_US + (read + product + traffic) * 1e6)


def _flops(device: Device, layer: Layer) -> int:
    """Of an SM per cycle."""
    if not layer.tensor_cores:
        return device.fp32_flops
    return device.tensor_flops if layer.dtype.itemsize == 2 else device.tf32_flops
