"""Rows of results: their fields, their files, how runs are merged, and the means over rows."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from benchmarks.ceilings import Ceilings
from benchmarks.environment import Environment

OWN_BACKENDS = ("cpp", "triton", "cuda")
BY_TORCH = "auto ran torch's own kernel"
PREPARED = "prepared"  # as `requested`: with weights packed beforehand
OURS_PREPARED = "our weights were packed beforehand, the baseline's not"
THEIRS_PREPARED = "the baseline's weights were packed beforehand, ours not"
ANOTHER_FORM = "is faster in another form"  # follows the name of the baseline
ONEDNN_OFF = ", oneDNN off"  # how the kernel of torch.nn's other form on a CPU ends
NO_ROOM = "the GPU's memory does not hold the case"

Cell = tuple[str, str, str, str]  # op, case, dtype, mode


@dataclass(frozen=True)
class Row:
    """One implementation against one baseline, on one case.

    ratio is the median over the rounds of baseline's time / our time in a round: above 1, ours is
    faster; ratio_low and ratio_high are its quartiles. Errors are the largest relative L2 error
    against float64 of the outputs and, in forward+backward, of any gradient. Rates are those of the
    operations that the case asks for: padding that a baseline computes besides is not counted.
    Bandwidths are of pooling: GB/s of x read, and in training of its gradient written.
    step_us: of a forward pass through recurrent layers, per step and layer; model_step_us: what the
    kernel's cost model expects of it, where it has one.
    counts: whether the row enters means and plots; where not, note says why.
    """

    op: str
    case: str
    dtype: str
    mode: str  # forward, forward+backward
    requested: str  # the backends asked for that came to this kernel, such as "cpp, auto"; or PREPARED
    backend: str  # the backend that ran
    kernel: str
    baseline: str
    baseline_kernel: str
    median_ms: float | None
    spread: float | None  # interquartile range / median
    baseline_median_ms: float | None
    baseline_spread: float | None
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    gflops: float | None  # GFLOP/s; None where operations are not what bounds the case
    baseline_gflops: float | None
    intensity: float | None  # flop per byte of one step that reads the weights again
    error: float | None
    baseline_error: float | None
    repetitions: int
    counts: bool
    failed: bool  # ours raised or is wrong
    note: str
    run: int = 0  # index into Results.runs
    # Older files lack what follows.
    step_us: float | None = None
    model_step_us: float | None = None
    bandwidth: float | None = None
    baseline_bandwidth: float | None = None

    @property
    def cell(self) -> Cell:
        """What is measured together, and replaced together."""
        return self.op, self.case, self.dtype, self.mode

    @property
    def by_auto(self) -> bool:
        return "auto" in self.requested.split(", ")


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
    run: int = 0


@dataclass(frozen=True)
class Run:
    """What the rows of one run have in common."""

    environment: Environment
    ceilings: Ceilings = field(default_factory=Ceilings)


@dataclass(frozen=True)
class Results:
    """Rows of one device, from one or several runs."""

    runs: list[Run]
    rows: list[Row]
    model: list[ModelRow]

    @property
    def environment(self) -> Environment:
        """Of the latest run."""
        return self.runs[-1].environment

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


def geometric_mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def means(rows: Iterable[Row]) -> list[Mean]:
    ratios: dict[tuple[str, str, str, str, str], list[float]] = {}
    for row in rows:
        if row.counts and row.ratio is not None:
            ratios.setdefault((row.op, row.dtype, row.mode, row.backend, row.baseline), []).append(row.ratio)
    return [Mean(*key, len(found), geometric_mean(found), min(found), max(found)) for key, found in ratios.items()]


def slower_than_torch(rows: Iterable[Row], tolerance: float = 0.05) -> list[Row]:
    """Rows in which `auto` lost to torch.nn by more than the tolerance, whatever kernel it took."""
    return [
        row
        for row in rows
        if row.baseline.startswith("torch.nn")
        and row.by_auto
        and (row.counts or row.note == BY_TORCH)
        and row.ratio is not None
        and row.ratio < 1 / (1 + tolerance)
    ]


def left_out(cell: Cell, note: str, failed: bool = False) -> Row:
    """A row that says why its cell was not measured."""
    op, case, dtype, mode = cell
    return Row(
        op=op, case=case, dtype=dtype, mode=mode, requested="", backend="", kernel="", baseline="", baseline_kernel="",
        median_ms=None, spread=None, baseline_median_ms=None, baseline_spread=None, ratio=None, ratio_low=None,
        ratio_high=None, gflops=None, baseline_gflops=None, intensity=None, error=None, baseline_error=None,
        repetitions=0, counts=False, failed=failed, note=note,
    )  # fmt: skip


def merged(old: Results | None, new: Results) -> Results:
    """The new rows, and of the old ones those of cells that were not measured again."""
    if old is None:
        return new
    cells, shift = {row.cell for row in new.rows}, len(old.runs)
    rows = [row for row in old.rows if row.cell not in cells]
    model = [] if new.model else old.model
    rows += [replace(row, run=row.run + shift) for row in new.rows]
    model = model + [replace(row, run=row.run + shift) for row in new.model]
    used = {row.run for row in rows} | {row.run for row in model}
    kept = [index for index in range(shift + len(new.runs)) if index in used] or [shift]
    place = {index: position for position, index in enumerate(kept)}
    runs = [*old.runs, *new.runs]
    return Results(
        [runs[index] for index in kept],
        [replace(row, run=place[row.run]) for row in rows],
        [replace(row, run=place[row.run]) for row in model],
    )


def write(results: Results, folder: Path) -> list[Path]:
    """<device>.json with everything, <device>.csv with a line per row and its environment in each."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{results.environment.device}.{kind}" for kind in ("json", "csv")]
    paths[0].write_text(json.dumps(asdict(results), indent=1) + "\n")
    environments = [asdict(run.environment) for run in results.runs]
    names = [f.name for f in fields(Row) if f.name != "run"]
    with paths[1].open("w", newline="") as file:
        writer = csv.DictWriter(file, [*names, *environments[0]], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({**asdict(row), **environments[row.run]} for row in results.rows)
    return paths


def read(path: Path) -> Results:
    """Reads what `write` wrote as JSON."""
    data: dict[str, Any] = json.loads(path.read_text())
    return Results(
        [Run(Environment(**run["environment"]), Ceilings(**run["ceilings"])) for run in data["runs"]],
        [Row(**row) for row in data["rows"]],
        [ModelRow(**row) for row in data["model"]],
    )


def earlier(environment: Environment, folder: Path) -> Results | None:
    """What the folder already holds for this device."""
    path = folder / f"{environment.device}.json"
    return read(path) if path.is_file() else None


def read_folder(folder: Path) -> Sequence[Results]:
    """All result files of a folder, GPUs first."""
    found = [read(path) for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda results: not results.environment.on_gpu)
