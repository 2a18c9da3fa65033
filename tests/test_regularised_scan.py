"""The operation `rnnattn::regularised_scan`: its numbers on every backend, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import F64, OWN, backend_parameters, device_of, moved, runs, truth
from regularised_cases import REGULARISED_CASES, RegularisedCase
from tolerances import assert_close
from torch import Tensor

import rnnattn

T, B, H = 6, 3, 5


def test_case_ids_are_unique() -> None:
    assert len({case.id for case in REGULARISED_CASES}) == len(REGULARISED_CASES)


@pytest.mark.parametrize("name, case, dtype", runs(REGULARISED_CASES, names=("cpp", "triton", "cuda")))
def test_scan(name: str, case: RegularisedCase, dtype: torch.dtype) -> None:
    t = moved(case.tensors(dtype), device_of(name))
    got = case.run(t, name)
    assert_close(got, truth(case, dtype), case.op, dtype, name)
    if case.lengths is not None:
        behind = torch.arange(case.T)[:, None] >= torch.tensor(case.lengths)[None, :]
        assert not got["y"][behind].any() and not got["da"][behind].any()


# argument -> what it may not be, of a call with T, B, H = 6, 3, 5
MISFITS: dict[str, tuple[Tensor | None, str]] = {
    "a": (torch.zeros(6, 3, 5), r"a: expected shape \[6, 3, 20\], got \[6, 3, 5\]"),
    "h0": (torch.zeros(1, 5), r"h0: expected shape \[3, 5\], got \[1, 5\]"),
    "c0": (torch.zeros(1, 5), r"c0: expected shape \[3, 5\], got \[1, 5\]"),
    "w_hh": (torch.zeros(20, 5, dtype=torch.int64), "w_hh: expected Float, got Long"),
    "b_hh": (torch.zeros(1), r"b_hh: expected shape \[20\], got \[1\]"),
    "norm_hh": (torch.zeros(5), r"norm_hh: expected shape \[20\], got \[5\]"),
    "norm_c": (torch.zeros(20), r"norm_c: expected shape \[5\], got \[20\]"),
    "bias_c": (torch.zeros(5, dtype=torch.bool), "bias_c: expected a floating type, got Bool"),
    "h_mask": (torch.zeros(1, 5), r"h_mask: expected shape \[3, 5\], got \[1, 5\]"),
    "keep_h": (torch.zeros(6, 3, 5), "keep_h: expected Bool, got Float"),
    "keep_c": (torch.zeros(1, 1, 1) > 0, r"keep_c: expected shape \[6, 3, 5\], got \[1, 1, 1\]"),
    "lengths": (torch.zeros(1, dtype=torch.int64), r"lengths: expected shape \[3\], got \[1\]"),
    "resets": (torch.zeros(1, 3) > 0, r"resets: expected shape \[6, 3\], got \[1, 3\]"),
}


def operands(save: bool) -> dict[str, Any]:
    """Of a call of the operator with all there is, by name."""
    shapes = {"a": (T, B, 4 * H), "h0": (B, H), "c0": (B, H), "w_hh": (4 * H, H), "b_hh": (4 * H,), "norm_hh": (4 * H,),
              "norm_c": (H,), "bias_c": (H,), "h_mask": (B, H)}  # fmt: skip
    keep = torch.rand(T, B, H) < 0.5
    return {name: torch.randn(shape) for name, shape in shapes.items()} | {
        "keep_h": keep, "keep_c": ~keep, "zoneout_h": 0.0, "zoneout_c": 0.0, "lengths": torch.tensor([6, 0, 3]),
        "resets": keep[..., 0].clone(), "reset_to_initial": False, "reverse": False, "mode": "LSTM", "save": save,
        "backend": "cpp",
    }  # fmt: skip


@pytest.mark.parametrize("backend", backend_parameters("cpp"))
@pytest.mark.parametrize("name", MISFITS)
def test_the_operator_refuses_what_does_not_fit(name: str, backend: str) -> None:
    value, words = MISFITS[name]
    with pytest.raises(RuntimeError, match=words):
        torch.ops.rnnattn.regularised_scan(*(operands(save=False) | {name: value}).values())


@pytest.mark.parametrize("backend", backend_parameters("cpp"))
@pytest.mark.parametrize("name", ("h0", "norm_hh", "keep_h", "resets"))
def test_the_operator_refuses_freed_memory(name: str, backend: str) -> None:
    given = operands(save=False)
    given[name].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=f"{name}: expected a tensor with data, got one whose storage was freed"):
        torch.ops.rnnattn.regularised_scan(*given.values())


@pytest.mark.parametrize("backend", backend_parameters("cpp"))
@pytest.mark.parametrize("name", ("y", "cells", "gates", "hidden", "rstd"))
def test_the_backward_refuses_what_does_not_fit(name: str, backend: str) -> None:
    given = operands(save=True)
    y, _, _, *saved = torch.ops.rnnattn.regularised_scan(*given.values())
    results = dict(zip(("y", "cells", "gates", "hidden", "rstd"), (y, *saved), strict=True))
    inputs = [value for key, value in given.items() if key not in ("save", "backend")]
    run = torch.ops.rnnattn.regularised_scan_backward
    whole = run(y, None, None, None, *inputs, *results.values(), True, "cpp")
    apart = {key: torch.stack([value, torch.full_like(value, torch.nan)], -1)[..., 0] for key, value in results.items()}
    assert all(
        torch.equal(*both)
        for both in zip(whole, run(y, None, None, None, *inputs, *apart.values(), True, "cpp"), strict=True)
    )
    if name not in ("y", "cells"):
        with pytest.raises(RuntimeError, match=f"{name}: expected shape"):
            run(y, None, None, None, *inputs, *(results | {name: results[name][:1]}).values(), True, "cpp")
    results[name].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=f"{name}: expected a tensor with data, got one whose storage was freed"):
        run(torch.ones(T, B, H), None, None, None, *inputs, *results.values(), True, "cpp")


def test_a_gradient_needs_what_the_forward_saves() -> None:
    a, h, w = torch.randn(T, B, H, requires_grad=True), torch.zeros(B, H), torch.zeros(H, H)
    arguments = (a, h, None, w, *[None] * 7, 0.0, 0.0, None, None, False, False, "RNN_TANH")
    with pytest.raises(RuntimeError, match="gradients need save=True"):
        torch.ops.rnnattn.regularised_scan(*arguments, False, "reference")


def test_opcheck() -> None:
    case = next(case for case in REGULARISED_CASES if case.reason.startswith("ragged, with"))
    t = case.tensors(F64, poisoned=False)
    leaves = [t[n].requires_grad_() for n in ("a", "h0", "c0", "w_hh", "b_hh", "norm_hh", "norm_c", "bias_c")]
    settings = (t["h_mask"], t["keep_h"], t["keep_c"], 0.0, 0.0, t["lengths"], None, False, False, "LSTM", True, "cpp")
    torch.library.opcheck(torch.ops.rnnattn.regularised_scan.default, (*leaves, *settings))


@pytest.mark.parametrize("backend", backend_parameters(*OWN))
@pytest.mark.parametrize("kind", ("LSTM", "GRU"))
def test_gradients_to_be_differentiated_are_the_kernels(kind: str, backend: str) -> None:
    device = device_of(backend)
    m = getattr(rnnattn, kind)(3, 4, layer_norm=True, zoneout=0.2, device=device)
    inputs = [torch.randn(5, 2, 3, device=device, requires_grad=True), *m.parameters()]

    def loss(x: Tensor) -> Tensor:
        torch.manual_seed(0)  # of the masks
        return m(x)[0].square().sum()

    with rnnattn.use_backend(backend):
        first = torch.autograd.grad(loss(inputs[0]), inputs)
        again = torch.autograd.grad(loss(inputs[0]), inputs, create_graph=True)
        mapped = torch.func.grad(loss)(inputs[0])
        second = torch.autograd.grad(sum(d.square().sum() for d in again), inputs)
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True)) and torch.equal(first[0], mapped)
    with rnnattn.use_backend("reference"):
        want = torch.autograd.grad(loss(inputs[0]), inputs, create_graph=True)
        seconds = torch.autograd.grad(sum(d.square().sum() for d in want), inputs)
    torch.testing.assert_close(second, seconds, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", backend_parameters(*OWN))
def test_frozen_weights(backend: str) -> None:
    """Get no gradients, and cost none; what is before them gets the same."""
    m = rnnattn.LSTM(3, 4, layer_norm=True, zoneout=0.2).to(device_of(backend)).eval()
    x = torch.randn(5, 2, 3, device=device_of(backend), requires_grad=True)
    found = []
    with rnnattn.use_backend(backend):
        for frozen in (False, True):
            m.requires_grad_(not frozen)
            found += torch.autograd.grad(m(x)[0].sum(), x)
    assert torch.equal(*found) and all(p.grad is None for p in m.parameters())
