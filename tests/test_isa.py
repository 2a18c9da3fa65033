"""Every instruction set that was compiled and that this machine has computes the same numbers.

Products of bfloat16 by AVX512_BF16 and AMX run on machines that have them; elsewhere their code runs on twins of the
instructions in plain C++ (RNNATTN_CPU_ISA=emulated, in a build with RNNATTN_EMULATE=1 as `make` does it), and the
real objects are looked at.
"""

from __future__ import annotations

import ast
import functools
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
IN_USE = "" if reason else str(backends.build_info()["isa"])
OTHERS = sorted({*ISAS, "emulated"} - {IN_USE})
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


RECURRENT = [
    "-m",
    "pytest",
    "-q",
    "-x",
    "-p",
    "no:cacheprovider",
    "tests/test_recurrent.py",
    "tests/test_regularised_scan.py",
]
# What each runs of the cases: the sizes of its vectors with some types, all types among them; bfloat16 its own scans.
TYPES = {"baseline": "fp32 or fp64", "avx2": "bf16 or fp16", "emulated": "bf16", "avx512": "fp32"}


def run(isa: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"RNNATTN_CPU_ISA": isa}
    return subprocess.run([sys.executable, "-c", CODE, isa], env=environment, capture_output=True, text=True)


@functools.cache
def usable() -> list[str]:
    """The instruction sets of this machine, as a process tells that asks for one that there is not."""
    done = run("mmx")
    assert done.returncode != 0
    told = re.search(r"RNNATTN_CPU_ISA: expected one of (.*) on this machine, got mmx", done.stderr)
    assert told, done.stderr
    return told[1].split(", ")


def test_an_unknown_one_is_refused() -> None:
    assert IN_USE in usable() and "baseline" in usable()


@pytest.mark.parametrize("isa", ISAS)
def test_same_numbers(isa: str) -> None:
    if isa not in usable():
        pytest.skip(f"this machine has no {isa}")
    done = run(isa)
    assert done.returncode == 0, done.stderr
    assert "same numbers" in done.stdout


# The one in use is what test_recurrent.py itself runs on. "emulated" is named cpp: where that is required, it is too.
@pytest.mark.parametrize("isa", [pytest.param(isa, id="cpp-emulated" if isa == "emulated" else isa) for isa in OTHERS])
def test_every_recurrent_case(isa: str, pytestconfig: pytest.Config) -> None:
    if isa not in ISAS:
        pytest.skip("built without RNNATTN_EMULATE=1")
    if isa not in usable():
        pytest.skip(f"this machine has no {isa}")
    environment = os.environ | {"RNNATTN_CPU_ISA": isa}
    done = subprocess.run(
        [sys.executable, *RECURRENT, "-k", f"cpp and ({TYPES.get(isa, 'bf16')})"], env=environment,
        cwd=pytestconfig.rootpath, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


# --- the objects of several instruction sets in one module ----------------------------------------

ROOT = Path(__file__).resolve().parent.parent
FOR_BFLOAT16 = ("amx", "avx512_bf16", "emulated")  # objects of scans alone


def flags(isa: str) -> list[str]:
    """What setup.py gives the compiler for it."""
    found = re.findall(rf'_SETS\["{isa}"\] = (\[.*?\])', (ROOT / "setup.py").read_text())
    return ast.literal_eval(found[0]) if found else []


def test_the_kernels_give_the_linker_nothing_but_their_table(tmp_path: Path) -> None:
    """Of an inline function that several objects have, the linker keeps any: perhaps the one for AVX-512.

    With little inlining, so that a function which is a weak symbol stays one.
    """
    if shutil.which("g++") is None or shutil.which("nm") is None:
        pytest.skip("g++ or nm is not on the PATH")
    best = [isa for isa in ISAS if isa not in FOR_BFLOAT16][:1] + [isa for isa in ISAS if isa in FOR_BFLOAT16][:1]
    for isa in best:
        source, table = ("bfloat16_kernels", "bfloat16_scans") if isa in FOR_BFLOAT16 else ("kernels", "kernels")
        command = ["g++", "-std=c++20", "-O1", "-fPIC", *flags(isa), f"-DRNNATTN_ISA={isa}", "-o", "kernels.o"]
        subprocess.run([*command, "-c", str(ROOT / "csrc" / "cpu" / f"{source}.cpp")], cwd=tmp_path, check=True)
        nm = ["nm", "-gC", "--defined-only", "kernels.o"]
        listed = subprocess.run(nm, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.splitlines()
        assert [line.split(maxsplit=2)[2] for line in listed] == [f"rnnattn::{table}_{isa}"]


@pytest.mark.parametrize("isa", FOR_BFLOAT16[:2])
def test_the_kernels_for_bfloat16_compile_without_warnings(isa: str) -> None:
    if isa not in ISAS:
        pytest.skip(f"built without {isa}")
    command = ["g++", "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Wno-unused-function", "-Werror", *flags(isa)]
    source = ROOT / "csrc" / "cpu" / "bfloat16_kernels.cpp"
    done = subprocess.run([*command, f"-DRNNATTN_ISA={isa}", str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def straight_loops(listing: list[str]) -> list[list[str]]:
    """Instructions from the target of a jump back to the jump, where no other jump is between."""
    loops, lines = [], [line.split(":", 1) for line in listing if re.match(r"\s*[0-9a-f]+:\t", line)]
    place = {address.strip(): n for n, (address, _) in enumerate(lines)}
    last_jump = -1
    for n, (_, instruction) in enumerate(lines):
        if jump := re.match(r"\tj\w+ +([0-9a-f]+)", instruction):
            if last_jump < place.get(jump[1], n + 1) <= n:
                loops.append([instruction for _, instruction in lines[place[jump[1]] : n + 1]])
            last_jump = n
    return loops


@pytest.mark.parametrize("isa", FOR_BFLOAT16[:2])
def test_products_of_bfloat16_stay_in_registers(isa: str) -> None:
    """The objects of the last build have the instructions, in loops that move no vector to or from the stack."""
    if isa not in ISAS or shutil.which("objdump") is None:
        pytest.skip(f"built without {isa}, or objdump is not on the PATH")
    objects = sorted((ROOT / "build").glob(f"*/kernels_{isa}.o"), key=lambda path: path.stat().st_mtime)
    if not objects:
        pytest.skip("the objects of the build are not here")
    command = ["objdump", "-d", "--no-show-raw-insn", str(objects[-1])]
    functions = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n\n")
    loops = [loop for listing in functions for loop in straight_loops(listing.splitlines())]
    for instruction in ("vdpbf16ps", *(["tdpbf16ps"] if isa == "amx" else [])):
        products = [loop for loop in loops if any(f"\t{instruction} " in line for line in loop)]
        assert max(sum(f"\t{instruction} " in line for line in loop) for loop in products) >= 4
        spilled = [
            line for loop in products for line in loop if re.search(r"[xyz]mm\d+.*\(%r[sb]p|\(%r[sb]p.*[xyz]mm", line)
        ]
        assert not spilled


VECTOR_BYTES = {"avx512": 64, "avx2": 32, "baseline": 16}


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa in VECTOR_BYTES])
def test_vectors(isa: str, tmp_path: Path) -> None:
    """Rounding to 16 bits, partial vectors, the elementary functions, and products of bfloat16 by twins of the
    instructions, by drivers of tests/cpp."""
    if shutil.which("g++") is None or shutil.which("make") is None:
        pytest.skip("g++ or make is not on the PATH")
    if isa not in usable():
        pytest.skip(f"this machine has no {isa}")
    command = [
        "make",
        "-s",
        "-C",
        str(ROOT / "tests" / "cpp"),
        "run",
        f"OUT={tmp_path}",
        "DRIVERS=vec_driver bfloat16_driver",
        "CXX=g++",
    ]
    done = subprocess.run([*command, f"FLAGS={' '.join(flags(isa))}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"vectors of {VECTOR_BYTES[isa]} bytes: 0 failures") == 2
