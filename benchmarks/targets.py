"""What the CPU kernels are meant to reach against the best peer, and whether the measured rows do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.cases import BACKWARD, FORWARD, SUITES, Case, RecurrentCase, StepCase
from benchmarks.ceilings import AT_CEILING
from benchmarks.results import ANOTHER_FORM, ONEDNN_OFF, PREPARED, THEIRS_PREPARED, Results, Row, geometric_mean


@dataclass(frozen=True)
class Target:
    """Ratios to reach over the cpu suite's cases of one kind: their geometric mean, and the worst.

    kind: padded, ragged or step. against: how the baseline's name ends; by default each case's best peer counts.
    unprepared: peers that pack their weights beforehand count as well, against ours that pack them in the call.
    as_it_comes: torch.nn with oneDNN on, as users have it, counts even where it is faster without.
    """

    title: str
    op: str
    dtype: str
    mode: str
    mean: float
    worst: float | None = None
    kind: str = "padded"
    against: str = ""
    unprepared: bool = False
    as_it_comes: bool = False

    @property
    def cases(self) -> list[str]:
        return [
            case.shape for case in SUITES["cpu"] if (case.op, case.dtype) == (self.op, self.dtype) and self._fits(case)
        ]

    def _fits(self, case: Case) -> bool:
        if isinstance(case, RecurrentCase):
            return self.kind == ("ragged" if case.ragged else "padded")
        return isinstance(case, StepCase) and self.kind == "step"

    def admits(self, row: Row) -> bool:
        """Whether a row of one of its cases enters."""
        if self.unprepared:
            return row.requested != PREPARED and row.note in ("", THEIRS_PREPARED)
        if self.as_it_comes:
            another = row.note.endswith(ANOTHER_FORM) and not row.failed
            return (row.counts or another) and not row.baseline_kernel.endswith(ONEDNN_OFF)
        return row.counts


TARGETS = [
    Target("LSTM inference", "lstm", "fp32", FORWARD, 1.2, 0.97),
    Target("the same, only theirs prepared", "lstm", "fp32", FORWARD, 1.2, 0.97, unprepared=True),
    Target("LSTM training", "lstm", "fp32", BACKWARD, 1.35, 1.05),
    Target("LSTM inference", "lstm", "bf16", FORWARD, 1.6, 0.97),
    Target("LSTM training", "lstm", "bf16", BACKWARD, 3.5, 1.3),
    Target("GRU training", "gru", "fp32", BACKWARD, 2.0, 1.1),
    Target("lengths, LSTM training, against packed", "lstm", "fp32", BACKWARD, 6.0, None, "ragged", "packed"),
    Target("lengths, LSTM training, against padded", "lstm", "fp32", BACKWARD, 1.5, None, "ragged", "padded"),
    Target(
        "one step, B=1, H=256, against nn.LSTM as it comes", "step", "fp32", FORWARD, 8.0, None, "step",
        "torch.nn.LSTM", as_it_comes=True,
    ),
]  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What the rows say of a target; ratio and worst are None where nothing was measured."""

    target: Target
    measured: int
    expected: int
    at_ceiling: int
    ratio: float | None
    worst: float | None
    worst_case: str
    text: str

    @property
    def reached(self) -> bool:
        return self.text.startswith("reached")


def verdicts(results: Results) -> list[Verdict]:
    """One for each target; none where not a single row of the targets has been measured."""
    found = [_verdict(target, results) for target in TARGETS]
    return found if any(verdict.measured for verdict in found) else []


def at_ceiling(row: Row, results: Results) -> bool:
    """Whether our rate comes to AT_CEILING of what products reached in the same run."""
    rate = results.runs[row.run].ceilings.rate(row.dtype)
    return rate is not None and row.gflops is not None and row.gflops >= AT_CEILING * rate


def _verdict(target: Target, results: Results) -> Verdict:
    rows = [_against_the_best(target, case, results.rows) for case in target.cases]
    found = {row.case: row for row in rows if row is not None and row.ratio is not None}
    expected = len(target.cases)
    if target.kind == "step":  # ways to do one and the same step: the fastest is what one would use
        expected = 1
        found = dict(sorted(found.items(), key=lambda item: item[1].ratio or 0)[-1:])
    if not found:
        return Verdict(target, 0, expected, 0, None, None, "", "not measured")
    ratios = {case: row.ratio for case, row in found.items() if row.ratio is not None}
    counted_as = {
        case: max(ratio, target.mean, target.worst or 0) if at_ceiling(found[case], results) else ratio
        for case, ratio in ratios.items()
    }
    worst_case = min(ratios, key=lambda case: ratios[case])
    mean, worst = geometric_mean(list(ratios.values())), ratios[worst_case]
    limit = sum(at_ceiling(row, results) for row in found.values())
    text = _text(target, list(ratios.values()), list(counted_as.values()), expected, limit)
    return Verdict(target, len(found), expected, limit, mean, worst, worst_case, text)


def _text(target: Target, ratios: list[float], counted_as: list[float], expected: int, at_ceiling: int) -> str:
    if _passes(target, ratios):
        verdict = "reached"
    elif _passes(target, counted_as):
        verdict = f"reached, with {at_ceiling} at the hardware's limit"
    else:
        verdict = "not reached"
    return verdict if len(ratios) == expected else f"incomplete: {len(ratios)} of {expected} cases; so far {verdict}"


def _passes(target: Target, ratios: list[float]) -> bool:
    return geometric_mean(ratios) >= target.mean and min(ratios) >= (target.worst or 0)


def _against_the_best(target: Target, case: str, rows: Sequence[Row]) -> Row | None:
    """Our C++ kernels' row for a case against its fastest baseline, of those the target names."""
    found = [
        row
        for row in rows
        if row.cell == (target.op, case, target.dtype, target.mode)
        and row.backend == "cpp"
        and target.admits(row)
        and row.baseline.endswith(target.against)
    ]
    return min(found, key=lambda row: row.ratio or 0, default=None)


HEADER = (
    "target",
    "dtype",
    "cases",
    "at limit",
    "mean wanted",
    "measured",
    "worst wanted",
    "measured",
    "in",
    "verdict",
)


def cells(verdict: Verdict) -> tuple[str, ...]:
    """A line of the table of targets."""
    t = verdict.target
    return (
        t.title,
        t.dtype,
        f"{verdict.measured} of {verdict.expected}",
        str(verdict.at_ceiling),
        f"{t.mean:.2f}",
        _ratio(verdict.ratio),
        _ratio(t.worst),
        _ratio(verdict.worst),
        verdict.worst_case,
        verdict.text,
    )


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
