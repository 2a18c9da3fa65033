"""The recurrent operation on every backend that has the cell: numbers, exact promises, determinism, accuracy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import F32, F64, OWN, backend_parameters, device_of, moved, runs, truth
from recurrent_cases import MODES, RECURRENT_CASES, RecurrentCase, each_mode
from tolerances import assert_close, relative_error
from torch import Tensor, nn

import rnnattn
from rnnattn import functional as RF


def test_case_ids_are_unique() -> None:
    assert len({case.id for case in RECURRENT_CASES}) == len(RECURRENT_CASES)


@pytest.mark.parametrize("name, case, dtype", runs(RECURRENT_CASES))
def test_forward_and_backward(name: str, case: RecurrentCase, dtype: torch.dtype) -> None:
    t = moved(case.tensors(dtype), device_of(name))
    got = case.run(t, name)
    assert_close(got, truth(case, dtype), case.op, dtype, name)
    if case.lengths is not None:
        _assert_padding_is_exact(case, moved(t, torch.device("cpu")), moved(got, torch.device("cpu")))


# Backend cpp packs no weights for so few steps as most cases have.
LONGER = [
    replace(case, T=case.T + 8) for case in RECURRENT_CASES if case.T in range(2, 9) and case.scale == 1 and case.H > 1
]


@pytest.mark.parametrize("name, case, dtype", runs(LONGER, names=("cpp",)))
def test_with_more_steps(name: str, case: RecurrentCase, dtype: torch.dtype) -> None:
    test_forward_and_backward(name, case, dtype)


def _assert_padding_is_exact(case: RecurrentCase, t: dict[str, Any], got: dict[str, Any]) -> None:
    """Zeros behind the lengths, in dx too; a row without steps hands its states, and what they cost, through."""
    invalid, empty = ~case.valid(), torch.tensor(case.lengths, dtype=torch.int64) == 0
    assert not got["y"][invalid].any() and (not case.cells or not got["cells"][invalid].any())
    assert not got["dx"][invalid].any()
    for state, initial in case.initial_of.items():
        assert torch.equal(got[state][:, empty], t[initial][:, empty])
        if case.states and state in case.cotangents:
            assert torch.equal(got["d" + initial][:, empty], t["d" + state][:, empty])


SAMPLE = ("the plain", "ragged, with", "projection, ragged", "a ragged stack", "episodes from the initial")
SOME = [case for case in RECURRENT_CASES if case.reason.startswith(SAMPLE)]


@pytest.mark.parametrize("name, case, dtype", runs(SOME, few=True))
def test_two_runs_are_bit_equal(name: str, case: RecurrentCase, dtype: torch.dtype) -> None:
    t = moved(case.tensors(dtype), device_of(name))
    first, second = case.run(t, name), case.run(t, name)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.parametrize("name, case, dtype", runs(SOME))
def test_inference_gives_the_same_numbers(name: str, case: RecurrentCase, dtype: torch.dtype) -> None:
    """Where nothing is saved for a backward pass."""
    got = case.run(moved(case.tensors(dtype), device_of(name)), name, backward=False)
    assert_close(got, {key: truth(case, dtype)[key] for key in got}, case.op, dtype, name)


@pytest.mark.parametrize("backend, mode", each_mode("reference", "cpp"))
@pytest.mark.parametrize("kind", ["states", "both directions, ragged", "stack", "episodes", "episodes from hx"])
def test_gradcheck(backend: str, mode: str, kind: str) -> None:
    case = {
        "states": RecurrentCase(2, 3, 2, 3, kind, mode, states=True),
        "both directions, ragged": RecurrentCase(
            3,
            3,
            2,
            3,
            kind,
            mode,
            R=2 if mode == "LSTM" else 0,
            direction="bidirectional",
            lengths=(2, 0, 3),
            states=True,
        ),
        "stack": RecurrentCase(2, 3, 2, 2, kind, mode, layers=2, bias=False, lengths=(3, 1), states=True),
        "episodes": RecurrentCase(3, 4, 2, 3, kind, mode, direction="bidirectional", resets="some", states=True),
        "episodes from hx": RecurrentCase(
            3, 4, 2, 3, kind, mode, R=2 if mode == "LSTM" else 0, direction="bidirectional", lengths=(4, 0, 3),
            resets="some", to_initial=True, states=True,
        ),
    }[kind]  # fmt: skip
    t, states = case.tensors(F64), len(case.initial_of)

    def layers(x: Any, *rest: Any) -> Any:
        with rnnattn.use_backend(backend):
            return case.call(x, rest[:states], rest[states:], t["lengths"], t["resets"])

    inputs = [t["x"], *(t[name] for name in case.initial_of.values()), *t["weights"]]
    inputs = [p.requires_grad_() for p in inputs]
    assert torch.autograd.gradcheck(layers, inputs, fast_mode=case.layers == 2)


# --- what is rounded, and when -------------------------------------------------------------------


def test_the_cell_state_is_not_rounded_between_steps(backend: str) -> None:
    """In bf16 c would lose or gain a third of each of these increments."""
    T, H, bf16 = 100, 2, {"dtype": torch.bfloat16, "device": device_of(backend)}
    bias = torch.tensor([-4.0, 30.0, 1.0, 0.0], **bf16).repeat_interleave(H)  # i small, f one
    weights = [torch.zeros(4 * H, 1, **bf16), torch.zeros(4 * H, H, **bf16), bias, torch.zeros_like(bias)]
    zeros = torch.zeros(1, 1, H, **bf16)
    with rnnattn.use_backend(backend):
        _, _, c_n = RF.lstm(torch.zeros(T, 1, 1, **bf16), (zeros, zeros), weights)
    increment = (torch.tensor(-4.0).sigmoid() * torch.tensor(1.0).tanh()).item()
    torch.testing.assert_close(c_n.float().cpu(), torch.full((1, 1, H), T * increment), rtol=2**-8, atol=0)


@pytest.mark.parametrize("backend", backend_parameters("reference", "cpp"))
def test_the_hidden_state_is_rounded_at_every_step(backend: str) -> None:
    """As y is what the backward computes with: here every step rounds back to one half in bf16."""
    T, H, bf16 = 100, 2, torch.bfloat16
    bias = torch.tensor([0.0, 7.0, 1.0], dtype=bf16).repeat_interleave(H)  # z = 1 - 2^-10, n = 0.76
    weights = [torch.zeros(3 * H, 1, dtype=bf16), torch.zeros(3 * H, H, dtype=bf16), bias, torch.zeros_like(bias)]
    half = torch.full((1, 1, H), 0.5, dtype=bf16)
    with rnnattn.use_backend(backend):
        y, h_n = RF.gru(torch.zeros(T, 1, 1, dtype=bf16), half, weights)
        wide, _ = RF.gru(torch.zeros(T, 1, 1), half.float(), [w.float() for w in weights])
    assert torch.equal(y, half.expand(T, 1, H)) and torch.equal(h_n, half)
    assert wide[-1].min() > 0.52


@pytest.mark.parametrize("backend, mode", each_mode())
def test_more_steps_than_cudnn_takes(backend: str, mode: str) -> None:
    """T > 65535 in one call is what two calls give (fewer where a step runs in Python or the interpreter)."""
    slow = {"reference": 1000, "triton": 60} if device_of(backend).type == "cpu" else {}
    T, device = slow.get(backend, 66_000), device_of(backend)
    case = RecurrentCase(1, T, 1, 2, "long", mode)
    weights = [torch.randn(shape, device=device) * 0.5 for shape in case.weight_shapes()]
    x, zeros = torch.randn(T, 1, 1, device=device), [torch.zeros(1, 1, 2, device=device)] * len(case.initial_of)
    with rnnattn.use_backend(backend):
        whole = case.call(x, zeros, weights, None)
        first, *states = case.call(x[: T // 2], zeros, weights, None)
        second, *states = case.call(x[T // 2 :], states, weights, None)
    torch.testing.assert_close(whole, (torch.cat([first, second]), *states), rtol=1e-5, atol=1e-6)


# --- accuracy beside torch.nn --------------------------------------------------------------------

# relu's kink leaves 16 bits no exact gradient to compare with; its products are tanh's.
BESIDE = [RecurrentCase(1, 4, 16, 64, "beside torch.nn", mode) for mode in MODES if mode != "RNN_RELU"]


@pytest.mark.parametrize("name, case, dtype", runs(BESIDE, OWN, few=True))
def test_error_is_at_most_torchs(name: str, case: RecurrentCase, dtype: torch.dtype) -> None:
    """The median error over 20 seeds is at most 1.1 times torch.nn's (1.5 from fp32 on), or under 4 eps."""
    device = device_of(name)
    keys = ("y", *case.initial_of, "dx", "dweights[0]", "dweights[1]", "dweights[2]", "dweights[3]")
    ours: dict[str, list[float]] = {key: [] for key in keys}
    theirs: dict[str, list[float]] = {key: [] for key in keys}
    for seed in range(20):
        t, want = moved(case.tensors(dtype, seed), device), truth(case, dtype, seed)
        got, other = case.run(t, name), _torch_nn(case, t)
        for key in keys:
            ours[key].append(relative_error(got[key], want[key]))
            theirs[key].append(relative_error(other[key], want[key]))
    eps, factor = torch.finfo(dtype).eps, 1.5 if dtype in (F32, F64) else 1.1
    for key in keys:
        mine, torchs = (torch.tensor(errors[key]).median().item() for errors in (ours, theirs))
        assert mine <= max(factor * torchs, 4 * eps), f"{key}: {mine / eps:.2f} eps, torch.nn {torchs / eps:.2f} eps"


def _torch_nn(case: RecurrentCase, t: dict[str, Any]) -> dict[str, Tensor]:
    kind = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN_TANH": nn.RNN}[case.mode]
    module = kind(case.I, case.H, device=t["x"].device, dtype=t["x"].dtype)
    with torch.no_grad():
        for p, w in zip(module.parameters(), t["weights"], strict=True):
            p.copy_(w)
    x = t["x"].clone().requires_grad_()
    y, states = module(x)
    results = dict(zip(("y", *case.initial_of), (y, *(states if case.has_c else [states])), strict=True))
    cotangents = [t["d" + name] for name in results]
    dx, *dweights = torch.autograd.grad(list(results.values()), [x, *module.parameters()], cotangents)
    return results | {"dx": dx} | {f"dweights[{n}]": d for n, d in enumerate(dweights)}
