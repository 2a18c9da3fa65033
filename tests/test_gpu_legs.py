"""`python tests/gpu.py` without a GPU: its dry run, and time limits, hangs and crashes of made-up commands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gpu
import pytest
import recorded
import steps
from gpu_report import report
from steps import FAILED, PASSED, SKIPPED, TIMED_OUT, UNFINISHED, Result, Step

TESTS = """
import os, sys, time, types
import pytest

def test_well(): pass
def test_badly(): assert 1 == 2, "no such luck"
@pytest.mark.skip(reason="not here")
def test_elsewhere(): pass
@pytest.mark.xfail(reason="known")
def test_known(): assert False
"""
HANG = "def test_hangs(): time.sleep(60)\n"
LOSES_THE_GPU = """
@pytest.mark.parametrize("n", range(4))
def test_loses_the_gpu(n):
    def synchronize(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
    cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)
    sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)
    synchronize()
"""
CRASH = "def test_crashes(): os._exit(9)\n"
LAST = "def test_last(): assert 'torch' not in sys.modules\n"


def python(code: str, **settings: Any) -> Step:
    return Step("leg", settings.pop("name", "step"), [sys.executable, "-c", code], **settings)


def ran(steps_: list[Step], folder: Path, seconds: float = 60, code: str = "code") -> dict[str, Result]:
    steps.run(steps_, folder, code, seconds, say=lambda text: None)
    return {result.step: result for result in steps.results(folder)}


def counts(log: Path) -> int:
    return log.read_text().count("\n--- ") if log.is_file() else 0


def test_a_command_that_fails_says_why_and_the_next_one_runs(tmp_path: Path) -> None:
    found = ran(
        [
            python("print('one\\nerror: two\\nthree'); raise SystemExit(4)", name="bad", shows="^error"),
            python("raise SystemExit('no luck')", name="tail"),
            python("pass", name="good"),
            Step("leg", "left out", skip="a reason"),
        ],
        tmp_path,
    )
    assert [found[name].status for name in ("bad", "tail", "good", "left out")] == [FAILED, FAILED, PASSED, SKIPPED]
    assert found["bad"].failures == [("bad", "error: two")] and found["bad"].note == "exit 4"
    assert found["tail"].failures[0][1].strip().endswith("no luck") and found["left out"].note == "a reason"
    page = report(tmp_path)
    assert "leg bad: 1 failed" in page and "error: two" in page and "a reason" in page


def test_time_limits_of_steps_and_legs(tmp_path: Path) -> None:
    sleep = "import time; time.sleep(60)"
    found = ran([python(sleep, name="slow", seconds=0.5), python(sleep, name="late"), python("", name="none")],
                tmp_path, seconds=1.5)  # fmt: skip
    assert {name: result.status for name, result in found.items()} == {
        "slow": TIMED_OUT, "late": UNFINISHED, "none": UNFINISHED,
    }  # fmt: skip
    assert sum(result.seconds for result in found.values()) < 5


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    log, todo = tmp_path / "leg.log", [python("1 / 0", name="bad"), python("", name="again", again=True)]
    ran(todo, tmp_path)
    assert counts(log) == 2
    ran(todo, tmp_path)
    assert counts(log) == 3
    ran(todo, tmp_path, code="other")  # sources
    assert counts(log) == 5


def test_a_command_that_asks_for_it_goes_on(tmp_path: Path) -> None:
    code = f"import pathlib; p = pathlib.Path({str(tmp_path / 'n')!r}); n = len(p.read_text()) if p.exists() else 0\n"
    code += "p.write_text('x' * (n + 1)); raise SystemExit('once more' if n < 2 else 0)"
    assert ran([python(code, goes_on="once more")], tmp_path)["step"].status == PASSED
    assert counts(tmp_path / "leg.log") == 3


@pytest.mark.parametrize("processes", [1, 2])
def test_tests_go_on_behind_hangs_and_crashes(processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test is told of, and once."""
    side_by_side = steps.workers(processes) if processes > 1 else []
    if processes > 1 and not side_by_side:
        pytest.skip("pytest-xdist is not installed")
    monkeypatch.setattr(steps, "SILENCE", 6.0)
    monkeypatch.setattr(steps.os, "cpu_count", lambda: 2)
    file = tmp_path / "test_made_up.py"
    file.write_text(TESTS + LOSES_THE_GPU + CRASH + LAST + HANG)
    arguments = [str(file), "--rootdir", str(tmp_path), "--noconftest", *side_by_side]
    todo = [Step("tests", "made up", arguments, tests=True)]
    result = ran(todo, tmp_path)["made up"]
    assert result.status == FAILED
    failures = {name.rpartition(":")[2]: message for name, message in result.failures}
    lost = {f"test_loses_the_gpu[{n}]" for n in range(4)}
    assert set(failures) == {"test_badly", "test_hangs", "test_crashes"} | lost
    assert "no such luck" in failures["test_badly"] and all("illegal memory" in failures[name] for name in lost)
    assert failures["test_hangs"].startswith("hung") and "crashed" in failures["test_crashes"]
    assert result.counts["passed"] == 2 and result.counts["hung"] == 1 and sum(result.counts.values()) == 11
    assert "and 2 more, in tests.jsonl" in report(tmp_path)
    assert counts(tmp_path / "tests.log") < 7 or processes == 1  # workers are replaced


def test_tests_that_have_run_do_not_run_again(tmp_path: Path) -> None:
    """After a run that was broken off in the middle."""
    file = tmp_path / "test_made_up.py"
    file.write_text(TESTS.replace("1 == 2", "True") + LAST)
    todo = [Step("tests", "made up", [str(file), "--rootdir", str(tmp_path), "--noconftest"], tests=True)]
    lines, run = tmp_path / "tests.jsonl", "tests made up code"
    for outcome in (recorded.STARTED, "passed"):
        recorded.write(lines, recorded.Line(run, "test_made_up.py::test_badly", outcome, seconds=7.0))
    lines.write_text(lines.read_text() + '{"run": "tests ma')  # cut off
    lines.write_text(lines.read_text() + "\n")
    assert ran(todo, tmp_path)["made up"].status == PASSED
    ended = recorded.ended(lines, run)
    assert len(ended) == 5 and ended["test_made_up.py::test_badly"].seconds == 7.0
    assert "1 deselected" in (tmp_path / "tests.log").read_text()


def test_a_file_without_tests_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "test_nothing.py").write_text("import nothing_of_the_kind\n")
    step = Step("tests", "none", [str(tmp_path / "test_nothing.py"), "--noconftest"], tests=True)
    assert ran([step], tmp_path)["none"].status == FAILED


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    legs = ["build", "tests", "sanitize", "compile", "report"]
    arguments = [*legs, "--dry-run", "--out", str(tmp_path)]
    assert gpu.main(arguments) == 0
    page = (tmp_path / "report.txt").read_text()
    assert all(leg in page for leg in legs[:-1]) and "a dry run" in page
    assert {r.step: r.status for r in steps.results(tmp_path) if r.leg in ("tests", "compile")} == {
        "recurrent": PASSED, "kernels": PASSED,
    }  # fmt: skip
    capsys.readouterr()
    assert gpu.main(arguments) == 0 and "tests recurrent: passed before" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu.main(["tests", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        gpu.main(["test", "--out", str(tmp_path)])


def test_every_step_of_a_gpu_names_files_that_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import argparse

    options = argparse.Namespace(out=tmp_path, commit="abc")
    for leg in gpu.LEGS.values():
        for step in leg(False, options):
            files = [Path(a) for a in step.command if a.startswith("tests/")]
            assert all((steps.ROOT / file).is_file() for file in files), step
            assert step.seconds <= 540 and step.leg in gpu.LEGS
