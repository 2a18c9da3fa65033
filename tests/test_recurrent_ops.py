"""The recurrent operators: what need not be computed is not, opcheck and memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from cases import F32, F64, backend_parameters, device_of, moved, truth
from recurrent_cases import MODES, RecurrentCase, each_mode
from tolerances import assert_close
from torch import Tensor

import rnnattn
from rnnattn import backends

PLAIN = {mode: RecurrentCase(3, 4, 5, 6, "plain", mode, states=True) for mode in MODES}
RAGGED = {
    mode: RecurrentCase(
        3, 4, 5, 8, "ragged", mode, R=3 if mode == "LSTM" else 0, direction="bidirectional", bias=mode != "LSTM",
        lengths=(4, 0, 2), states=True,
    )
    for mode in MODES
}  # fmt: skip
EPISODES = {
    mode: RecurrentCase(
        3, 4, 5, 6, "episodes", mode, direction="bidirectional", resets="some", to_initial=True, states=True
    )
    for mode in MODES
}
on_each = pytest.mark.parametrize("backend, mode", each_mode())
# What opcheck asks is the operators' own: a backend that is interpreted shows it with one cell.
for_opcheck = pytest.mark.parametrize(
    "backend, mode", [p for p in each_mode() if p.values[0] != "triton" or p.values[1] == "LSTM"]
)


class Spy:
    """Records what a backend is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
        adapter = backends.get(backend)
        self.saved: list[bool] = []
        self.needs: list[tuple[bool, bool]] = []
        self.cotangents: list[tuple[bool, ...]] = []
        forward, backward = adapter.recurrent_layer_forward, adapter.recurrent_layer_backward

        def spied_forward(*a: Any) -> Any:
            self.saved.append(a[-1])
            return forward(*a)

        def spied_backward(*a: Any) -> Any:
            self.cotangents.append(tuple(d is not None for d in a[:4]))
            self.needs.append(a[17:19])
            return backward(*a)

        monkeypatch.setattr(adapter, "recurrent_layer_forward", spied_forward)
        monkeypatch.setattr(adapter, "recurrent_layer_backward", spied_backward)


def run(case: RecurrentCase, backend: str, *differentiable: str) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """The inputs, of which the named ones ask for gradients, and the outputs."""
    t = moved(case.tensors(F32), device_of(backend))
    for n in differentiable:
        for p in t[n] if isinstance(t[n], list) else [t[n]]:
            p.requires_grad_()
    with rnnattn.use_backend(backend):
        return t, case.call(t["x"], [t[name] for name in case.initial_of.values()], t["weights"], t["lengths"])


def layer(case: RecurrentCase, t: dict[str, Any]) -> tuple[Any, ...]:
    """The operator's arguments up to the settings, and the settings."""
    lengths = None if t["lengths"] is None else t["lengths"].to(t["x"].device)
    inputs = t["x"], t["h0"], t.get("c0"), t["weights"], lengths, t["resets"], case.to_initial
    return inputs, (case.bias, case.direction, case.mode)


# --- what need not be computed -------------------------------------------------------------------


@on_each
def test_nothing_is_saved_without_gradients(backend: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch, backend)
    run(PLAIN[mode], backend)
    with torch.no_grad():
        run(PLAIN[mode], backend, "x", "weights")
    with torch.inference_mode():
        run(PLAIN[mode], backend, "x", "weights")
    assert spy.saved == [False, False, False]
    run(PLAIN[mode], backend, "weights")
    assert spy.saved[3:] == [True]


@on_each
def test_what_is_saved(backend: str, mode: str) -> None:
    """The sizes that the backward of every backend may count on; with save=False nothing."""
    inputs, settings = layer(PLAIN[mode], moved(PLAIN[mode].tensors(F32), device_of(backend)))
    bare = torch.ops.rnnattn.recurrent_layer(*inputs, *settings, False, backend)
    saved = torch.ops.rnnattn.recurrent_layer(*inputs, *settings, True, backend)
    assert bare[3].shape == bare[4].shape == (0,)
    assert saved[2].shape == ((1, 3, 6) if mode == "LSTM" else (0,))
    assert saved[3].shape == ((1, 4, 3, 24) if mode in ("LSTM", "GRU") else (0,))
    assert saved[4].shape == ((1, 4, 3, 6) if mode == "LSTM" else (0,))
    torch.testing.assert_close(bare[:3], saved[:3])
    inputs, settings = layer(PLAIN[mode], PLAIN[mode].tensors(F32))
    expected = torch.ops.rnnattn.recurrent_layer(*inputs, *settings, True, "reference")
    torch.testing.assert_close([s.cpu() for s in saved[3:]], list(expected[3:]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", backend_parameters("reference", "cpp"))
def test_saved_gates_are_zero_at_invalid_steps(backend: str) -> None:
    for mode in ("LSTM", "GRU"):
        case = RAGGED[mode]
        inputs, settings = layer(case, case.tensors(F32))
        gates = torch.ops.rnnattn.recurrent_layer(*inputs, *settings, True, backend)[3]
        assert not gates[:, ~case.valid()].any()
        assert gates[:, case.valid()].all()


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
@on_each
def test_only_what_is_wanted_is_computed(
    backend: str, mode: str, differentiable: tuple[str, ...], needs: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    spy, case = Spy(monkeypatch, backend), PLAIN[mode]
    t, (y, h_n, *_) = run(case, backend, *differentiable)
    torch.autograd.backward([y, h_n], [t["dy"], t["dh_n"]])
    assert spy.needs == [needs]
    assert spy.cotangents == [(True, True, False, False)]
    want = truth(dataclasses.replace(case, cotangents=("y", "h_n")), F32)
    for n in ("x", *case.initial_of.values()):
        if n in differentiable:
            assert_close({"d" + n: t[n].grad}, {"d" + n: want["d" + n]}, case.op, F32)
        else:
            assert t[n].grad is None
    for n, w in enumerate(t["weights"]):
        if "weights" in differentiable:
            assert_close({f"dweights[{n}]": w.grad}, {f"dweights[{n}]": want[f"dweights[{n}]"]}, case.op, F32)
        else:
            assert w.grad is None


@on_each
def test_one_trained_weight_among_frozen_ones(backend: str, mode: str) -> None:
    case = PLAIN[mode]
    t = moved(case.tensors(F32), device_of(backend))
    t["weights"][1].requires_grad_()
    with rnnattn.use_backend(backend):
        y, *_ = case.call(t["x"], [t[name] for name in case.initial_of.values()], t["weights"], None)
    y.backward(t["dy"])
    assert [w.grad is None for w in t["weights"]] == [True, False, True, True]
    want = truth(dataclasses.replace(case, cotangents=("y",)), F32)["dweights[1]"]
    assert_close({"dweights[1]": t["weights"][1].grad}, {"dweights[1]": want}, case.op, F32)


# --- what must be left alone ---------------------------------------------------------------------


@on_each
def test_two_backward_passes_over_one_graph(backend: str, mode: str) -> None:
    """The first must not have overwritten what was saved."""
    t, (y, *_) = run(PLAIN[mode], backend, "x", "weights")
    first = torch.autograd.grad(y, [t["x"], *t["weights"]], t["dy"], retain_graph=True)
    second = torch.autograd.grad(y, [t["x"], *t["weights"]], t["dy"])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@on_each
def test_inputs_are_not_written(backend: str, mode: str) -> None:
    t = moved(RAGGED[mode].tensors(F32), device_of(backend))
    before = {n: v.clone() for n, v in t.items() if isinstance(v, Tensor)}
    weights = [w.clone() for w in t["weights"]]
    RAGGED[mode].run(t, backend)
    assert all(torch.equal(t[n], v) for n, v in before.items())
    assert all(torch.equal(a, b) for a, b in zip(t["weights"], weights, strict=True))


@pytest.mark.parametrize("case", [PLAIN, RAGGED], ids=["plain", "ragged"])
@on_each
def test_results_are_contiguous_and_own_their_memory(backend: str, mode: str, case: dict[str, RecurrentCase]) -> None:
    t = moved(case[mode].tensors(F32), device_of(backend))
    inputs, settings = layer(case[mode], t)
    results = list(torch.ops.rnnattn.recurrent_layer(*inputs, *settings, True, backend))
    dx, dh0, dc0, dweights = torch.ops.rnnattn.recurrent_layer_backward(
        t["dy"], t["dh_n"], t.get("dc_n"), None, *inputs, results[0], *results[3:], *settings, True, True, backend
    )
    results += [dx, dh0, dc0, *dweights]
    assert all(r.is_contiguous() for r in results)
    tensors = [*results, *inputs[:2], *t["weights"]]
    memory = [r.untyped_storage().data_ptr() for r in tensors if r.numel()]
    assert len(set(memory)) == len(memory)


# --- opcheck -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [PLAIN, RAGGED], ids=["plain", "ragged"])
@pytest.mark.parametrize("grad", [False, True], ids=["plain", "grad"])
@for_opcheck
def test_opcheck(backend: str, mode: str, case: dict[str, RecurrentCase], grad: bool) -> None:
    t = moved(case[mode].tensors(F32), device_of(backend))
    inputs, settings = layer(case[mode], t)
    for p in (*(t[name] for name in ("x", *case[mode].initial_of.values())), *t["weights"]) if grad else ():
        p.requires_grad_()
    torch.library.opcheck(torch.ops.rnnattn.recurrent_layer.default, (*inputs, *settings, True, backend))
    if not grad:
        torch.library.opcheck(torch.ops.rnnattn.recurrent_layer.default, (*inputs, *settings, False, backend))


@pytest.mark.parametrize("backend, mode", each_mode("reference", "cpp"))
def test_opcheck_with_resets(backend: str, mode: str) -> None:
    t = EPISODES[mode].tensors(F32)
    inputs, settings = layer(EPISODES[mode], t)
    y, _, _, gates, cells = torch.ops.rnnattn.recurrent_layer(*inputs, *settings, True, backend)
    cotangents = [t["dy"], t["dh_n"], t.get("dc_n"), torch.randn_like(cells) if mode == "LSTM" else None]
    torch.library.opcheck(
        torch.ops.rnnattn.recurrent_layer_backward.default,
        (*cotangents, *inputs, y, gates, cells, *settings, True, True, backend),
    )
    for p in (*(t[name] for name in ("x", *EPISODES[mode].initial_of.values())), *t["weights"]):
        p.requires_grad_()
    torch.library.opcheck(torch.ops.rnnattn.recurrent_layer.default, (*inputs, *settings, True, backend))


@pytest.mark.parametrize(
    "given, needs_dx, needs_dweights",
    [(("dy", "dh_n", "dc_n"), True, True), (("dy",), False, True), (("dh_n",), True, False)],
    ids=["all", "no_dx", "no_dweights"],
)
@for_opcheck
def test_opcheck_backward(
    backend: str, mode: str, given: tuple[str, ...], needs_dx: bool, needs_dweights: bool
) -> None:
    case = (PLAIN if needs_dx and needs_dweights else RAGGED)[mode]
    t = moved(case.tensors(F32), device_of(backend))
    inputs, settings = layer(case, t)
    y, _, _, gates, cells = torch.ops.rnnattn.recurrent_layer(*inputs, *settings, True, backend)
    cotangents = [t.get(name) if name in given else None for name in ("dy", "dh_n", "dc_n", "dcells")]
    torch.library.opcheck(
        torch.ops.rnnattn.recurrent_layer_backward.default,
        (*cotangents, *inputs, y, gates, cells, *settings, needs_dx, needs_dweights, backend),
    )


def test_gradients_of_the_operator_need_save() -> None:
    case = PLAIN["GRU"]
    t = case.tensors(F64)
    t["x"].requires_grad_()
    inputs, settings = layer(case, t)
    with pytest.raises(RuntimeError, match="gradients need save=True"):
        torch.ops.rnnattn.recurrent_layer(*inputs, *settings, False, "reference")


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("backend, mode", each_mode())
def test_gates_are_overwritten_only_where_nobody_reads_them_again(backend: str, mode: str, retain: bool) -> None:
    case = RecurrentCase(3, 5, 4, 6, "plain", mode, states=True)
    t, (y, *_) = run(case, backend, "x", "weights")
    first = torch.autograd.grad(y.sum(), [t["x"], *t["weights"]], retain_graph=retain)
    if not retain:
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(y.sum(), t["x"])
        return
    for _ in range(2):
        again = torch.autograd.grad(y.sum(), [t["x"], *t["weights"]], retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
