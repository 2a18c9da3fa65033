"""Commands with a time limit, and what became of them as JSON lines in a folder, so that a broken-off run goes on.

A step is a command, or tests that `recorded.py` records. What runs out of time is killed, with all its processes.
Tests are also killed where none of them begins or ends for `SILENCE` seconds: those under way are recorded as hung, and
the others go on in a new process, as they do behind a crash.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import recorded

ROOT = Path(__file__).resolve().parent.parent
SILENCE = 150.0  # seconds; many kernels are compiled in fewer
POLL = 0.1
TAIL = 600  # characters of a failed command's output that are kept with the result
PASSED, FAILED, TIMED_OUT, SKIPPED, UNFINISHED = "passed", "failed", "timed out", "skipped", "unfinished"
DONE = (PASSED, FAILED, TIMED_OUT, SKIPPED)
BAD = (FAILED, TIMED_OUT, UNFINISHED)


@dataclass(frozen=True)
class Step:
    """tests: the command is arguments of pytest. again: runs each time, as it knows by itself what is left to do.
    goes_on: what a command says that failed and wants to be run again. shows: a pattern of the lines that tell why one
    failed, where its last ones do not. skip: the reason not to run it. seconds: its limit."""

    leg: str
    name: str
    command: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    tests: bool = False
    again: bool = False
    goes_on: str = ""
    shows: str = ""
    skip: str = ""
    seconds: float = 540.0


@dataclass(frozen=True)
class Result:
    """unfinished: time ran out, and it goes on the next time."""

    leg: str
    step: str
    code: str  # of the sources that ran
    status: str
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)  # of tests, by outcome
    failures: list[tuple[str, str]] = field(default_factory=list)  # what, message
    note: str = ""


def results(folder: Path) -> list[Result]:
    """The last one of each step, in the order in which they first ran."""
    path, found = folder / "steps.jsonl", {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        values = json.loads(line)
        values["failures"] = [tuple(failure) for failure in values["failures"]]
        result = Result(**values)
        found[result.leg, result.step] = result
    return list(found.values())


def run(steps: Sequence[Step], folder: Path, code: str, seconds: float, say: Callable[[str], None] = print) -> None:
    """All of them, in `seconds` together; those that the folder has of this code are left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    for step in steps:
        known = [r for r in results(folder) if (r.leg, r.step, r.code) == (step.leg, step.name, code)]
        if known and known[0].status in DONE and not step.again:
            say(f"{step.leg} {step.name}: {known[0].status} before")
            continue
        begin = time.monotonic()
        result = _run(step, folder, code, deadline)
        result = Result(**(asdict(result) | {"seconds": round(time.monotonic() - begin, 1)}))
        with (folder / "steps.jsonl").open("a") as file:
            file.write(json.dumps(asdict(result)) + "\n")
        say(f"{step.leg} {step.name}: {result.status}, {result.seconds:.0f} s {describe(result)}".rstrip())


def describe(result: Result) -> str:
    return ", ".join(
        [*(f"{n} {outcome}" for outcome, n in sorted(result.counts.items())), *filter(None, [result.note])]
    )


def _run(step: Step, folder: Path, code: str, deadline: float) -> Result:
    if step.skip:
        return Result(step.leg, step.name, code, SKIPPED, note=step.skip)
    limit = min(deadline, time.monotonic() + step.seconds)
    late = UNFINISHED if limit == deadline or step.tests or step.again else TIMED_OUT
    if time.monotonic() >= deadline:
        return Result(step.leg, step.name, code, UNFINISHED, note="no time was left")
    if step.tests:
        return _run_tests(step, folder, code, limit, late)
    log = folder / f"{step.leg}.log"
    while True:
        returned, text = _watch(step.command, step.environment, log, limit)
        if not (returned and step.goes_on and step.goes_on in text):
            break
    if returned == 0:
        return Result(step.leg, step.name, code, PASSED)
    status, note = (late, "out of time") if returned is None else (FAILED, f"exit {returned}")
    telling = [line for line in text.splitlines() if step.shows and re.search(step.shows, line)]
    message = "\n".join(telling[:10]) or text[-TAIL:]
    return Result(step.leg, step.name, code, status, failures=[(step.name, message)], note=note)


def _run_tests(step: Step, folder: Path, code: str, limit: float, late: str) -> Result:
    """pytest, again and again until it has come to the end of its tests by itself."""
    path, run = folder / "tests.jsonl", f"{step.leg} {step.name} {code}"
    environment = dict(step.environment) | {"RNNATTN_RECORD": str(path), "RNNATTN_RECORD_AS": run}
    environment["PYTHONPATH"] = _path(Path(__file__).parent, ROOT)
    command = [sys.executable, "-m", "pytest", "-p", "recorded", "-p", "no:cacheprovider", "-q", "--tb=short"]
    command += [*step.command, "-o", f"faulthandler_timeout={SILENCE / 2:.0f}"]
    stuck = 0
    while True:
        before = len(recorded.ended(path, run))
        returned, text = _watch(command, environment, folder / f"{step.leg}.log", limit, path)
        if returned in (0, 1, 5):  # 5: no test is left
            status, note = PASSED, ""
            break
        if returned is None and time.monotonic() >= limit:
            status, note = late, "out of time"
            break
        outcome = "hung" if returned is None else "crashed"
        for test in recorded.unfinished(path, run):
            message = f"nothing ended for {SILENCE:.0f} s" if returned is None else f"exit {returned}: {text[-200:]}"
            recorded.write(path, recorded.Line(run, test, outcome, message))
        stuck = stuck + 1 if len(recorded.ended(path, run)) == before else 0
        if stuck == 2:  # it does not get anywhere
            return Result(
                step.leg, step.name, code, FAILED, failures=[(step.name, text[-TAIL:])], note=f"exit {returned}"
            )
    lines = recorded.ended(path, run)
    failures = [(line.test, f"{line.outcome}: {line.message}") for line in lines.values() if _is_failure(line)]
    if status == PASSED and (failures or not lines):
        status, note = FAILED, "" if lines else "no test ran"
    counts = dict(Counter(line.outcome for line in lines.values()))
    return Result(step.leg, step.name, code, status, counts=counts, failures=failures, note=note)


def _is_failure(line: recorded.Line) -> bool:
    return line.outcome in ("failed", "hung", "crashed")


def _watch(
    command: Sequence[str], environment: Mapping[str, str], log: Path, limit: float, grows: Path | None = None
) -> tuple[int | None, str]:
    """The exit status, None where it was killed: at the limit, or as `grows` did not for too long; and its output."""
    start = log.stat().st_size if log.is_file() else 0
    with log.open("a") as output:
        output.write(f"\n--- {' '.join(command)}\n")
        output.flush()
        process = subprocess.Popen(
            list(command), cwd=ROOT, env=os.environ | {"PYTHONPATH": _path(ROOT)} | dict(environment),
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        size, changed, killed = -1, time.monotonic(), False
        try:
            while process.poll() is None:
                time.sleep(POLL)
                now, grown = time.monotonic(), grows.stat().st_size if grows is not None and grows.is_file() else 0
                if grown != size:
                    size, changed = grown, now
                if now >= limit or (grows is not None and now - changed > SILENCE):
                    killed = True
                    break
        finally:
            _kill(process)
    with log.open(errors="replace") as file:
        file.seek(start)
        return None if killed else process.returncode, file.read()


def _path(*folders: Path) -> str:
    """These before what Python's path is told to be anyway."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The process and its workers, which may wait for a GPU that does not answer."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def workers(most: int) -> list[str]:
    """pytest's arguments for several processes, where it can have them."""
    if importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(min(most, os.cpu_count() or 1)), "--dist", "load"]
