"""The CUDA sources on a machine without a GPU: they compile, do not spill, and compute the right numbers.

The numbers come from an emulation (tests/cuda_emulation, fixture `emulated`): the same sources, launchers and checks
included, compiled for the CPU with every CUDA thread a fiber. It proves arithmetic, indexing and
barriers; memory ordering, tensor core rounding and speed need a GPU.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BF16, F16, F32, F64, SHORT, Case, strided, truth
from emulated_cuda import SOURCES, TORCH
from pool_cases import POOL_CASES, PoolCase
from recurrent_cases import LSTM_CASES, MODES, RECURRENT_CASES, RecurrentCase
from regularised_cases import REGULARISED_CASES, RegularisedCase
from tolerances import assert_close
from torch import Tensor

from rnnattn import reference
from rnnattn.backends import cuda, pool_gemms
from rnnattn.backends.cuda import Cuda, runs_on

ARCHITECTURES = (80, 90)
DTYPES = (F32, BF16, F16)

EXTRA_CASES: list[Case] = [
    RecurrentCase(5, 3, 4, 260, "H above one block of units", lengths=(3, 1, 0, 2, 3)),
    RecurrentCase(5, 3, 4, 260, "H above one block of units", mode="GRU", lengths=(3, 1, 0, 2, 3)),
    RegularisedCase(2, 2, 520, "H above one block of units", norm=True, zoneout="drawn", dropout=True, lengths=(1, 2)),
    PoolCase(2, 300, 24, 0, "time split into parts of several tiles", lengths=(300, 70)),
    PoolCase(2, 100, 8, 20, "time split, additive, a part without a kept step", lengths=(33, 100)),
    PoolCase(2, 34, 1032, 0, "D above one block of fp32 vectors", mask="holes"),
    PoolCase(1, 3, 2056, 0, "D above one block of 16-bit vectors"),
    PoolCase(2, 37, 72, 136, "several tiles of D and of A, vectors", lengths=(37, 20)),
    PoolCase(1, 3, 5, 1030, "A above one block of columns"),
]  # fmt: skip


@pytest.mark.parametrize("source", sorted(p.name for p in SOURCES.glob("*.cu")))
def test_compiles_without_warnings_or_spills(source: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on the PATH")
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    command = [nvcc, "-std=c++20", "-O3", "-DUSE_CUDA", *targets, "-Werror=all-warnings", "-Xptxas=-v"]
    command += ["--compiler-options=-fPIC,-Wall,-Wextra,-Werror,-O0", "-isystem", str(TORCH / "include"), "-c"]
    done = subprocess.run([*command, str(SOURCES / source), "-o", str(tmp_path / "o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    usage = resource_usage(done.stdout + done.stderr)
    for name, architecture, registers, shared, spilled in usage:
        print(f"{architecture} {registers:4} registers {shared:6} B shared {spilled:3} B spilled  {name}")
    assert len(usage) >= 6 * len(ARCHITECTURES), "ptxas reported fewer kernels than there are"
    assert "spill stores" in done.stdout + done.stderr
    assert not [row for row in usage if row[-1] > 0]


def resource_usage(log: str) -> list[tuple[str, str, int, int, int]]:
    """(kernel, architecture, registers, bytes of shared memory, bytes of spill stores) from ptxas -v."""
    rows = []
    for entry in log.split("Compiling entry function ")[1:]:
        mangled, architecture = re.findall(r"'(\S+)' for '(\w+)'", entry)[0]
        registers, shared, spilled = (
            int((re.findall(pattern, entry) or ["0"])[0])
            for pattern in (r"Used (\d+) registers", r"(\d+) bytes smem", r"(\d+) bytes spill stores")
        )
        name = re.sub(r"^_ZN7rnnattn4cuda\d+|E?EvNS.*$", "", mangled)
        rows.append((name, architecture, registers, shared, spilled))
    return rows


@pytest.mark.parametrize("path", sorted(SOURCES.iterdir()), ids=lambda p: p.name)
def test_device_code_knows_no_torch(path: Path) -> None:
    """Device code includes CUDA's headers, launchers torch's stable ones; either compiles in seconds."""
    included = re.findall(r"#include [<\"](\S+)[>\"]", path.read_text())
    foreign = [name for name in included if name.startswith(("ATen", "c10", "torch"))]
    if path.name == "launch.h":
        assert [name for name in foreign if not re.match(r"torch/csrc/(stable|inductor/aoti_torch/c)/", name)] == []
    else:
        assert foreign == []


def parameters() -> Iterator[Any]:
    """fp16 differs from bf16 in its conversions alone: one case of each operation shows those. GRU's and RNN's cases,
    which are an LSTM's too, take fp32 and bf16 by turns; the regularised ones fp32, and bf16 where all is on."""
    cases: list[Case] = [*RECURRENT_CASES, *REGULARISED_CASES, *POOL_CASES, *EXTRA_CASES]
    for n, case in enumerate(cases):
        dtypes = DTYPES if case in (LSTM_CASES[0], REGULARISED_CASES[0], *POOL_CASES[:2]) else (F32, BF16)
        if isinstance(case, RegularisedCase) and case != REGULARISED_CASES[0] and case.reason != "all at once":
            dtypes = (F32,)
        dtypes = tuple(dtype for dtype in dtypes if case.offered("cuda", dtype))
        if isinstance(case, RecurrentCase) and case.mode != "LSTM":
            dtypes = dtypes[n % len(dtypes) :][:1]
        for dtype in dtypes:
            yield pytest.param(case, dtype, id=f"{case.id}-{SHORT[dtype]}")


@pytest.mark.parametrize("case, dtype", list(parameters()))
def test_emulated(case: Case, dtype: torch.dtype, emulated: Cuda) -> None:
    got = case.run(case.tensors(dtype), "cuda")
    assert_close(got, truth(case, dtype), case.op, dtype)
    if isinstance(case, PoolCase):
        assert got["dx"][~case.kept()].eq(0).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_step_with_strided_rows(dtype: torch.dtype, mode: str, library: Any) -> None:
    """Rows apart from each other, at addresses that no vector fits, give what dense rows give."""
    B, H, cell, number = 3, 8, reference.CELLS[mode], cuda.MODES.index(mode)
    G, S = cell.blocks * H, cell.saved * H
    draw = torch.Generator().manual_seed(0)

    def apart(width: int, of: torch.dtype = F32) -> Tensor:
        return torch.randn(B, width + 3, generator=draw).to(of)[:, 1:-2]

    def dense(value: Any) -> Any:
        return value.contiguous() if isinstance(value, Tensor) else value

    def same(strided_outputs: list[Any], dense_outputs: list[Any]) -> None:
        for strided_output, dense_output in zip(strided_outputs, dense_outputs, strict=True):
            if strided_output is not None:
                torch.testing.assert_close(strided_output, dense_output, rtol=0, atol=0)

    lengths, resets = torch.tensor([2, 1, 5]), torch.tensor([True, False, False])
    bias_q = torch.randn(H, generator=draw).to(dtype) if mode == "GRU" else None
    h_prev, c_prev = apart(H, dtype), apart(H) if cell.has_c else None
    to = apart(G), apart(H, dtype), apart(H) if cell.has_c else None  # what resets put in their place
    inputs = [apart(G), apart(G), bias_q, h_prev, c_prev, lengths, 1, resets, *to]
    outputs = [apart(S, dtype) if S else None, apart(H) if cell.has_c else None, apart(H, dtype), apart(H, dtype)]
    copies = [dense(a) for a in outputs]
    library.step_forward(number, *inputs, *outputs)
    library.step_forward(number, *(dense(a) for a in inputs), *copies)
    same(outputs, copies)

    gates, c, y, _ = outputs
    given = [apart(H, dtype), apart(H)]
    both_ways = [apart(H), apart(H) if cell.has_c else None]
    saved = [gates, y, h_prev, c, c_prev, lengths, 1, resets, ~resets, to[2]]
    gathered = [apart(H), apart(H) if cell.has_c else None]
    out = [apart(G, dtype), None if cell.shared else apart(G, dtype)]
    copies = [dense(a) for a in (*both_ways, *gathered, *out)]
    library.step_backward(
        cuda.MODES.index(mode), *(dense(a) for a in given), *copies[:2], *(dense(a) for a in saved), *copies[2:]
    )
    library.step_backward(number, *given, *both_ways, *saved, *gathered, *out)
    same([*both_ways, *gathered, *out], copies)


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
@pytest.mark.parametrize("A", [0, 6])
def test_pool_of_rows_that_no_vector_fits(A: int, dtype: torch.dtype, emulated: Cuda) -> None:
    """Steps of x with contiguous elements, but at odd distances and addresses."""
    case = PoolCase(3, 5, 8, A, "odd addresses", lengths=(5, 0, 2))
    t = case.tensors(dtype)
    t["x"] = torch.nn.functional.pad(t["x"], (1, 2), value=torch.nan)[..., 1:-2]
    assert_close(case.run(t, "cuda"), truth(case, dtype), "attention_pool", dtype)


@pytest.mark.parametrize("A", [0, 6])
def test_one_block_takes_several_tiles(A: int, emulated: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    case = PoolCase(2, 100, 300, A, "one part of a row, one block for all of the backward", mask="holes", nan=True)
    monkeypatch.setattr(cuda, "BLOCKS", 1)
    assert_close(case.run(case.tensors(F32), "cuda"), truth(case, F32), "attention_pool", F32)


def test_additive_backward_in_chunks(emulated: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """The workspace may hold some rows, or a part of one: the sums over the chunks come out the same."""
    case = PoolCase(5, 7, 6, 8, "chunks", mask="holes", nan=True)
    for steps in (1, 3, 15):
        monkeypatch.setattr(pool_gemms, "CHUNK", steps * 8)
        assert_close(case.run(case.tensors(F32), "cuda"), truth(case, F32), "attention_pool", F32)


def test_bad_arguments_are_named(library: Any) -> None:
    a, c, none = torch.zeros(2, 8), torch.zeros(2, 2), None

    def forward(mode: str = "LSTM", **changed: Any) -> None:
        given = {"gates_x": a, "gates_h": a, "bias_q": none, "h_prev": c, "c_prev": c, "lengths": none, "t": 0,
                 "resets": none, "gates_reset": none, "h_reset": none, "c_reset": none, "gates": a, "c": c, "y": c,
                 "h": none}  # fmt: skip
        library.step_forward(cuda.MODES.index(mode), **(given | changed))

    def backward(mode: str = "LSTM", **changed: Any) -> None:
        given = {"dy": c, "product": c, "dh": none, "dc": c, "gates": a, "y": c, "h_prev": c, "c": c, "c_prev": c,
                 "lengths": none, "t": 0, "resets": none, "resets_after": none, "c_reset": none, "dh_reset": none,
                 "dc_reset": none, "da": a.clone(), "db": none}  # fmt: skip
        library.step_backward(cuda.MODES.index(mode), **(given | changed))

    forward(), backward()
    with pytest.raises(RuntimeError, match=r"step_forward: gates_h: expected shape \[2, 8\], got \[2, 7\]"):
        forward(gates_h=a[:, 1:])
    with pytest.raises(RuntimeError, match="c_prev: expected dtype Float, got Double"):
        forward(c_prev=c.to(F64))
    with pytest.raises(RuntimeError, match=r"dy: expected stride 1 in the last dimension, got 2"):
        backward(dy=strided(c))
    with pytest.raises(RuntimeError, match="expected dtype Float, Half or BFloat16, got Double"):
        backward(**{name: t.to(F64) for name, t in {"dy": c, "gates": a, "y": c, "h_prev": c, "da": a}.items()})
    with pytest.raises(RuntimeError, match="h_prev: expected a tensor for LSTM, got None"):
        forward(lengths=torch.tensor([1, 1]), h=c, h_prev=none)
    with pytest.raises(RuntimeError, match="h_prev: expected a tensor for GRU, got None"):
        forward("GRU", gates_x=a[:, :6], gates_h=a[:, :6], h_prev=none)
    with pytest.raises(RuntimeError, match="y: expected a tensor for RNN_RELU, got None"):
        backward("RNN_RELU", da=c.clone(), y=none)
    with pytest.raises(RuntimeError, match="resets: expected dtype Bool, got Long"):
        forward(resets=torch.tensor([1, 1]))
    with pytest.raises(RuntimeError, match=r"mode: expected 0 to 3 \(LSTM, GRU, RNN_TANH, RNN_RELU\), got 4"):
        library.step_forward(4, a, a, none, c, c, none, 0, none, none, none, none, a, c, c, none)


def test_architectures() -> None:
    assert runs_on("8.0", (8, 6)) and runs_on("9.0+PTX", (10, 0)) and runs_on("Hopper", (9, 0))
    assert not runs_on("8.0", (9, 0)) and not runs_on("9.0", (8, 0)) and not runs_on("9.0+PTX", (8, 0))
