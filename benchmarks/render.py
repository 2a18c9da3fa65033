"""The README's benchmark section, made from committed result files."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks import plots, roofline, targets
from benchmarks.ceilings import AT_CEILING
from benchmarks.results import ANOTHER_FORM, Results, means, read_folder

START, END = "<!-- benchmarks:start -->", "<!-- benchmarks:end -->"


def render(folder: Path, readme: Path) -> list[Path]:
    """Rewrites the plots in the folder and what stands between the README's markers.

    Raises:
        ValueError: the README lacks the markers, or there is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder of result files")
    text = readme.read_text()
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"{readme}: expected one line {START} and after it one line {END}")
    found = read_folder(folder)
    drawn = [[*plots.draw(results, folder), *roofline.draw(results, folder)] for results in found]
    before, after = text.split(START)[0], text.split(END)[1]
    links = [[Path(os.path.relpath(path, readme.parent)).as_posix() for path in paths] for paths in drawn]
    readme.write_text(f"{before}{START}\n{section(found, links)}{END}{after}")
    return [path for paths in drawn for path in paths]


def section(found: Sequence[Results], links: Sequence[Sequence[str]]) -> str:
    """Markdown, with a part for each device."""
    parts = [_device(results, plot_links) for results, plot_links in zip(found, links, strict=True)]
    for kind, measured in (("GPU", _on_gpu(found)), ("CPU", len(found) - _on_gpu(found))):
        if not measured:
            parts.append(f"On a {kind}: not yet measured.\n")
    return "\n".join(parts)


def _on_gpu(found: Sequence[Results]) -> int:
    return sum(results.environment.on_gpu for results in found)


def _device(results: Results, links: Sequence[str]) -> str:
    e = results.environment
    commits = ", ".join(dict.fromkeys(run.environment.commit for run in results.runs))
    lines = [f"**{e.device_name}** ({e.isa}; torch {e.torch}, {e.engine}; commit {commits}, {e.date[:10]})", ""]
    if results.model:
        lines += _table(
            (
                "digits",
                "ran",
                "logits differ",
                "correct",
                "on torch.nn",
                "training step",
                "before",
                "prediction",
                "before",
            ),
            [
                (
                    row.requested,
                    row.backend,
                    f"{row.logit_difference:.1e}",
                    f"{row.correct} of {row.images}",
                    f"{row.baseline_correct} of {row.images}",
                    *(
                        f"{ms:.2f} ms"
                        for ms in (row.train_ms, row.baseline_train_ms, row.predict_ms, row.baseline_predict_ms)
                    ),
                )
                for row in results.model
            ],
        )
    if rows := means(results.rows):
        lines += _table(
            ("operation", "dtype", "pass", "backend", "against", "cases", "times as fast", "range"),
            [
                (m.op, m.dtype, m.mode, m.backend, m.baseline, f"{m.cases}", f"{m.ratio:.2f}",
                 f"{m.lowest:.2f}-{m.highest:.2f}")
                for m in rows
            ],
        )  # fmt: skip
    if verdicts := targets.verdicts(results):
        lines += [f"{targets.title(results)}:", ""]
        lines += _table(targets.HEADER, [targets.cells(verdict) for verdict in verdicts])
        lines += _limits(results)
    left_out = sum(not row.counts for row in results.rows)
    if left_out:
        lines += [f"{left_out} of {len(results.rows)} rows are left out of these means: {_reasons(results)}.", ""]
    lines += [f"![{Path(link).stem}]({link})" for link in links]
    return "\n".join(lines).rstrip() + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)] + [""]


def _limits(results: Results) -> list[str]:
    """What the limits of the latest run that measured them are."""
    ceilings = [run.ceilings for run in results.runs if run.ceilings.products][-1:]
    if not ceilings:
        return []
    rates = ", ".join(f"{rate:.0f} GFLOP/s in {dtype}" for dtype, rate in ceilings[0].products.items())
    limit = f"{AT_CEILING:.0%} of the rate of a large product (`torch.mm`: {rates})"
    return [f"At limit: cases in which our kernels come to {limit}; these count as reached.", ""]


def _reasons(results: Results) -> str:
    """Why rows do not count, and how many, whatever their figures and the baseline's name."""
    reasons: Counter[str] = Counter()
    for row in results.rows:
        if not row.counts:
            reason = re.sub(r" \((error|about) .*", "", re.sub(r": a call takes .*", " as too slow", row.note))
            reasons[f"the baseline {ANOTHER_FORM}" if row.note.endswith(ANOTHER_FORM) else reason] += 1
    return "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common())
