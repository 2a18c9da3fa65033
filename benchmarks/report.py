"""Results as tables in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import targets
from benchmarks.ceilings import Ceilings
from benchmarks.extras import optional
from benchmarks.results import ModelRow, Results, Row, means, slower_than_torch

WIDTH_OF_A_FILE = 200
# Columns that a table has where one of its rows does.
RATES = {"GFLOP/s": "gflops", "GB/s": "bandwidth", "us a step": "step_us", "model's": "model_step_us"}


def new_console() -> Any:
    """rich's console; wide where the output is no terminal, so that no cell is cut."""
    console = optional("rich.console").Console()
    return console if console.is_terminal else optional("rich.console").Console(width=WIDTH_OF_A_FILE)


def show(results: Results, console: Any) -> None:
    if results.model:
        console.print(_model_table(results.model))
        _show_checks(results.model, console)
    for op in dict.fromkeys(row.op for row in results.rows):
        console.print(_table(op, [row for row in results.rows if row.op == op]))
    _show_notes(results.rows, console)
    if found := means(results.rows):
        table = _new_table("Geometric means of the ratios of the rows that count")
        for column in ("op", "dtype", "pass", "backend", "against", "cases", "ratio", "lowest", "highest"):
            table.add_column(column)
        for m in found:
            ratios = [f"{ratio:.2f}x" for ratio in (m.ratio, m.lowest, m.highest)]
            table.add_row(m.op, m.dtype, m.mode, m.backend, m.baseline, str(m.cases), *ratios)
        console.print(table)
    for row in slower_than_torch(results.rows):
        console.print(
            f"[yellow]auto is slower than {row.baseline}: {row.case} {row.dtype} {row.mode} "
            f"({row.ratio:.2f}x, ran {row.backend})"
        )


def show_ceilings(ceilings: Ceilings, console: Any) -> None:
    bandwidths = ("memory", ceilings.memory), ("L2", ceilings.l2), ("copy", ceilings.copy)
    rates = [f"torch.mm {dtype} {rate:.0f} GFLOP/s" for dtype, rate in ceilings.products.items()]
    rates += [f"{name} {rate:.0f} GB/s" for name, rate in bandwidths if rate]
    if rates:
        console.print(f"{'ceilings':<12} {', '.join(rates)}", highlight=False)


def show_targets(results: Results, console: Any) -> None:
    """The verdicts over all rows that are known, those of earlier runs too."""
    if found := targets.verdicts(results):
        table = _new_table(f"Targets: {targets.title(results)}; the rows of all runs in the result file")
        for column in targets.HEADER:
            table.add_column(column)
        for verdict in found:
            table.add_row(*targets.cells(verdict), style="green" if verdict.reached else None)
        console.print(table)


def _table(op: str, rows: Sequence[Row]) -> Any:
    table = _new_table(f"{op}: ratio above 1 = faster than the baseline; rows marked * count in no mean and no plot")
    for column in ("case", "dtype", "pass", "backend", "against"):
        table.add_column(column)
    measured = {column: name for column, name in RATES.items() if any(getattr(row, name) is not None for row in rows)}
    for column in ("ms", "baseline ms", "ratio", "quartiles", *measured, "error", "baseline's"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.case,
            row.dtype,
            row.mode,
            f"{row.backend} ({row.kernel})" if row.kernel else row.backend,
            f"{row.baseline} ({row.baseline_kernel})",
            _time(row.median_ms, row.spread),
            _time(row.baseline_median_ms, row.baseline_spread),
            "-" if row.ratio is None else f"{row.ratio:.2f}x{' ' if row.counts else '*'}",
            "-" if row.ratio_low is None else f"{row.ratio_low:.2f}-{row.ratio_high:.2f}",
            *("-" if getattr(row, name) is None else f"{getattr(row, name):.1f}" for name in measured.values()),
            _error(row.error),
            _error(row.baseline_error),
            style=None if row.counts else "dim",
        )
    return table


def _model_table(rows: Sequence[ModelRow]) -> Any:
    table = _new_table("Handwritten digits: trained on torch.nn, then swapped")
    for column in ("asked for", "ran"):
        table.add_column(column)
    measured = ("logits differ", "losses differ", "correct", "torch.nn's", "step ms", "before", "predict ms", "before")
    for column in measured:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.requested,
            f"{row.backend} ({row.kernel})",
            f"{row.logit_difference:.1e}",
            f"{row.loss_difference:.1e}",
            f"{row.correct}/{row.images}",
            f"{row.baseline_correct}/{row.images}",
            _time(row.train_ms, row.train_spread),
            _time(row.baseline_train_ms, row.baseline_train_spread),
            _time(row.predict_ms, row.predict_spread),
            _time(row.baseline_predict_ms, row.baseline_predict_spread),
        )
    return table


def _show_checks(rows: Sequence[ModelRow], console: Any) -> None:
    for row in rows:
        for check, passed in row.checks.items():
            verdict = "[green]pass[/]" if passed else "[bold red]FAIL[/]"
            console.print(f"{verdict} {row.requested}: {check}", highlight=False)


def _show_notes(rows: Sequence[Row], console: Any) -> None:
    """Why rows do not count, each reason once with its number of rows; failures by case."""
    reasons: dict[str, int] = {}
    failures = [f"{row.op}/{row.case}-{row.dtype} {row.mode} {row.requested}: {row.note}" for row in rows if row.failed]
    for failure in dict.fromkeys(failures):
        console.print(f"[bold red]FAIL[/] {failure}")
    for row in rows:
        if row.note and not row.failed:
            reasons[row.note] = reasons.get(row.note, 0) + 1
    for reason, count in reasons.items():
        console.print(f"* {count} of {len(rows)} rows do not count: {reason}", highlight=False)


def _new_table(title: str) -> Any:
    new = optional("rich.table").Table
    return new(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)


def _time(median_ms: float | None, spread: float | None) -> str:
    return "-" if median_ms is None or spread is None else f"{median_ms:.3f} ±{spread:4.0%}"


def _error(error: float | None) -> str:
    return "-" if error is None else f"{error:.1e}"
