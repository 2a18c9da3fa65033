"""What the CPU kernels are meant to reach against the best peer."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.cases import BACKWARD, FORWARD, SUITES, Case, RecurrentCase, StepCase
from benchmarks.results import ANOTHER_FORM, ONEDNN_OFF, PREPARED, THEIRS_PREPARED, Cell, Row
from benchmarks.verdicts import Target


@dataclass(frozen=True)
class CpuTarget(Target):
    """Ratios to reach over the cpu suite's cases of one kind.

    kind: padded, ragged or step. against: how the baseline's name ends; by default each case's best peer counts.
    unprepared: peers that pack their weights beforehand count as well, against ours that pack them in the call.
    as_it_comes: torch.nn with oneDNN on, as users have it, counts even where it is faster without.
    """

    op: str
    mode: str
    kind: str = "padded"
    against: str = ""
    unprepared: bool = False
    as_it_comes: bool = False

    @property
    def cells(self) -> list[Cell]:
        return [
            (case.op, case.shape, case.dtype, self.mode)
            for case in SUITES["cpu"]
            if (case.op, case.dtype) == (self.op, self.dtype) and self._fits(case)
        ]

    @property
    def one_of(self) -> bool:
        return self.kind == "step"

    def _fits(self, case: Case) -> bool:
        if isinstance(case, RecurrentCase):
            return self.kind == ("ragged" if case.ragged else "padded")
        return isinstance(case, StepCase) and self.kind == "step"

    def admits(self, row: Row) -> bool:
        if not row.baseline.endswith(self.against):
            return False
        if self.unprepared:
            return row.requested != PREPARED and row.note in ("", THEIRS_PREPARED)
        if self.as_it_comes:
            another = row.note.endswith(ANOTHER_FORM) and not row.failed
            return (row.counts or another) and not row.baseline_kernel.endswith(ONEDNN_OFF)
        return row.counts


CPU_TARGETS = [
    CpuTarget("LSTM inference", "fp32", 1.2, 0.97, "lstm", FORWARD),
    CpuTarget("the same, only theirs prepared", "fp32", 1.2, 0.97, "lstm", FORWARD, unprepared=True),
    CpuTarget("LSTM training", "fp32", 1.35, 1.05, "lstm", BACKWARD),
    CpuTarget("LSTM inference", "bf16", 1.6, 0.97, "lstm", FORWARD),
    CpuTarget("LSTM training", "bf16", 3.5, 1.3, "lstm", BACKWARD),
    CpuTarget("GRU training", "fp32", 2.0, 1.1, "gru", BACKWARD),
    CpuTarget("lengths, LSTM training, against packed", "fp32", 6.0, None, "lstm", BACKWARD, "ragged", "packed"),
    CpuTarget("lengths, LSTM training, against padded", "fp32", 1.5, None, "lstm", BACKWARD, "ragged", "padded"),
    CpuTarget(
        "one step, B=1, H=256, against nn.LSTM as it comes", "fp32", 8.0, None, "step", FORWARD, "step",
        "torch.nn.LSTM", as_it_comes=True,
    ),
]  # fmt: skip
