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

for H in (1, 8, 37):  # below, at and above the vectors' widths
    x, h, c = torch.randn(5, 3, 4), torch.randn(2, 3, H), torch.randn(2, 3, H)
    shapes = 2 * [(4 * H, 4), (4 * H, H), (4 * H,), (4 * H,)]
    weights = [torch.randn(s) * 0.3 for s in shapes]
    fixed = torch.tensor([5, 0, 3]), True, "bidirectional"
    wide = [t.to(double) for t in (x, h, c)], [w.to(double) for w in weights]
    got = cpp.lstm_layer_forward(x, h, c, weights, *fixed, True)
    truth = reference.lstm_layer_forward(*wide[0], wide[1], *fixed)
    check(got, truth)
    dy, dh, dc = (torch.randn_like(t) for t in got[:3])
    got = cpp.lstm_layer_backward(dy, dh, dc, x, h, c, weights, fixed[0], *got[:1], *got[3:], *fixed[1:], True, True)
    cotangents = [t.to(double) for t in (dy, dh, dc)]
    truth = reference.lstm_layer_backward(
        *cotangents, *wide[0], wide[1], fixed[0], truth[0], *truth[3:], *fixed[1:])
    check([*got[:3], *got[3]], [*truth[:3], *truth[3]])
for D, A in ((1, 0), (16, 0), (67, 0), (5, 3), (64, 33)):
    x, v = torch.randn(3, 40, D), torch.randn(A or D)
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


def test_an_unknown_one_is_refused() -> None:
    done = run("mmx")
    assert done.returncode != 0
    assert "RNNATTN_CPU_ISA: expected one of" in done.stderr and "got mmx" in done.stderr
