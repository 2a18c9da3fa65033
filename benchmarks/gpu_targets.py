"""What the GPU kernels are meant to reach on an H100, over the gpu suite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from benchmarks.cases import BACKWARD, FORWARD, MODES, SUITES, Case, PoolCase, RecurrentCase
from benchmarks.results import Cell, Results, Row
from benchmarks.verdicts import Target

PUBLISHED_STEP_US = 1.96  # cuDNN's at fp16, H = I = 768, B = 16, T = 1024, in FlashRNN's chart
REGION_H, REGION_B = (256, 1024), 64  # the sizes with targets of their own, and up to which batch


@dataclass(frozen=True)
class GpuTarget(Target):
    """Values to reach over the gpu suite's cases that fit: ratios to torch.nn, unless a subclass says otherwise.

    against: how the baseline's name ends. branch: only cells for which torch takes this branch of cuDNN.
    by_auto: only the cells in which `auto` took a kernel of ours.
    """

    modes: Sequence[str]
    fits: Callable[[Case], bool]
    against: str = ""
    branch: str = ""
    by_auto: bool = False

    backends: ClassVar[tuple[str, ...]] = ("triton", "cuda")

    @property
    def cells(self) -> list[Cell]:
        fitting = [case for case in SUITES["gpu"] if self.dtype in ("all", case.dtype) and self.fits(case)]
        return [(case.op, case.shape, case.dtype, mode) for case in fitting for mode in self.modes]

    def label(self, cell: Cell) -> str:
        _, shape, dtype, mode = cell
        return f"{shape}, {dtype}, {mode}"

    def admits(self, row: Row) -> bool:
        return row.counts and row.baseline.startswith("torch.nn") and self._of_kind(row)

    def excludes(self, rows: Sequence[Row]) -> bool:
        return not any(self._of_kind(row) for row in rows)

    def _of_kind(self, row: Row) -> bool:
        if self.by_auto and not (row.by_auto and row.backend in self.backends):
            return False
        return row.baseline.endswith(self.against) and row.baseline_kernel.endswith(self.branch)


class OfPublishedStep(GpuTarget):
    """The value is the published time of a step over ours."""

    def admits(self, row: Row) -> bool:
        return not row.failed

    def value(self, row: Row, results: Results) -> float | None:
        return PUBLISHED_STEP_US / row.step_us if row.step_us else None


class OfBandwidth(GpuTarget):
    """The value is the share of the bandwidth that a copy had in the same run."""

    def admits(self, row: Row) -> bool:
        return not row.failed

    def value(self, row: Row, results: Results) -> float | None:
        copy = results.runs[row.run].ceilings.copy
        return row.bandwidth / copy if row.bandwidth and copy else None


def _plain(case: Case) -> bool:
    return isinstance(case, RecurrentCase) and case.layers == 1 and not case.bidirectional and not case.ragged


def _region(case: Case) -> bool:
    low, high = REGION_H
    return isinstance(case, RecurrentCase) and case.op == "lstm" and low <= case.H <= high and case.B <= REGION_B


def _one_layer(case: Case) -> bool:
    return _plain(case) and _region(case)


def _stacked(case: Case) -> bool:
    return isinstance(case, RecurrentCase) and (case.layers > 1 or case.bidirectional)


def _ragged(case: Case) -> bool:
    return isinstance(case, RecurrentCase) and case.ragged


def _published(case: Case) -> bool:
    return case == RecurrentCase(16, 1024, 768, 768, dtype="fp16")


def _small_batch(case: Case) -> bool:
    return isinstance(case, RecurrentCase) and case.B <= REGION_B and not case.ragged


def _recurrent(case: Case) -> bool:
    return isinstance(case, RecurrentCase)


def _pool(case: Case) -> bool:
    return isinstance(case, PoolCase) and not case.ragged


GPU_TARGETS: list[GpuTarget] = [
    GpuTarget("LSTM inference, H from 256 to 1024, B up to 64", "bf16", 2.0, None, (FORWARD,), _one_layer),
    GpuTarget("LSTM training, the same", "bf16", 1.5, None, (BACKWARD,), _one_layer),
    GpuTarget("LSTM inference, the same, in TF32", "fp32", 2.0, None, (FORWARD,), _one_layer),
    GpuTarget("LSTM training, the same, in TF32", "fp32", 1.5, None, (BACKWARD,), _one_layer),
    GpuTarget("two layers or directions", "all", 2.0, None, MODES, _stacked),
    GpuTarget("lengths, against packed", "all", 5.0, None, MODES, _ragged, "packed"),
    OfPublishedStep(
        f"{PUBLISHED_STEP_US} us over a step's time, H=I=768, B=16, T=1024", "fp16", 1.0, None, (FORWARD,), _published
    ),
    GpuTarget("where cuDNN runs STANDARD, B up to 64", "all", 2.0, None, MODES, _small_batch, branch="STANDARD"),
    GpuTarget("where auto takes our kernels", "all", 0.97, 0.97, MODES, _recurrent, by_auto=True),
    OfBandwidth("pooling, inference: share of a copy's bandwidth", "all", 0.85, 0.85, (FORWARD,), _pool),
    OfBandwidth("pooling, training: share of a copy's bandwidth", "all", 0.75, 0.75, (BACKWARD,), _pool),
]
