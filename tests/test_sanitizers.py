"""The scans under the thread sanitizer: no two threads of a group or of several meet in memory unsynchronised.

Torch's OpenMP runtime is not instrumented, so the driver of tests/cpp runs the kernels and the barrier on
std::thread, in every mode and split. `make asan` runs the cases of the extension itself under the other two.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

DRIVERS = Path(__file__).parent / "cpp"
FLAGS = "-O1 -g -fsanitize=thread"

ONE_RACE = """
#include <thread>
int shared;
int main() {
  std::thread other([] { ++shared; });
  ++shared;
  other.join();
}
"""


def test_the_scans_have_no_race(tmp_path: Path) -> None:
    if shutil.which("make") is None or shutil.which("g++") is None:
        pytest.skip("make or g++ is not on the PATH")
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    (tmp_path / "race.cpp").write_text(ONE_RACE)
    compiled = subprocess.run(["g++", *FLAGS.split(), "race.cpp", "-o", "race"], cwd=tmp_path, capture_output=True)
    if compiled.returncode:
        pytest.skip("g++ has no thread sanitizer here")
    seen = subprocess.run(["./race"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    if "data race" not in seen.stderr:
        pytest.skip("the thread sanitizer does not run on this system")
    command = [
        "make",
        "-s",
        f"-j{os.cpu_count()}",
        "-C",
        str(DRIVERS),
        "run",
        f"OUT={tmp_path}",
        "CXX=g++",
        f"FLAGS={FLAGS}",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    assert "baseline: 0 failures" in done.stdout and "emulated: 0 failures" in done.stdout
