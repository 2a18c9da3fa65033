"""Properties that hold for every shape: the C++ kernels give what the reference gives."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import F32, F64, Case
from hypothesis import given, settings
from hypothesis import strategies as st
from pool_cases import PoolCase
from recurrent_cases import MODES, RecurrentCase
from tolerances import relative_error

from rnnattn import backends

_reason = backends.unavailable("cpp")
pytestmark = pytest.mark.skipif(_reason is not None, reason=f"backend cpp: {_reason}")
bounded = settings(max_examples=30, deadline=None, derandomize=True)


@st.composite
def recurrent_cases(draw: st.DrawFn) -> RecurrentCase:
    mode = draw(st.sampled_from(MODES))
    B, T, H = draw(st.integers(0, 5)), draw(st.integers(1, 6)), draw(st.integers(1, 20))
    lengths = draw(st.none() | st.lists(st.integers(0, T), min_size=B, max_size=B).map(tuple))
    return RecurrentCase(
        B, T, draw(st.integers(1, 18)), H, "drawn", mode,
        R=draw(st.just(0) | st.integers(1, H - 1)) if H > 1 and mode == "LSTM" else 0,
        layers=draw(st.integers(1, 2)),
        direction=draw(st.sampled_from(["forward", "bidirectional"])),
        bias=draw(st.booleans()),
        lengths=lengths,
        resets=draw(st.sampled_from(["", "some", "every"])),
        to_initial=draw(st.booleans()),
        states=draw(st.booleans()),
        cotangents=draw(st.sampled_from([("y",), ("h_n", "c_n"), ("y", "h_n", "c_n")])),
        layout=draw(st.sampled_from(["contiguous", "strided", "expanded", "batch_first"])),
        nan=lengths is not None and draw(st.booleans()),
    )  # fmt: skip


@st.composite
def pool_cases(draw: st.DrawFn) -> PoolCase:
    B, T = draw(st.integers(0, 5)), draw(st.integers(0, 40))
    kept = draw(st.sampled_from(["all", "lengths", "mask"]))
    lengths = tuple(draw(st.lists(st.integers(0, T), min_size=B, max_size=B))) if kept == "lengths" else None
    return PoolCase(
        B, T, draw(st.integers(1, 40)), draw(st.just(0) | st.integers(1, 20)), "drawn",
        bias=draw(st.booleans()),
        lengths=lengths,
        mask=draw(st.sampled_from(["holes", "empty_rows", "none_kept"])) if kept == "mask" else None,
        cotangents=draw(st.sampled_from([("pooled",), ("p",), ("pooled", "p")])),
        layout=draw(st.sampled_from(["contiguous", "strided", "transposed"])),
        nan=kept != "all" and draw(st.booleans()),
    )  # fmt: skip


def _agree(case: Case, seed: int) -> None:
    """In float64 to rounding; in fp32 to what the cancellations in small gradients leave."""
    for dtype, allowed in ((F64, 1e-11), (F32, 1e-4)):
        t = case.tensors(dtype, seed)
        got, want = case.run(t, "cpp"), case.run(t, "reference")
        assert got.keys() == want.keys()
        for name, value in got.items():
            assert value.shape == want[name].shape
            size = max(1e-3 * want[name].numel() ** 0.5, want[name].double().norm().item())
            difference = (value.double() - want[name].double()).norm().item() if value.numel() else 0.0
            assert difference <= allowed * size, f"{name} in {dtype}: {relative_error(value, want[name])}"


@bounded
@given(recurrent_cases(), st.integers(0, 2**31))
def test_recurrent_cpp_is_the_reference(case: RecurrentCase, seed: int) -> None:
    _agree(case, seed)


@bounded
@given(pool_cases(), st.integers(0, 2**31))
def test_pooling_cpp_is_the_reference(case: PoolCase, seed: int) -> None:
    _agree(case, seed)


@bounded
@given(pool_cases(), st.integers(0, 2**31))
def test_weights_are_a_distribution(case: PoolCase, seed: int) -> None:
    """Each row of weights is nonnegative and sums to one, or to zero where nothing is kept."""
    case = dataclasses.replace(case, cotangents=("pooled", "p"))
    t = case.tensors(F64, seed)
    got = case.run(t, "cpp", backward=False)
    keep = case.kept()
    assert (got["p"] >= 0).all()
    torch.testing.assert_close(got["p"].sum(1), keep.any(1).double())
    clean = torch.where(keep[..., None], t["x"], 0)
    torch.testing.assert_close(got["pooled"], torch.einsum("bt,btd->bd", got["p"], clean))
