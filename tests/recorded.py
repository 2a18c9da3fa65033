"""A pytest plugin that writes a JSON line for every test as it begins and as it ends, so that a process that hangs
takes nothing with it, and that leaves out tests whose end is there already.

    RNNATTN_RECORD=tests.jsonl RNNATTN_RECORD_AS=name PYTHONPATH=tests python -m pytest -p recorded ...

The name tells runs in one file apart, such as those of other code. With xdist the first process writes. Where a kernel
has broken the CUDA context, on which every further test of the process would fail, the process ends.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

STARTED, LONGEST_MESSAGE = "started", 600
LOST = 70  # exit code of a process without a usable GPU


@dataclass(frozen=True)
class Line:
    run: str
    test: str
    outcome: str  # STARTED, passed, failed, skipped, xfailed; of whoever watches the process: hung, crashed
    message: str = ""
    seconds: float = 0.0


def write(path: Path, line: Line) -> None:
    with path.open("a") as file:
        file.write(json.dumps(asdict(line)) + "\n")


def read(path: Path, run: str, size: int | None = None) -> Iterator[Line]:
    """The lines of a run in the first `size` bytes; the last one may have been cut off."""
    for text in path.read_bytes()[:size].decode(errors="replace").splitlines() if path.is_file() else ():
        try:
            line = Line(**json.loads(text))
        except ValueError:
            continue
        if line.run == run:
            yield line


def ended(path: Path, run: str, size: int | None = None) -> dict[str, Line]:
    """By test. The first line counts: a test whose worker ends by itself is reported once more, as a crash."""
    found: dict[str, Line] = {}
    for line in read(path, run, size):
        if line.outcome != STARTED:
            found.setdefault(line.test, line)
    return found


def unfinished(path: Path, run: str) -> list[str]:
    """The tests that began and did not end."""
    done = ended(path, run)
    return list(dict.fromkeys(line.test for line in read(path, run) if line.test not in done))


def pytest_configure(config: pytest.Config) -> None:
    path, run = os.environ.get("RNNATTN_RECORD"), os.environ.get("RNNATTN_RECORD_AS", "")
    if path:
        size = Path(path).stat().st_size if Path(path).is_file() else 0
        # All workers leave out the same tests, those that begin later in the place of others too.
        size = int(os.environ.setdefault("RNNATTN_RECORD_SIZE", str(size)))
        config.pluginmanager.register(_Recorder(Path(path), run, size, not hasattr(config, "workerinput")))


class _Recorder:
    def __init__(self, path: Path, run: str, size: int, writes: bool) -> None:
        self.path, self.run, self.size, self.writes, self.failed = path, run, size, writes, False
        self.open: dict[str, Line] = {}  # of a test so far

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        done = ended(self.path, self.run, self.size)
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
        items[:] = [item for item in items if item.nodeid not in done]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.failed = False
        if self.writes:
            write(self.path, Line(self.run, nodeid, STARTED))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed |= report.failed
        if not self.writes:
            return
        before = self.open.pop(report.nodeid, Line(self.run, report.nodeid, "passed"))
        seconds = round(before.seconds + report.duration, 3)
        if before.outcome == "passed":
            outcome = "xfailed" if report.skipped and hasattr(report, "wasxfail") else report.outcome
            line = Line(self.run, report.nodeid, outcome, "" if report.passed else _message(report), seconds)
        else:
            line = Line(self.run, report.nodeid, before.outcome, before.message, seconds)
        if report.when in ("setup", "call"):
            self.open[report.nodeid] = line
        else:  # its end, or the end of the worker that ran it
            write(self.path, line)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        result = yield
        if self.failed and _gpu_is_lost():
            sys.stdout.flush()
            os._exit(LOST)
        return result


def _message(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[-1])  # of a skip
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longrepr)[:LONGEST_MESSAGE]


def _gpu_is_lost() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
