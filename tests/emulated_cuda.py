"""Backend "cuda" on a CPU: its sources compiled with the emulation of `tests/cuda_emulation`, once a session."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from rnnattn import backends
from rnnattn.backends.base import Call
from rnnattn.backends.cuda import Cuda

TESTS = Path(__file__).resolve().parent
SOURCES = TESTS.parent / "csrc" / "cuda"
TORCH = Path(torch.__file__).parent


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The sources as CPU operators."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not on the PATH")
    build = tmp_path_factory.mktemp("cuda_emulation")
    for header in ("cuda_bf16.h", "cuda_fp16.h", "mma.h"):
        (build / header).write_text('#include "emulation.h"\n')
    emulation = TESTS / "cuda_emulation"
    command = [compiler, "-std=c++20", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
    command += ["-Wno-unknown-pragmas", "-Wno-clobbered"]  # unroll; getcontext() could return twice, and does not
    command += [f"-I{build}", f"-I{emulation}", f"-I{SOURCES}", "-isystem", str(TORCH / "include")]
    library = build / "emulation.so"
    command += [str(emulation / "emulation.cpp"), f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.ops.load_library(library)
    return torch.ops.rnnattn_cuda_emulation


class Emulated(Cuda):
    ops: Any = None

    def __init__(self, library: Any) -> None:
        self.ops = library

    def unavailable(self) -> None:
        return None

    def unsupported(self, call: Call) -> None:
        return None


@pytest.fixture
def emulated(library: Any, monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """Backend "cuda" runs the emulation."""
    backend = Emulated(library)
    monkeypatch.setitem(backends.BACKENDS, "cuda", backend)
    return backend
