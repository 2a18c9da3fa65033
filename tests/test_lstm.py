"""The LSTM operation on every backend: numbers, exact promises, determinism, what is not computed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from cases import F32, F64, LSTM_CASES, OWN, LSTMCase, backend_parameters, device_of, moved, runs, truth
from tolerances import assert_close, relative_error
from torch import nn

import rnnattn
from rnnattn import backends
from rnnattn import functional as RF

BY_ID = {case.id: case for case in LSTM_CASES}


def test_case_ids_are_unique() -> None:
    assert len(BY_ID) == len(LSTM_CASES)


@pytest.mark.parametrize("name, case, dtype", runs(LSTM_CASES))
def test_forward_and_backward(name: str, case: LSTMCase, dtype: torch.dtype) -> None:
    t = moved(case.tensors(dtype), device_of(name))
    got = case.run(t, name)
    assert_close(got, truth(case, dtype), case.op, dtype, name)
    if case.lengths is not None:
        _assert_padding_is_exact(case, moved(t, torch.device("cpu")), moved(got, torch.device("cpu")))


def _assert_padding_is_exact(case: LSTMCase, t: dict[str, Any], got: dict[str, Any]) -> None:
    """Zeros behind the lengths, in dx too; a row without steps hands its states, and what they cost, through."""
    invalid, empty = ~case.valid(), torch.tensor(case.lengths, dtype=torch.int64) == 0
    assert not got["y"][invalid].any()
    assert not got["dx"][invalid].any()
    for state, initial in (("h_n", "h0"), ("c_n", "c0")):
        assert torch.equal(got[state][:, empty], t[initial][:, empty])
        if case.states and state in case.cotangents:
            assert torch.equal(got["d" + initial][:, empty], t["d" + state][:, empty])


SAMPLE = ("the plain", "ragged, with", "projection, ragged", "a ragged stack")
SOME = [case for case in LSTM_CASES if case.reason.startswith(SAMPLE)]


@pytest.mark.parametrize("name, case, dtype", runs(SOME, few=True))
def test_two_runs_are_bit_equal(name: str, case: LSTMCase, dtype: torch.dtype) -> None:
    t = moved(case.tensors(dtype), device_of(name))
    first, second = case.run(t, name), case.run(t, name)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.parametrize("name, case, dtype", runs(SOME))
def test_inference_gives_the_same_numbers(name: str, case: LSTMCase, dtype: torch.dtype) -> None:
    """Where nothing is saved for a backward pass."""
    got = case.run(moved(case.tensors(dtype), device_of(name)), name, backward=False)
    assert_close(got, {key: truth(case, dtype)[key] for key in got}, case.op, dtype, name)


@pytest.mark.parametrize("backend", backend_parameters("reference", "cpp"))
@pytest.mark.parametrize(
    "case",
    [
        LSTMCase(2, 3, 2, 3, "states", states=True),
        LSTMCase(3, 3, 2, 3, "both directions", R=2, direction="bidirectional", lengths=(2, 0, 3), states=True),
        LSTMCase(2, 3, 2, 2, "a stack", layers=2, bias=False, lengths=(3, 1), states=True),
    ],
    ids=lambda case: case.id,
)
def test_gradcheck(backend: str, case: LSTMCase) -> None:
    t = case.tensors(F64)

    def layers(x: Any, h0: Any, c0: Any, *weights: Any) -> Any:
        with rnnattn.use_backend(backend):
            return RF.lstm(
                x, (h0, c0), weights, case.bias, case.layers, bidirectional=case.directions == 2, lengths=t["lengths"]
            )

    inputs = [p.requires_grad_() for p in (t["x"], t["h0"], t["c0"], *t["weights"])]
    assert torch.autograd.gradcheck(layers, inputs, fast_mode=case.layers == 2)


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


def test_more_steps_than_cudnn_takes(backend: str) -> None:
    """T > 65535 in one call is what two calls give (fewer where a step runs in Python or the interpreter)."""
    slow = {"reference": 1000, "triton": 60} if device_of(backend).type == "cpu" else {}
    T, device = slow.get(backend, 66_000), device_of(backend)
    weights = [torch.randn(s, device=device) * 0.5 for s in ((8, 1), (8, 2), (8,), (8,))]
    x, zeros = torch.randn(T, 1, 1, device=device), torch.zeros(1, 1, 2, device=device)
    with rnnattn.use_backend(backend):
        y, h_n, c_n = RF.lstm(x, (zeros, zeros), weights)
        first, h, c = RF.lstm(x[: T // 2], (zeros, zeros), weights)
        second, h, c = RF.lstm(x[T // 2 :], (h, c), weights)
    torch.testing.assert_close((y, h_n, c_n), (torch.cat([first, second]), h, c), rtol=1e-5, atol=1e-6)


# --- what need not be computed -------------------------------------------------------------------


class Spy:
    """Records what a backend is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
        adapter = backends.get(backend)
        self.saved: list[bool] = []
        self.needs: list[tuple[bool, bool]] = []
        self.cotangents: list[tuple[bool, ...]] = []
        forward, backward = adapter.lstm_layer_forward, adapter.lstm_layer_backward

        def spied_forward(*a: Any) -> Any:
            self.saved.append(a[-1])
            return forward(*a)

        def spied_backward(*a: Any) -> Any:
            self.cotangents.append(tuple(d is not None for d in a[:3]))
            self.needs.append(a[-2:])
            return backward(*a)

        monkeypatch.setattr(adapter, "lstm_layer_forward", spied_forward)
        monkeypatch.setattr(adapter, "lstm_layer_backward", spied_backward)


PLAIN = LSTMCase(3, 4, 5, 6, "plain", states=True)


def _plain(backend: str, *differentiable: str) -> tuple[dict[str, Any], tuple[Any, Any, Any]]:
    t = moved(PLAIN.tensors(F32), device_of(backend))
    for n in differentiable:
        for p in t[n] if isinstance(t[n], list) else [t[n]]:
            p.requires_grad_()
    with rnnattn.use_backend(backend):
        return t, RF.lstm(t["x"], (t["h0"], t["c0"]), t["weights"])


def test_nothing_is_saved_without_gradients(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch, backend)
    _plain(backend)
    with torch.no_grad():
        _plain(backend, "x", "weights")
    with torch.inference_mode():
        _plain(backend, "x", "weights")
    assert spy.saved == [False, False, False]
    _plain(backend, "weights")
    assert spy.saved[3:] == [True]


def test_save_false_returns_empty(backend: str) -> None:
    t = moved(PLAIN.tensors(F32), device_of(backend))
    arguments = (t["x"], t["h0"], t["c0"], t["weights"], None, True, "forward")
    y, h_n, c_n, gates, cells = torch.ops.rnnattn.lstm_layer(*arguments, False, backend)
    assert gates.numel() == cells.numel() == 0
    saved = torch.ops.rnnattn.lstm_layer(*arguments, True, backend)
    assert saved[3].shape == (1, 4, 3, 24) and saved[4].shape == (1, 4, 3, 6)
    for a, b in zip((y, h_n, c_n), saved[:3], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "differentiable, needs",
    [
        (("x",), (True, False)),
        (("weights",), (False, True)),
        (("h0",), (False, False)),
        (("x", "weights"), (True, True)),
    ],
    ids=lambda v: "_".join(map(str, v)),
)
def test_only_what_is_wanted_is_computed(
    backend: str, differentiable: tuple[str, ...], needs: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(monkeypatch, backend)
    t, (y, h_n, _) = _plain(backend, *differentiable)
    torch.autograd.backward([y, h_n], [t["dy"], t["dh_n"]])
    assert spy.needs == [needs]
    assert spy.cotangents == [(True, True, False)]
    expected = dataclasses.replace(PLAIN, cotangents=("y", "h_n"))
    want = truth(expected, F32)
    for n, key in (("x", "dx"), ("h0", "dh0"), ("c0", "dc0")):
        if n in differentiable:
            assert_close({key: t[n].grad}, {key: want[key]}, "lstm", F32)
        else:
            assert t[n].grad is None
    for n, w in enumerate(t["weights"]):
        if "weights" in differentiable:
            assert_close({f"dweights[{n}]": w.grad}, {f"dweights[{n}]": want[f"dweights[{n}]"]}, "lstm", F32)
        else:
            assert w.grad is None


def test_one_trained_weight_among_frozen_ones(backend: str) -> None:
    t = moved(PLAIN.tensors(F32), device_of(backend))
    t["weights"][1].requires_grad_()
    with rnnattn.use_backend(backend):
        y, _, _ = RF.lstm(t["x"], (t["h0"], t["c0"]), t["weights"])
    y.backward(t["dy"])
    assert [w.grad is None for w in t["weights"]] == [True, False, True, True]
    want = truth(dataclasses.replace(PLAIN, cotangents=("y",)), F32)["dweights[1]"]
    assert_close({"dweights[1]": t["weights"][1].grad}, {"dweights[1]": want}, "lstm", F32)


def test_two_backward_passes_over_one_graph(backend: str) -> None:
    """The first must not have overwritten what was saved."""
    t, (y, _, _) = _plain(backend, "x", "weights")
    first = torch.autograd.grad(y, [t["x"], *t["weights"]], t["dy"], retain_graph=True)
    second = torch.autograd.grad(y, [t["x"], *t["weights"]], t["dy"])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_inputs_are_not_written(backend: str) -> None:
    t = moved(PLAIN.tensors(F32), device_of(backend))
    before = {n: v.clone() for n, v in t.items() if isinstance(v, torch.Tensor)}
    PLAIN.run(t, backend)
    assert all(torch.equal(t[n], v) for n, v in before.items())


def test_no_double_backward(backend: str) -> None:
    t, (y, _, _) = _plain(backend, "x")
    (dx,) = torch.autograd.grad(y, t["x"], t["dy"].requires_grad_(), create_graph=True)
    with pytest.raises(NotImplementedError, match="lstm_layer has no double backward"):
        dx.square().sum().backward()


# --- the operators -------------------------------------------------------------------------------

OP_CASES = [PLAIN, BY_ID["B3-T4-I5-H8-R3-bidirectional-nobias-len4_0_2-states"]]


@pytest.mark.parametrize("case", OP_CASES, ids=lambda c: c.id)
@pytest.mark.parametrize("grad", [False, True], ids=["plain", "grad"])
def test_opcheck(backend: str, case: LSTMCase, grad: bool) -> None:
    t = moved(case.tensors(F32), device_of(backend))
    lengths = None if t["lengths"] is None else t["lengths"].to(device_of(backend))
    for p in (t["x"], t["h0"], t["c0"], *t["weights"]) if grad else ():
        p.requires_grad_()
    inputs = (t["x"], t["h0"], t["c0"], t["weights"], lengths, case.bias, case.direction)
    torch.library.opcheck(torch.ops.rnnattn.lstm_layer.default, (*inputs, True, backend))
    if not grad:
        torch.library.opcheck(torch.ops.rnnattn.lstm_layer.default, (*inputs, False, backend))


@pytest.mark.parametrize(
    "given, needs_dx, needs_dweights",
    [(("dy", "dh_n", "dc_n"), True, True), (("dy",), False, True), (("dh_n",), True, False)],
    ids=["all", "no_dx", "no_dweights"],
)
def test_opcheck_backward(backend: str, given: tuple[str, ...], needs_dx: bool, needs_dweights: bool) -> None:
    case = PLAIN if needs_dx and needs_dweights else OP_CASES[1]
    t = moved(case.tensors(F32), device_of(backend))
    lengths = None if t["lengths"] is None else t["lengths"].to(device_of(backend))
    layer = (t["x"], t["h0"], t["c0"], t["weights"], lengths)
    y, _, _, gates, cells = torch.ops.rnnattn.lstm_layer(*layer, case.bias, case.direction, True, backend)
    cotangents = [t[name] if name in given else None for name in ("dy", "dh_n", "dc_n")]
    torch.library.opcheck(
        torch.ops.rnnattn.lstm_layer_backward.default,
        (*cotangents, *layer, y, gates, cells, case.bias, case.direction, needs_dx, needs_dweights, backend),
    )


@pytest.mark.parametrize("case", OP_CASES, ids=lambda c: c.id)
def test_results_are_contiguous_and_own_their_memory(backend: str, case: LSTMCase) -> None:
    t = moved(case.tensors(F32), device_of(backend))
    lengths = None if t["lengths"] is None else t["lengths"].to(device_of(backend))
    layer = (t["x"], t["h0"], t["c0"], t["weights"], lengths)
    results = list(torch.ops.rnnattn.lstm_layer(*layer, case.bias, case.direction, True, backend))
    dx, dh0, dc0, dweights = torch.ops.rnnattn.lstm_layer_backward(
        t["dy"], t["dh_n"], t["dc_n"], *layer, results[0], *results[3:], case.bias, case.direction, True, True, backend
    )
    results += [dx, dh0, dc0, *dweights]
    assert all(r.is_contiguous() for r in results)
    memory = [r.untyped_storage().data_ptr() for r in (*results, t["x"], t["h0"], t["c0"], *t["weights"])]
    assert len(set(memory)) == len(memory)


# --- accuracy beside torch.nn --------------------------------------------------------------------


BESIDE = LSTMCase(1, 4, 16, 64, "beside torch.nn")


@pytest.mark.parametrize("name, case, dtype", runs([BESIDE], OWN, few=True))
def test_error_is_at_most_torchs(name: str, case: LSTMCase, dtype: torch.dtype) -> None:
    """The median error over 20 seeds is at most 1.1 times torch.nn's (1.5 from fp32 on), or under 4 eps."""
    device, keys = device_of(name), ("y", "c_n", "dx", "dweights[0]", "dweights[1]", "dweights[2]")
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


def _torch_nn(case: LSTMCase, t: dict[str, Any]) -> dict[str, torch.Tensor]:
    module = nn.LSTM(case.I, case.H, device=t["x"].device, dtype=t["x"].dtype)
    with torch.no_grad():
        for p, w in zip(module.parameters(), t["weights"], strict=True):
            p.copy_(w)
    x = t["x"].clone().requires_grad_()
    y, (h_n, c_n) = module(x)
    gradients = torch.autograd.grad([y, h_n, c_n], [x, *module.parameters()], [t["dy"], t["dh_n"], t["dc_n"]])
    results = {"y": y, "h_n": h_n, "c_n": c_n, "dx": gradients[0]}
    return results | {f"dweights[{n}]": g for n, g in enumerate(gradients[1:])}
