"""The sequence kernels over the recurrent cases: T0, a program for all units, and T1, several that wait for each other,
on a GPU or interpreted side by side. Each case takes one of the two, one way of cutting it, and one dtype, by turns;
with RNNATTN_THOROUGH=1 both and all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from cases import BF16, F16, F32, SHORT, Tensors, device_of, interpreted, moved, truth
from checked_addresses import checked_addresses
from recurrent_cases import RECURRENT_CASES, RecurrentCase
from tolerances import assert_close

pytest.importorskip("triton")

import side_by_side
import triton
import triton.language as tl

import rnnattn
from rnnattn.backends import sequence_choice
from rnnattn.backends.sequence import Launch
from rnnattn.reference import CELLS

WIDEST_T0 = {F32: 64, F16: 100, BF16: 100}  # on a GPU, where one program has to hold all of W_hh
THOROUGH = os.environ.get("RNNATTN_THOROUGH") == "1"


def tiles(tier: str, mode: str, H: int, backward: bool) -> Launch:
    """The smallest that there are in T1, so that there are several programs, chunks and launches; one of all in T0."""
    columns = CELLS[mode].blocks * H if backward else H
    whole = max(16, 1 << (H - 1).bit_length())
    units = whole if tier == "T0" else 8 if 8 < H <= 16 else 16
    parts = (2, 4, 8)[H % 3] if backward else 1
    chunk = 16 if backward or tier == "T1" else whole
    chunks = -(-columns // (parts * chunk))
    return Launch(units, parts, chunk, chunks, min(2, chunks), H % 2 == 0, 16, 4, 0, 1 if tier == "T1" else 100)


@pytest.fixture(params=["T0", "T1"])
def tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Backend triton runs the sequence kernels."""

    def launch_for(
        device: Any, mode: str, B: int, T: int, H: int, dtype: Any, K: int, backward: bool, layers: int
    ) -> Launch | None:
        launch = tiles(request.param, mode, H, backward) if B and T else None
        return launch if launch is None or layers == 1 else launch._replace(resident=layers)

    monkeypatch.setattr(sequence_choice, "launch_for", launch_for)
    monkeypatch.setattr(sequence_choice, "stacks", sequence_choice.may_stack)
    with side_by_side.cooperative_launches(timeout=120), checked_addresses() if interpreted() else nullcontext():
        yield request.param


def run(case: RecurrentCase, dtype: torch.dtype) -> Tensors:
    return case.run(moved(case.tensors(dtype), device_of("triton")), "triton")


def parameters() -> Iterator[Any]:
    cases = [case for case in RECURRENT_CASES if not case.R]  # a projection goes step by step
    for n, case in enumerate(cases):
        several = 16 < case.H < 40 or (n % 2 == 0 and case.H <= 16)
        for tier in ("T0", "T1"):
            for dtype in (F32, F16) if interpreted() else (F32, F16, BF16):
                taken = tier == ("T1" if several else "T0") and dtype == (F32, F16)[n // 2 % 2]
                fits = tier == "T1" or interpreted() or case.H <= WIDEST_T0[dtype]
                if case.offered("triton", dtype) and fits and (THOROUGH or taken):
                    yield pytest.param(tier, case, dtype, id=f"triton-{tier}-{case.id}-{SHORT[dtype]}")


@triton.jit
def copy_kernel(source, target, n, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(target + place, tl.load(source + place, place < n))


@pytest.mark.skipif(not interpreted(), reason="a GPU's addresses are not looked at")
def test_an_address_beyond_a_tensor_is_seen() -> None:
    with checked_addresses():
        copy_kernel[(1,)](torch.ones(5), torch.zeros(8), 5, BLOCK=8)
        with pytest.raises(Exception, match="a load outside of the kernel's arguments: 0 and 4 bytes from the ends"):
            copy_kernel[(1,)](torch.ones(5), torch.zeros(8), 6, BLOCK=8)
        with pytest.raises(Exception, match="a store outside"):
            copy_kernel[(1,)](torch.ones(8), torch.zeros(7), 8, BLOCK=8)


@pytest.mark.parametrize("tier, case, dtype", list(parameters()), indirect=["tier"])
def test_cases(tier: str, case: RecurrentCase, dtype: torch.dtype) -> None:
    assert_close(run(case, dtype), truth(case, dtype), case.op, dtype, "triton")


@pytest.mark.parametrize("mode", ("LSTM", "GRU", "RNN_TANH"))
def test_three_programs_of_a_group_on_triton(mode: str, tier: str) -> None:
    case = RecurrentCase(3, 5, 4, 35, "", mode, direction="bidirectional", lengths=(5, 0, 3), resets="some",
                         to_initial=True, states=True)  # fmt: skip
    with side_by_side.cooperative_launches(timeout=120) as launched:
        got = run(case, F32)
    assert_close(got, truth(case, F32), case.op, F32, "triton")
    # A launch for each direction, each way; only the interpreter's are counted.
    assert len(launched) == (4 if tier == "T1" and interpreted() else 0)


@pytest.mark.parametrize("tier", ["T0"], indirect=True)
def test_rows_of_several_tiles_end_by_themselves_on_triton(tier: str) -> None:
    """37 rows in 3 tiles, taken longest first; the last tile has none but empty ones."""
    lengths = tuple(n % 4 for n in range(33)) + (0,) * 4
    case = RecurrentCase(37, 4, 3, 5, "", lengths=lengths, direction="bidirectional", states=True, nan=True)
    assert_close(run(case, F32), truth(case, F32), case.op, F32, "triton")


@pytest.mark.parametrize("direction, layers", [("forward", 1), ("bidirectional", 1), ("forward", 2)])
@pytest.mark.parametrize("mode", ("LSTM", "GRU", "RNN_TANH"))
def test_packed_rows_of_several_tiles_on_triton(mode: str, direction: str, layers: int, tier: str) -> None:
    """Two of them, of 16 and 3 rows; several programs a tile in T1."""
    lengths = (6, 6, 5, *(4,) * 11, 2, 1, 1, 1, 1)
    case = RecurrentCase(19, 6, 3, 20, "", mode, direction=direction, layers=layers, layout="packed", lengths=lengths,
                         states=True)  # fmt: skip
    assert_close(run(case, F32), truth(case, F32), case.op, F32, "triton")


@pytest.mark.parametrize("tier", ["T0"], indirect=True)
@pytest.mark.parametrize("H", [5, 16])
@pytest.mark.parametrize("direction", ["forward", "bidirectional", "stack"])
def test_the_operator_on_triton(direction: str, H: int, tier: str) -> None:
    """Among others that results are nobody else's memory and lie as a compiler expects, for any H."""
    K, draw = 1 if direction == "forward" else 2, torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw).to(device_of("triton"))

    x, h0 = normal(4, 3, H).requires_grad_(), normal(K, 3, H)
    weights = [w.requires_grad_() for _ in range(K) for w in (normal(3 * H, H), normal(3 * H, H))]
    arguments = x, h0, None, weights, None, None, False, False, direction, "GRU", True, "triton"
    torch.library.opcheck(torch.ops.rnnattn.recurrent_layer.default, arguments)
    y = torch.ops.rnnattn.recurrent_layer(*arguments)[0].detach()
    assert y.is_contiguous() and y.storage_offset() == 0 and not y._is_view()


@pytest.mark.parametrize("tier", ["T0"], indirect=True)
def test_a_projection_to_as_many_units_is_none_of_the_engine_on_triton(tier: str) -> None:
    on = device_of("triton")
    x, h0, c0 = (torch.randn(shape, device=on) for shape in ((4, 3, 5), (1, 3, 6), (1, 3, 6)))
    weights = [torch.randn(shape, device=on) for shape in ((24, 5), (24, 6), (6, 6))]
    results = []
    for backend in ("triton", "reference"):
        with rnnattn.use_backend(backend):
            results.append(rnnattn.functional.lstm(x, (h0, c0), weights, has_biases=False)[0])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
