"""Rows of results: their fields, their files, and the means over them."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.environment import Environment

OWN_BACKENDS = ("cpp", "triton", "cuda")


@dataclass(frozen=True)
class Row:
    """One implementation against one baseline, on one case.

    ratio is baseline median / median: above 1, ours is faster. Errors are the largest relative L2
    error against float64 of the outputs and, in forward+backward, of any gradient.
    counts: whether the row enters means and plots; where not, note says why.
    """

    op: str
    case: str
    dtype: str
    mode: str  # forward, forward+backward
    requested: str  # the backend asked for
    backend: str  # the backend that ran
    kernel: str
    baseline: str
    baseline_kernel: str
    median_ms: float | None
    spread: float | None  # interquartile range / median
    baseline_median_ms: float | None
    baseline_spread: float | None
    ratio: float | None
    error: float | None
    baseline_error: float | None
    repetitions: int
    counts: bool
    failed: bool  # ours raised or is wrong
    note: str


@dataclass(frozen=True)
class ModelRow:
    """The model after the swap against the same model on torch.nn."""

    requested: str
    backend: str  # what ran, for each operation
    kernel: str
    logit_difference: float
    loss_difference: float  # the largest over the first losses
    losses: list[float]
    correct: int
    baseline_correct: int
    images: int
    train_ms: float
    train_spread: float
    baseline_train_ms: float
    baseline_train_spread: float
    predict_ms: float
    predict_spread: float
    baseline_predict_ms: float
    baseline_predict_spread: float
    checks: dict[str, bool]


@dataclass(frozen=True)
class Results:
    environment: Environment
    rows: list[Row]
    model: list[ModelRow]

    @property
    def failed(self) -> bool:
        return any(row.failed for row in self.rows) or any(not all(row.checks.values()) for row in self.model)


@dataclass(frozen=True)
class Mean:
    """The geometric mean of the ratios of the rows that count, over cases of one kind."""

    op: str
    dtype: str
    mode: str
    backend: str
    baseline: str
    cases: int
    ratio: float
    lowest: float
    highest: float


def means(rows: Iterable[Row]) -> list[Mean]:
    ratios: dict[tuple[str, str, str, str, str], list[float]] = {}
    for row in rows:
        if row.counts and row.ratio is not None:
            ratios.setdefault((row.op, row.dtype, row.mode, row.backend, row.baseline), []).append(row.ratio)
    return [
        Mean(*key, len(found), math.exp(sum(map(math.log, found)) / len(found)), min(found), max(found))
        for key, found in ratios.items()
    ]


def slower_than_torch(rows: Iterable[Row], tolerance: float = 0.05) -> list[Row]:
    """Rows in which `auto` lost to torch.nn by more than the tolerance, whatever kernel it took."""
    return [
        row
        for row in rows
        if row.op == "lstm" and row.requested == "auto" and row.ratio is not None and row.ratio < 1 / (1 + tolerance)
    ]


def write(results: Results, folder: Path) -> list[Path]:
    """<device>.json with everything, <device>.csv with a line per row and the environment in each."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = asdict(results.environment)
    paths = [folder / f"{results.environment.device}.{kind}" for kind in ("json", "csv")]
    paths[0].write_text(json.dumps(asdict(results), indent=1) + "\n")
    with paths[1].open("w", newline="") as file:
        writer = csv.DictWriter(file, [*(field.name for field in fields(Row)), *environment], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**asdict(row), **environment} for row in results.rows)
    return paths


def read(path: Path) -> Results:
    """Reads what `write` wrote as JSON."""
    data: dict[str, Any] = json.loads(path.read_text())
    return Results(
        Environment(**data["environment"]),
        [Row(**row) for row in data["rows"]],
        [ModelRow(**row) for row in data["model"]],
    )


def read_folder(folder: Path) -> Sequence[Results]:
    """All result files of a folder, GPUs first."""
    found = [read(path) for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda results: not results.environment.on_gpu)
