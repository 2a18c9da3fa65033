"""The roofline plot: rates of the recurrent layers over their arithmetic intensity, under this machine's ceilings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.cases import MODES, SUITES
from benchmarks.ceilings import Ceilings
from benchmarks.extras import optional
from benchmarks.plots import GRID, INK, machine
from benchmarks.results import Results, Row

COLOURS = {"lstm": "#2a6f97", "gru": "#c8553d", "rnn": "#588157"}


def draw(results: Results, folder: Path) -> list[Path]:
    """<device>-roofline.png, where there are rows with an intensity and ceilings to set them under."""
    measured = [run.ceilings for run in results.runs if run.ceilings.products]
    shapes = {case.shape for case in SUITES["cpu"]}
    rows = [
        row
        for row in results.rows
        if row.intensity and row.gflops and row.backend == "cpp" and row.counts and row.case in shapes
    ]
    if not measured or not rows:
        return []
    products = {dtype: rate for ceilings in measured for dtype, rate in ceilings.products.items()}
    figure = _figure(_best(rows), replace(measured[-1], products=products))  # the last run with a dtype tells its rate
    figure.supxlabel(machine(results), fontsize=8, x=0.99, ha="right", color=INK)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{results.environment.device}-roofline.png"
    figure.savefig(path, dpi=140, facecolor="white")
    return [path]


def _best(rows: Sequence[Row]) -> list[Row]:
    """One row per case: against its fastest baseline."""
    best: dict[tuple[str, str, str, str], Row] = {}
    for row in rows:
        if row.cell not in best or (row.ratio or 0) < (best[row.cell].ratio or 0):
            best[row.cell] = row
    return list(best.values())


def _figure(rows: Sequence[Row], ceilings: Ceilings) -> Any:
    """A line of panels per dtype, a panel per pass."""
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    figure = optional("matplotlib.figure").Figure(figsize=(11, 1.2 + 4 * len(dtypes)), layout="constrained")
    panels = figure.subplots(len(dtypes), len(MODES), squeeze=False, sharex=True, sharey=True)
    for line, dtype in zip(panels, dtypes, strict=True):
        for panel, mode in zip(line, MODES, strict=True):
            _ceilings(panel, ceilings, dtype, rows)
            for row in rows:
                if (row.dtype, row.mode) == (dtype, mode):
                    colour = COLOURS[row.op]
                    panel.plot(row.intensity, row.baseline_gflops, "o", mfc="none", mec=colour, ms=5, mew=1.1)
                    panel.plot(row.intensity, row.gflops, "o", color=colour, ms=5)
            panel.set_title(f"{dtype}, {mode}", fontsize=10, loc="left", color=INK)
    for panel in panels[-1]:
        panel.set_xlabel("flop per byte of a step that reads its weights again", fontsize=8, color=INK)
    for panel in panels[:, 0]:
        panel.set_ylabel("GFLOP/s", fontsize=8, color=INK)
    _head(figure)
    return figure


def _ceilings(panel: Any, ceilings: Ceilings, dtype: str, rows: Sequence[Row]) -> None:
    """The axes, wide enough for all rows, and this machine's limits as lines."""
    intensities = [row.intensity or 1 for row in rows]
    rates = [rate for row in rows for rate in (row.gflops, row.baseline_gflops) if rate]
    low, high = min(intensities) / 1.6, max(intensities) * 1.6
    rate = ceilings.rate(dtype) or 1
    top = 2.0 * max(*ceilings.products.values(), *rates)
    panel.set(xscale="log", yscale="log", xlim=(low, high), ylim=(min(rates) / 1.6, top))
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter("{x:g}")
    panel.axhline(rate, color=INK, linewidth=1, label=f"products {rate:.0f} GFLOP/s")
    for label, bandwidth, style in (("L2", ceilings.l2, "--"), ("memory", ceilings.memory, ":")):
        if bandwidth is not None:
            knee = min(high, rate / bandwidth)
            line = panel.plot([low, knee], [low * bandwidth, knee * bandwidth], style, color=INK, linewidth=1)
            line[0].set_label(f"{label} {bandwidth:.0f} GB/s")
    panel.legend(frameon=False, fontsize=8, labelcolor=INK, loc="best")
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(GRID)
    panel.tick_params(which="both", length=0, labelsize=8, colors=INK)
    panel.grid(color=GRID, linewidth=0.6)
    panel.set_axisbelow(True)


def _head(figure: Any) -> None:
    lines = optional("matplotlib.lines")
    figure.suptitle("Roofline of the recurrent layers", fontsize=12, x=0.01, ha="left", color=INK, fontweight="bold")
    marks = [(name, colour, colour) for name, colour in COLOURS.items()]
    marks += [("ours", INK, INK), ("best peer", INK, "none")]
    handles = [
        lines.Line2D([], [], marker="o", linestyle="", markersize=5, color=edge, markerfacecolor=face, label=name)
        for name, edge, face in marks
    ]
    figure.legend(handles=handles, frameon=False, fontsize=8, labelcolor=INK, loc="upper right", ncols=len(handles))
