"""Every instruction set that was compiled and that this machine has computes the same numbers."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rnnattn import backends

reason = backends.unavailable("cpp")
ISAS = [] if reason else [str(isa) for isa in backends.build_info()["isas"]]  # type: ignore[attr-defined]
pytestmark = pytest.mark.skipif(bool(reason), reason=f"backend cpp: {reason}")

CODE = """
import sys, torch
from rnnattn import backends, reference
assert backends.build_info()["isa"] == sys.argv[1], backends.build_info()
torch.manual_seed(0)
cpp, double = backends.get("cpp"), torch.float64

def check(got, truth):
    for a, b in zip(got, truth, strict=True):
        assert (a.double() - b).norm() <= 2e-6 * b.norm(), (a.double() - b).norm() / b.norm()

for D, A in ((1, 0), (16, 0), (67, 0), (5, 3), (64, 33)):
    x, v = torch.randn(3, 40, D), torch.randn(A or D) * (A or D) ** -0.5  # scores near 1: exp keeps the digits
    w, b = (torch.randn(A, D) * D**-0.5, torch.randn(A)) if A else (None, None)
    arguments = (x, v, w, b, torch.tensor([40, 0, 17]), None)
    wide = [t.to(double) if t is not None and t.is_floating_point() else t for t in arguments]
    got = cpp.attention_pool_forward(*arguments, True)
    truth = reference.attention_pool_forward(*wide)
    check(got[:2], truth[:2])
    g, dp = torch.randn(3, D), torch.randn(3, 40)
    got = cpp.attention_pool_backward(g, dp, *arguments, got[0], got[2])
    truth = reference.attention_pool_backward(g.to(double), dp.to(double), *wide, truth[0], truth[2])
    check(got[:1], truth[:1])
print("same numbers")
"""


RECURRENT = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "cpp", "tests/test_recurrent.py"]


def run(isa: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"RNNATTN_CPU_ISA": isa}
    return subprocess.run([sys.executable, "-c", CODE, isa], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("isa", ISAS)
def test_same_numbers(isa: str) -> None:
    done = run(isa)
    if "expected one of" in done.stderr:
        pytest.skip(f"this machine has no {isa}")
    assert done.returncode == 0, done.stderr
    assert "same numbers" in done.stdout


# The best one is what test_recurrent.py itself runs on.
@pytest.mark.parametrize("isa", ISAS[1:])
def test_every_recurrent_case(isa: str, pytestconfig: pytest.Config) -> None:
    environment = os.environ | {"RNNATTN_CPU_ISA": isa}
    done = subprocess.run(
        [sys.executable, *RECURRENT], env=environment, cwd=pytestconfig.rootpath, capture_output=True, text=True
    )
    if "expected one of" in done.stdout:
        pytest.skip(f"this machine has no {isa}")
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


def test_an_unknown_one_is_refused() -> None:
    done = run("mmx")
    assert done.returncode != 0
    assert "RNNATTN_CPU_ISA: expected one of" in done.stderr and "got mmx" in done.stderr


# --- the objects of several instruction sets in one module ----------------------------------------

ROOT = Path(__file__).resolve().parent.parent


def flags(isa: str) -> list[str]:
    """What setup.py gives the compiler for it."""
    found = re.findall(rf'INSTRUCTION_SETS\["{isa}"\] = (\[.*?\])', (ROOT / "setup.py").read_text())
    return ast.literal_eval(found[0]) if found else []


def test_the_kernels_give_the_linker_nothing_but_their_table(tmp_path: Path) -> None:
    """Of an inline function that several objects have, the linker keeps any: perhaps the one for AVX-512.

    With little inlining, so that a function which is a weak symbol stays one.
    """
    if shutil.which("g++") is None or shutil.which("nm") is None:
        pytest.skip("g++ or nm is not on the PATH")
    command = ["g++", "-std=c++20", "-O1", "-fPIC", *flags(ISAS[0]), f"-DRNNATTN_ISA={ISAS[0]}"]
    subprocess.run(
        [*command, "-c", str(ROOT / "csrc" / "cpu" / "kernels.cpp"), "-o", "kernels.o"], cwd=tmp_path, check=True
    )
    listed = subprocess.run(["nm", "-gC", "--defined-only", "kernels.o"], cwd=tmp_path, capture_output=True, text=True)
    assert [line.split(maxsplit=2)[2] for line in listed.stdout.splitlines()] == [f"rnnattn::kernels_{ISAS[0]}"]


@pytest.mark.parametrize("isa", ISAS)
def test_vectors(isa: str, tmp_path: Path) -> None:
    """Rounding to 16 bits, partial vectors and the elementary functions, by tests/cpp/vec_driver."""
    if shutil.which("g++") is None or shutil.which("make") is None:
        pytest.skip("g++ or make is not on the PATH")
    if "expected one of" in run(isa).stderr:
        pytest.skip(f"this machine has no {isa}")
    command = [
        "make",
        "-s",
        "-C",
        str(ROOT / "tests" / "cpp"),
        "run",
        f"OUT={tmp_path}",
        "DRIVERS=vec_driver",
        "CXX=g++",
    ]
    done = subprocess.run([*command, f"FLAGS={' '.join(flags(isa))}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    size = {"avx512": 64, "avx2": 32, "baseline": 16}[isa]
    assert f"vectors of {size} bytes: 0 failures" in done.stdout
