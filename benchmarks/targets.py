"""The targets of the device that was measured, and the table of what became of them."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.cpu_targets import CPU_TARGETS
from benchmarks.gpu_targets import GPU_TARGETS
from benchmarks.results import Results
from benchmarks.verdicts import Target, Verdict, judge


def verdicts(results: Results) -> list[Verdict]:
    """One for each target; none where not a single row of the targets has been measured."""
    targets: Sequence[Target] = GPU_TARGETS if results.environment.on_gpu else CPU_TARGETS
    found = [judge(target, results) for target in targets]
    return found if any(verdict.measured for verdict in found) else []


def title(results: Results) -> str:
    if results.environment.on_gpu:
        return "GPU kernels over the cases of the gpu suite, against torch.nn where nothing else is said"
    return "C++ kernels against the best peer of each case of the cpu suite"


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
