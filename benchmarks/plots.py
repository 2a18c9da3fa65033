"""Plots of results: the ratio of every row that counts, and the model's times before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.extras import optional
from benchmarks.measure import MODES
from benchmarks.results import ModelRow, Results, Row

COLOURS = {"cpp": "#2a6f97", "triton": "#c8553d", "cuda": "#588157"}
INK, GRID, BEFORE, AFTER = "#333333", "#dddddd", "#b8b8b8", "#2a6f97"


def draw(results: Results, folder: Path) -> list[Path]:
    """<device>-<op>-<baseline>.png for everything that has rows that count, and <device>-digits.png."""
    folder.mkdir(parents=True, exist_ok=True)
    e = results.environment
    title = f"{e.device_name} ({e.isa}), torch {e.torch}, {f'cuDNN {e.cudnn}' if e.on_gpu else f'{e.threads} threads'}"
    paths = []
    counted: dict[tuple[str, str], list[Row]] = {}
    for row in results.rows:
        if row.counts and row.ratio is not None:
            counted.setdefault((row.op, row.baseline), []).append(row)
    for (op, baseline), rows in counted.items():
        path = folder / f"{e.device}-{op}-{baseline}.png"
        _save(_ratios(op, baseline, rows, title), path)
        paths.append(path)
    if results.model:
        path = folder / f"{e.device}-digits.png"
        _save(_model_times(results.model, title), path)
        paths.append(path)
    return paths


def _ratios(op: str, baseline: str, rows: Sequence[Row], title: str) -> Any:
    """One panel per pass; a bar per case and backend, from 1 (level with the baseline)."""
    cases = list(dict.fromkeys((row.case, row.dtype) for row in rows))
    backends = list(dict.fromkeys(row.backend for row in rows))
    modes = [mode for mode in MODES if any(row.mode == mode for row in rows)]
    figure, panels = _figure(len(modes), height=1.2 + 0.34 * len(cases) * max(1, 0.7 * len(backends)))
    thickness = 0.76 / len(backends)
    longest = max(row.ratio or 0 for row in rows)
    for panel, mode in zip(panels, modes, strict=True):
        for n, backend in enumerate(backends):
            found = {(row.case, row.dtype): row.ratio for row in rows if (row.mode, row.backend) == (mode, backend)}
            places = [k + (n - (len(backends) - 1) / 2) * thickness for k, case in enumerate(cases) if case in found]
            ratios = [found[case] for case in cases if case in found]
            bars = panel.barh(places, ratios, 0.9 * thickness, color=COLOURS.get(backend, INK), label=backend)
            panel.bar_label(bars, [f"{ratio:.2f}x" for ratio in ratios], padding=3, fontsize=8, color=INK)
        panel.axvline(1, color=INK, linewidth=1)
        panel.set_xlim(0, 1.18 * max(longest, 1))
        panel.set_title(mode, fontsize=10, loc="left", color=INK)
        panel.set_yticks(range(len(cases)), [f"{case} {dtype}" for case, dtype in cases], fontsize=8)
        panel.set_ylim(len(cases) - 0.4, -0.6)
    panels[-1].legend(frameon=False, fontsize=8, loc="lower right")
    _titles(figure, f"{op}: times as fast as {baseline}", title)
    return figure


def _model_times(rows: Sequence[ModelRow], title: str) -> Any:
    figure, panels = _figure(2, height=1.3 + 0.7 * len(rows))
    measured = (
        ("training step", [(row.baseline_train_ms, row.train_ms) for row in rows]),
        (f"predicting {rows[0].images} images", [(row.baseline_predict_ms, row.predict_ms) for row in rows]),
    )
    for panel, (name, times) in zip(panels, measured, strict=True):
        for shift, which, colour, label in ((-0.19, 0, BEFORE, "torch.nn"), (0.19, 1, AFTER, "after the swap")):
            values = [pair[which] for pair in times]
            bars = panel.barh([k + shift for k in range(len(rows))], values, 0.34, color=colour, label=label)
            panel.bar_label(bars, [f"{value:.2f} ms" for value in values], padding=3, fontsize=8, color=INK)
        panel.set_xlim(0, 1.25 * max(map(max, times)))
        panel.set_title(name, fontsize=10, loc="left", color=INK)
        panel.set_yticks(range(len(rows)), [row.requested for row in rows], fontsize=8)
        panel.set_ylim(len(rows) - 0.4, -0.6)
    panels[0].legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    _titles(figure, "Handwritten digits: bidirectional LSTM and additive attention pooling", title)
    return figure


def _figure(panels: int, height: float) -> tuple[Any, list[Any]]:
    """A figure without pyplot, which would look for a display."""
    figure = optional("matplotlib.figure").Figure(figsize=(4 + 3.6 * panels, height), layout="constrained")
    axes = list(figure.subplots(1, panels, sharey=True, squeeze=False)[0])
    for axis in axes:
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.spines["bottom"].set_color(GRID)
        axis.tick_params(length=0, labelsize=8, colors=INK)
        axis.grid(axis="x", color=GRID, linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes


def _titles(figure: Any, title: str, machine: str) -> None:
    figure.suptitle(title, fontsize=12, x=0.01, ha="left", color=INK, fontweight="bold")
    figure.supxlabel(machine, fontsize=8, x=0.99, ha="right", color=INK)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=140, facecolor="white")
