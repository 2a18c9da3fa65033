"""What a folder of `gpu.py` holds, in one page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from steps import PASSED, SKIPPED, Result, describe, results

FAILURES = 5  # of a step
COLUMNS = ("leg", "step", "status", "seconds", "sources", "what")


def report(folder: Path) -> str:
    found = results(folder)
    rows = [(r.leg, r.step, r.status, f"{r.seconds:.0f}", r.code, describe(r)) for r in found]
    parts = ["\n".join(_table([COLUMNS, *rows])), *_failures(found), *_verdicts(folder / "bench")]
    return "\n\n".join(parts)


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()


def _failures(found: Sequence[Result]) -> Iterator[str]:
    for result in found:
        if result.status not in (PASSED, SKIPPED) and result.failures:
            shown = [f"  {what}\n{_indented(message)}" for what, message in result.failures[:FAILURES]]
            more = len(result.failures) - len(shown)
            title = f"{result.leg} {result.step}: {len(result.failures)} failed"
            yield "\n".join([title, *shown, *([f"  and {more} more, in tests.jsonl"] if more else [])])


def _indented(message: str) -> str:
    return "\n".join(f"      {line}" for line in message.strip().splitlines()[:12])


def _verdicts(folder: Path) -> Iterator[str]:
    if not folder.is_dir():
        return
    from benchmarks import targets
    from benchmarks.results import read_folder

    for measured in read_folder(folder):
        failed = [row for row in measured.rows if row.failed]
        yield f"{measured.environment.device}: {len(measured.rows)} rows measured, {len(failed)} failed"
        if failed:
            yield "\n".join(f"  {row.case} {row.dtype} {row.mode} {row.backend}: {row.note}" for row in failed[:20])
        if verdicts := targets.verdicts(measured):
            yield "\n".join(_table([targets.HEADER, *map(targets.cells, verdicts)]))
