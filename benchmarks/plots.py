"""Plots of results: the ratio of every row that counts, and the model's times before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import MODES, SUITES
from benchmarks.extras import optional
from benchmarks.results import ModelRow, Results, Row

COLOURS = {"cpp": "#2a6f97", "triton": "#c8553d", "cuda": "#588157"}
INK, GRID, BEFORE, AFTER = "#333333", "#dddddd", "#b8b8b8", "#2a6f97"


def draw(results: Results, folder: Path) -> list[Path]:
    """<device>-<op>-<dtype>.png for everything that has rows that count, and <device>-digits.png.

    Of a GPU only the gpu suite's cases: the full grid would make a plot of metres.
    """
    folder.mkdir(parents=True, exist_ok=True)
    core = {case.shape for case in SUITES["gpu"]}
    counted: dict[str, list[Row]] = {}
    for row in results.rows:
        if row.counts and row.ratio is not None and (row.case in core or not results.environment.on_gpu):
            counted.setdefault(f"{row.op}-{row.dtype}", []).append(row)
    figures = {name: _ratios(rows) for name, rows in counted.items()}
    if results.model:
        figures["digits"] = _model_times(results.model)
    paths = []
    for name, figure in figures.items():
        figure.supxlabel(machine(results), fontsize=8, x=0.99, ha="right", color=INK)
        paths.append(folder / f"{results.environment.device}-{name}.png")
        figure.savefig(paths[-1], dpi=140, facecolor="white")
    return paths


def machine(results: Results) -> str:
    e = results.environment
    return f"{e.device_name} ({e.isa}), torch {e.torch}, {e.engine}"


def _ratios(rows: Sequence[Row]) -> Any:
    """A panel per baseline and pass, a bar per case and backend from the line at 1, the baseline; a
    thin line spans the quartiles."""
    baselines = {row.baseline: [other for other in rows if other.baseline == row.baseline] for row in rows}
    cases = {baseline: list(dict.fromkeys(row.case for row in found)) for baseline, found in baselines.items()}
    backends = list(dict.fromkeys(row.backend for row in rows))
    modes = [mode for mode in MODES if any(row.mode == mode for row in rows)]
    thickness = 0.76 / len(backends)
    inches = 0.22 + 0.14 * len(backends)  # of one case
    figure, panels = _figure([len(found) for found in cases.values()], len(modes), inches)
    _scale(panels, rows)
    for line, (baseline, found) in zip(panels, baselines.items(), strict=True):
        for panel, mode in zip(line, modes, strict=True):
            for n, backend in enumerate(backends):
                here = {row.case: row for row in found if (row.mode, row.backend) == (mode, backend)}
                offset = (n - (len(backends) - 1) / 2) * thickness
                for k, case in enumerate(cases[baseline]):
                    if case in here:
                        _bar(panel, k + offset, here[case], 0.9 * thickness, COLOURS.get(backend, INK))
            panel.axvline(1, color=INK, linewidth=1)
            _label(panel, f"{mode}, against {baseline}", cases[baseline])
            panel.set_visible(any(row.mode == mode for row in found))
    _head(figure, f"{rows[0].op}, {rows[0].dtype}: times as fast", {name: COLOURS.get(name, INK) for name in backends})
    return figure


def _bar(panel: Any, place: float, row: Row, thickness: float, colour: str) -> None:
    ratio, low, high = (value or 1.0 for value in (row.ratio, row.ratio_low, row.ratio_high))
    panel.barh(place, ratio - 1, thickness, left=1, color=colour)
    panel.plot([low, high], [place, place], color=INK, linewidth=1)
    end, shift, side = (max(ratio, high), 4, "left") if ratio >= 1 else (min(ratio, low), -4, "right")
    panel.annotate(
        f"{ratio:.2f}x", (end, place), (shift, 0), textcoords="offset points", fontsize=8, color=INK, ha=side,
        va="center_baseline",
    )  # fmt: skip


def _scale(panels: Any, rows: Sequence[Row]) -> None:
    """A logarithmic axis: half as fast is as far to the left of 1 as twice as fast to its right."""
    lowest = min(min(row.ratio or 1, row.ratio_low or 1) for row in rows)
    highest = max(max(row.ratio or 1, row.ratio_high or 1) for row in rows)
    room = max(1.5, (highest / lowest) ** 0.2)  # for the labels at the ends of the bars
    left, right = min(1.0, lowest) / room, max(1.0, highest) * room
    ticks = [2.0**power for power in range(-6, 9) if left <= 2.0**power <= right]
    for panel in panels.flat:
        panel.set_xscale("log", base=2)
        panel.set_xlim(left, right)
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])


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
