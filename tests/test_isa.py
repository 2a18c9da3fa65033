"""Every instruction set that was compiled and that this machine has computes the same numbers."""

from __future__ import annotations

import os
import subprocess
import sys

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
