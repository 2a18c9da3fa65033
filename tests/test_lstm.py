"""The LSTM operation on every backend: numbers, exact promises, determinism, what is not computed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from cases import BF16, DTYPES, F16, F32, F64, LSTM_CASES, LSTMCase, device_of, moved, runs, truth
from tolerances import assert_close, relative_error
from torch import nn

import rnnattn
from rnnattn import backends
from rnnattn import functional as RF

by_id = {case.id: case for case in LSTM_CASES}
RAGGED = [case for case in LSTM_CASES if case.lengths is not None and case.B > 0]


def test_case_ids_are_unique() -> None:
    assert len(by_id) == len(LSTM_CASES)


@pytest.mark.parametrize("name, case, dtype", runs(LSTM_CASES))
def test_forward_and_backward(name: str, case: LSTMCase, dtype: torch.dtype) -> None:
    got = case.run(moved(case.tensors(dtype), device_of(name)), name)
    assert_close(got, truth(case, dtype), "lstm" if case.scale == 1 else "lstm_large", dtype)


@pytest.mark.parametrize("name, case, dtype", runs(RAGGED))
def test_padding_is_exact(name: str, case: LSTMCase, dtype: torch.dtype) -> None:
    """Zeros behind the lengths, in dx too; a row without steps returns its initial state bit for bit."""
    t = moved(case.tensors(dtype), device_of(name))
    got = moved(case.run(t, name), torch.device("cpu"))
    invalid, empty = ~case.valid(), torch.tensor(case.lengths) == 0
    assert not got["y"][invalid].any()
    assert not got["dx"][invalid].any()
    for n, s in (("h_n", "h0"), ("c_n", "c0")):
        assert torch.equal(got[n][:, empty], t[s].cpu()[:, empty])
    if case.states and "y" not in case.cotangents:
        return
    if case.states and case.layers == 1:  # ... and hands its cotangent through
        assert torch.equal(got["dh0"][:, empty], t["dh_n"].cpu()[:, empty])
        assert torch.equal(got["dc0"][:, empty], t["dc_n"].cpu()[:, empty])


@pytest.mark.parametrize("name, case, dtype", runs(LSTM_CASES[:2] + RAGGED[3:6]))
def test_two_runs_are_bit_equal(name: str, case: LSTMCase, dtype: torch.dtype) -> None:
    t = moved(case.tensors(dtype), device_of(name))
    first, second = case.run(t, name), case.run(t, name)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.parametrize("name, case, dtype", runs(LSTM_CASES))
def test_inference_gives_the_same_numbers(name: str, case: LSTMCase, dtype: torch.dtype) -> None:
    """Without gradients nothing is saved, and y, h_n and c_n stay the same."""
    t = moved(case.tensors(dtype), device_of(name))
    trained, inferred = case.run(t, name), case.run(t, name, backward=False)
    for key in ("y", "h_n", "c_n"):
        assert_close({key: inferred[key]}, {key: truth(case, dtype)[key]}, "lstm_large", dtype)
        assert relative_error(inferred[key], trained[key]) <= torch.finfo(dtype).eps * (4 if dtype in (F64, F32) else 1)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_gradcheck(backend: str) -> None:
    _need(backend)
    for case in (
        LSTMCase(2, 3, 2, 3, "states", states=True),
        LSTMCase(3, 3, 2, 3, "both directions, ragged, projection", R=2, direction="bidirectional", lengths=(2, 0, 3)),
        LSTMCase(2, 3, 2, 2, "a stack", layers=2, bias=False, lengths=(3, 1)),
    ):
        t = case.tensors(F64)

        def layer(x: Any, h0: Any, c0: Any, *weights: Any) -> Any:
            with rnnattn.use_backend(backend):
                return RF.lstm(
                    x, (h0, c0), weights, case.bias, case.layers, bidirectional=case.directions == 2,
                    lengths=t["lengths"],
                )  # fmt: skip

        inputs = [p.requires_grad_() for p in (t["x"], t["h0"], t["c0"], *t["weights"])]
        assert torch.autograd.gradcheck(layer, inputs)


# --- what need not be computed -------------------------------------------------------------------


def _need(backend: str) -> None:
    reason = backends.unavailable(backend)
    if reason is not None:
        pytest.skip(f"backend {backend}: {reason}")


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
    [(("x",), (True, False)), (("weights",), (False, True)), (("h0",), (False, False)), (("x", "weights"), (True, True))],
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
    with pytest.raises((NotImplementedError, RuntimeError), match="double backward|once_differentiable"):
        dx.square().sum().backward()


# --- the operators -------------------------------------------------------------------------------

OP_CASES = [PLAIN, by_id["B3-T4-I5-H8-R3-bidirectional-nobias-len4_0_2-states"]]


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


@pytest.mark.parametrize("case", OP_CASES, ids=lambda c: c.id)
@pytest.mark.parametrize("needs_dx, needs_dweights", [(True, True), (False, True), (True, False)])
def test_opcheck_backward(backend: str, case: LSTMCase, needs_dx: bool, needs_dweights: bool) -> None:
    t = moved(case.tensors(F32), device_of(backend))
    lengths = None if t["lengths"] is None else t["lengths"].to(device_of(backend))
    layer = (t["x"], t["h0"], t["c0"], t["weights"], lengths)
    y, _, _, gates, cells = torch.ops.rnnattn.lstm_layer(*layer, case.bias, case.direction, True, backend)
    for cotangents in ((t["dy"], t["dh_n"], t["dc_n"]), (t["dy"], None, None), (None, t["dh_n"], None)):
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


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_error_is_at_most_torchs(backend: str, dtype: torch.dtype) -> None:
    """The median error over 20 seeds is at most 1.1 times torch.nn's (1.5 in fp32), or under 4 eps."""
    if dtype not in DTYPES[backend]:
        return
    case = LSTMCase(4, 8, 12, 16, "beside torch.nn")
    device, names = device_of(backend), ("y", "c_n", "dx", "dweights[0]", "dweights[1]", "dweights[2]")
    ours: dict[str, list[float]] = {n: [] for n in names}
    theirs: dict[str, list[float]] = {n: [] for n in names}
    for seed in range(20):
        t, want = moved(case.tensors(dtype, seed), device), truth(case, dtype, seed)
        got, other = case.run(t, backend), _torch_nn(case, t)
        for n in names:
            ours[n].append(relative_error(got[n], want[n]))
            theirs[n].append(relative_error(other[n], want[n]))
    eps, factor = torch.finfo(dtype).eps, 1.5 if dtype == F32 else 1.1
    for n in names:
        mine, torchs = (torch.tensor(errors[n]).median().item() for errors in (ours, theirs))
        assert mine <= max(factor * torchs, 4 * eps), f"{n}: {mine / eps:.2f} eps, torch.nn {torchs / eps:.2f} eps"


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
