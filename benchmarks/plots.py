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
    """<device>-<op>-<dtype>.png for everything that has rows that count, and <device>-digits.png."""
    folder.mkdir(parents=True, exist_ok=True)
    e = results.environment
    machine = f"{e.device_name} ({e.isa}), torch {e.torch}, {e.engine}"
    counted: dict[str, list[Row]] = {}
    for row in results.rows:
        if row.counts and row.ratio is not None:
            counted.setdefault(f"{row.op}-{row.dtype}", []).append(row)
    figures = {name: _ratios(rows) for name, rows in counted.items()}
    if results.model:
        figures["digits"] = _model_times(results.model)
    paths = []
    for name, figure in figures.items():
        figure.supxlabel(machine, fontsize=8, x=0.99, ha="right", color=INK)
        paths.append(folder / f"{e.device}-{name}.png")
        figure.savefig(paths[-1], dpi=140, facecolor="white")
    return paths


def _ratios(rows: Sequence[Row]) -> Any:
    """A panel per baseline and pass, a bar per case and backend; the line at 1 is the baseline."""
    baselines = {row.baseline: [other for other in rows if other.baseline == row.baseline] for row in rows}
    cases = {baseline: list(dict.fromkeys(row.case for row in found)) for baseline, found in baselines.items()}
    backends = list(dict.fromkeys(row.backend for row in rows))
    modes = [mode for mode in MODES if any(row.mode == mode for row in rows)]
    thickness = 0.76 / len(backends)
    widest = max(row.ratio or 0 for row in rows)
    inches = 0.22 + 0.14 * len(backends)  # of one case
    figure, panels = _figure([len(found) for found in cases.values()], len(modes), inches)
    for line, (baseline, found) in zip(panels, baselines.items(), strict=True):
        for panel, mode in zip(line, modes, strict=True):
            for n, backend in enumerate(backends):
                ratios = {row.case: row.ratio for row in found if (row.mode, row.backend) == (mode, backend)}
                offset = (n - (len(backends) - 1) / 2) * thickness
                places = [k + offset for k, case in enumerate(cases[baseline]) if case in ratios]
                values = [ratios[case] for case in cases[baseline] if case in ratios]
                bars = panel.barh(places, values, 0.9 * thickness, color=COLOURS.get(backend, INK))
                panel.bar_label(bars, [f"{value:.2f}x" for value in values], padding=3, fontsize=8, color=INK)
            panel.axvline(1, color=INK, linewidth=1)
            panel.set_xlim(0, 1.18 * max(widest, 1))
            _label(panel, f"{mode}, against {baseline}", cases[baseline])
    _head(figure, f"{rows[0].op}, {rows[0].dtype}: times as fast", {name: COLOURS.get(name, INK) for name in backends})
    return figure


def _model_times(rows: Sequence[ModelRow]) -> Any:
    """A panel for training and one for prediction, a pair of bars per backend asked for."""
    figure, ((training, predicting),) = _figure([2 * len(rows)], 2, 0.36)
    steps = [(row.baseline_train_ms, row.train_ms) for row in rows]
    predictions = [(row.baseline_predict_ms, row.predict_ms) for row in rows]
    images = f"predicting {rows[0].images} images"
    for panel, title, times in ((training, "training step", steps), (predicting, images, predictions)):
        for shift, which, colour in ((-0.19, 0, BEFORE), (0.19, 1, AFTER)):
            values = [pair[which] for pair in times]
            bars = panel.barh([k + shift for k in range(len(rows))], values, 0.34, color=colour)
            panel.bar_label(bars, [f"{value:.2f} ms" for value in values], padding=3, fontsize=8, color=INK)
        panel.set_xlim(0, 1.25 * max(map(max, times)))
        _label(panel, title, [row.backend.replace(", ", "\n") for row in rows])
    _head(figure, "digits: milliseconds before and after the swap", {"torch.nn": BEFORE, "rnnattn": AFTER})
    return figure


def _figure(cases: Sequence[int], columns: int, inches: float) -> tuple[Any, Any]:
    """A figure with a line of panels per entry of `cases`, as high as its number of cases asks for.
    Not by pyplot, which would look for a display."""
    size = 4 + 3.6 * columns, 0.9 + sum(0.5 + inches * n for n in cases)
    figure = optional("matplotlib.figure").Figure(figsize=size, layout="constrained")
    heights = [0.3 + inches * n for n in cases]
    share: dict[str, Any] = {"sharex": len(cases) > 1, "sharey": "row"}
    panels = figure.subplots(len(cases), columns, squeeze=False, height_ratios=heights, **share)
    for panel in panels.flat:
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.spines["bottom"].set_color(GRID)
        panel.tick_params(length=0, labelsize=8, colors=INK)
        panel.grid(axis="x", color=GRID, linewidth=0.6)
        panel.set_axisbelow(True)
    return figure, panels


def _label(panel: Any, title: str, bars: Sequence[str]) -> None:
    panel.set_title(title, fontsize=10, loc="left", color=INK)
    panel.set_yticks(range(len(bars)), bars, fontsize=8)
    panel.set_ylim(len(bars) - 0.4, -0.6)  # the first on top


def _head(figure: Any, title: str, colours: dict[str, str]) -> None:
    figure.suptitle(title, fontsize=12, x=0.01, ha="left", color=INK, fontweight="bold")
    handles = [optional("matplotlib.patches").Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, frameon=False, fontsize=8, labelcolor=INK, loc="upper right", ncols=len(handles))
