"""What a target is, and what measured rows say of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from benchmarks.ceilings import AT_CEILING
from benchmarks.results import Cell, Results, Row, geometric_mean


@dataclass(frozen=True)
class Target:
    """Values to reach over the cells of one kind: their geometric mean, and the worst. More is better.

    dtype: as the table shows it.
    """

    title: str
    dtype: str
    mean: float
    worst: float | None

    backends: ClassVar[tuple[str, ...]] = ("cpp",)  # whose rows count as ours

    @property
    def cells(self) -> list[Cell]:
        raise NotImplementedError

    @property
    def one_of(self) -> bool:
        """Whether the cells are ways to do the same, of which one would use the best."""
        return False

    def label(self, cell: Cell) -> str:
        """What tells the cell from the others."""
        return cell[1]

    def admits(self, row: Row) -> bool:
        """Whether a row of one of its cells enters."""
        return row.counts

    def excludes(self, rows: Sequence[Row]) -> bool:
        """Whether the rows of one of its cells show that it is not of this kind after all."""
        return False

    def value(self, row: Row, results: Results) -> float | None:
        return row.ratio


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


def at_ceiling(row: Row, results: Results) -> bool:
    """Whether our rate comes to AT_CEILING of what products reached in the same run."""
    rate = results.runs[row.run].ceilings.rate(row.dtype)
    return rate is not None and row.gflops is not None and row.gflops >= AT_CEILING * rate


def judge(target: Target, results: Results) -> Verdict:
    of_cell: dict[Cell, list[Row]] = {}
    for row in results.rows:
        of_cell.setdefault(row.cell, []).append(row)
    cells = [cell for cell in target.cells if cell not in of_cell or not target.excludes(of_cell[cell])]
    values: dict[Cell, float] = {}
    limits: dict[Cell, bool] = {}
    for cell in cells:
        decisive = _decisive(target, of_cell.get(cell, []), results)
        if decisive is not None:
            row, values[cell] = decisive
            limits[cell] = at_ceiling(row, results)
    expected = len(cells)
    if target.one_of:
        expected = 1
        values = dict(sorted(values.items(), key=lambda item: item[1])[-1:])
    if not values:
        return Verdict(target, 0, expected, 0, None, None, "", "not measured")
    counted_as = [
        max(value, target.mean, target.worst or 0) if limits[cell] else value for cell, value in values.items()
    ]
    worst = min(values, key=lambda cell: values[cell])
    limit = sum(limits[cell] for cell in values)
    text = _text(target, list(values.values()), counted_as, expected, limit)
    mean = geometric_mean(list(values.values()))
    return Verdict(target, len(values), expected, limit, mean, values[worst], target.label(worst), text)


def _decisive(target: Target, rows: Sequence[Row], results: Results) -> tuple[Row, float] | None:
    """Of our backends the one that does best, by its row against the best baseline, of those the target names."""
    worst: dict[str, tuple[Row, float]] = {}
    for row in rows:
        value = target.value(row, results) if row.backend in target.backends and target.admits(row) else None
        if value is not None and (row.backend not in worst or value < worst[row.backend][1]):
            worst[row.backend] = row, value
    return max(worst.values(), key=lambda found: found[1], default=None)


def _text(target: Target, values: list[float], counted_as: list[float], expected: int, at_ceiling: int) -> str:
    if _passes(target, values):
        verdict = "reached"
    elif _passes(target, counted_as):
        verdict = f"reached, with {at_ceiling} at the hardware's limit"
    else:
        verdict = "not reached"
    return verdict if len(values) == expected else f"incomplete: {len(values)} of {expected} cases; so far {verdict}"


def _passes(target: Target, values: list[float]) -> bool:
    return geometric_mean(values) >= target.mean and min(values) >= (target.worst or 0)
