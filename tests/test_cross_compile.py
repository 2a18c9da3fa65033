"""The CPU kernels on aarch64: they compile, and in an emulator compute the right numbers.

They know no torch, so a cross compiler will do; the drivers of tests/cpp compare them with the equations
in double, and the vectors (rounding to 16 bits, NaN, partial vectors) with their definitions.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILER = "aarch64-linux-gnu-g++"


def test_the_drivers_are_optimised_as_the_extension() -> None:
    setup = re.findall(r"^OPTIMISE = \[(.*?)\]", (ROOT / "setup.py").read_text(), re.MULTILINE)
    makefile = re.findall(r"^OPTIMISE := (.*)$", (ROOT / "tests" / "cpp" / "Makefile").read_text(), re.MULTILINE)
    assert re.findall(r'"(.*?)"', setup[0]) == makefile[0].split()


def test_on_aarch64(tmp_path: Path) -> None:
    if shutil.which("make") is None or shutil.which(COMPILER) is None:
        pytest.skip(f"make or {COMPILER} is not on the PATH")
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    command = [
        "make",
        "-s",
        f"-j{os.cpu_count()}",
        "-C",
        str(ROOT / "tests" / "cpp"),
        "run" if emulator else "build",
        f"OUT={tmp_path}",
    ]
    command += [f"CXX={COMPILER}", "LDFLAGS=-static", "FLAGS=-Werror -O1", f"RUN={emulator or ''}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    if emulator is None:
        pytest.skip("compiled, not run: qemu-aarch64 is not on the PATH")
    for what in ("vectors of 16 bytes", "baseline", "emulated"):
        assert f"{what}: 0 failures" in done.stdout
