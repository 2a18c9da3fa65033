"""Layers on each other as one operation: the reference's equations, every derivative, and when a module takes it.

The sequence kernels run the stacks of the recurrent cases in test_sequence_kernels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import F32, F64
from tolerances import assert_close
from torch import Tensor, nn

import rnnattn
from rnnattn.backends import Call, sequence_choice, triton
from rnnattn.reference import STACK, recurrent_layer_backward, recurrent_layer_forward

T, B, I, H, L = 5, 4, 3, 6, 3
MODULES = {
    "LSTM": (nn.LSTM, {}),
    "GRU": (nn.GRU, {}),
    "RNN_TANH": (nn.RNN, {}),
    "RNN_RELU": (nn.RNN, {"nonlinearity": "relu"}),
}


def stack(mode: str, dtype: torch.dtype = F64, **settings: Any) -> nn.RNNBase:
    module, more = MODULES[mode]
    torch.manual_seed(0)
    return module(I, H, L, **more, **settings).to(dtype)


def states(mode: str, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor | None]:
    draw = torch.Generator().manual_seed(1)
    h0, c0 = torch.randn(2, L, B, H, generator=draw, dtype=F64).to(dtype)
    return h0, c0 if mode == "LSTM" else None


@pytest.mark.parametrize("mode", MODULES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_the_reference_is_torchs_stack(mode: str, bias: bool) -> None:
    theirs = stack(mode, bias=bias)
    x, (h0, c0) = torch.randn(T, B, I, dtype=F64), states(mode)
    y, h_n, c_n, _, _ = recurrent_layer_forward(
        x, h0, c0, list(theirs.parameters()), None, None, False, bias, STACK, mode
    )
    expected, finals = theirs(x, h0 if c0 is None else (h0, c0))
    torch.testing.assert_close(y[..., -H:], expected)
    torch.testing.assert_close(h_n, finals if c0 is None else finals[0])
    if c0 is not None:
        torch.testing.assert_close(c_n, finals[1])


@pytest.mark.parametrize("mode", MODULES)
@pytest.mark.parametrize("ragged", [False, True], ids=["plain", "ragged"])
def test_the_references_gradients(mode: str, ragged: bool) -> None:
    """By the explicit equations as by autograd; every output has a cotangent, the layers' y too."""
    weights = [w.detach().requires_grad_() for w in stack(mode).parameters()]
    x, (h0, c0) = torch.randn(T, B, I, dtype=F64, requires_grad=True), states(mode)
    inputs = [x, h0.requires_grad_(), *([] if c0 is None else [c0.requires_grad_()]), *weights]
    settings = torch.tensor([5, 0, 3, 1]) if ragged else None, torch.rand(T, B) > 0.6 if ragged else None, True
    outputs = recurrent_layer_forward(x, h0, c0, weights, *settings, True, STACK, mode)
    results = [t for t in outputs[:3] if t.numel()]
    cotangents = [torch.randn_like(t) for t in results]
    expected = torch.autograd.grad(results, inputs, cotangents)
    y, _, _, gates, cells = (t.detach() for t in outputs)
    dy, dh_n, dc_n = [*cotangents, None][:3]
    with torch.no_grad():
        dx, dh0, dc0, dweights = recurrent_layer_backward(
            dy, dh_n, dc_n, None, x, h0, c0, weights, *settings, y, gates, cells, True, STACK, mode
        )
    found = [dx, dh0, *([] if c0 is None else [dc0])]
    torch.testing.assert_close(found, list(expected[: len(found)]))
    of_weights = [d for n, d in enumerate(expected[len(found) :]) if mode == "GRU" or n % 4 != 3]  # b_hh's is b_ih's
    torch.testing.assert_close(dweights, of_weights)


@pytest.fixture
def as_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Stacks on backend triton are one operation, though nothing here runs layers at the same time; yields the
    directions of the layers that it ran."""

    ran: list[str] = []
    forward = triton._layer_forward

    def recording(*arguments: Any) -> Any:
        ran.append(arguments[8])
        return forward(*arguments)

    monkeypatch.setattr(sequence_choice, "stacks", sequence_choice.may_stack)
    monkeypatch.setattr(triton, "_layer_forward", recording)
    with rnnattn.use_backend("triton"):
        yield ran


def ours(mode: str, **settings: Any) -> nn.RNNBase:
    return rnnattn.swap(stack(mode, F32, **settings)).model


@pytest.mark.parametrize("mode", MODULES)
def test_where_layers_cannot_run_together_one_follows_the_other(mode: str, as_one: list[str]) -> None:
    module, exact = ours(mode), stack(mode)
    x = torch.randn(T, B, I, requires_grad=True)
    y, _ = module(x)
    assert as_one == [STACK, "forward", "forward", "forward"]
    exact_x = x.detach().double().requires_grad_()
    expected, dy = exact(exact_x)[0], torch.randn_like(y)
    inputs, exact_inputs = [x, *module.parameters()], [exact_x, *exact.parameters()]
    found = {"y": y, **_named(torch.autograd.grad(y, inputs, dy))}
    truth = {"y": expected, **_named(torch.autograd.grad(expected, exact_inputs, dy.double()))}
    assert_close(found, truth, mode.split("_")[0].lower(), F32, "triton")


def _named(gradients: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {f"d{n}": gradient for n, gradient in enumerate(gradients)}


@pytest.mark.parametrize("changes", ["dropout", "bidirectional", "one layer", "in chunks", "projection"])
def test_other_modules_go_layer_by_layer(changes: str, as_one: list[str]) -> None:
    settings: dict[str, Any] = {
        "dropout": {"dropout": 0.5}, "bidirectional": {"bidirectional": True}, "projection": {"proj_size": 2},
        "in chunks": {"recompute": "chunk"},
    }.get(changes, {})  # fmt: skip
    module = rnnattn.LSTM(I, H, 1 if changes == "one layer" else 2, **settings)
    module(torch.randn(T, B, I))
    assert as_one and STACK not in as_one


def test_dropout_is_none_in_evaluation(as_one: list[str]) -> None:
    rnnattn.LSTM(I, H, 2, dropout=0.5).eval()(torch.randn(T, B, I))
    assert as_one[0] == STACK


def test_results_are_the_callers_own(as_one: list[str]) -> None:
    y, (h_n, c_n) = ours("LSTM")(torch.randn(T, B, I))
    assert y.is_contiguous() and y.shape == (T, B, H) and h_n.shape == c_n.shape == (L, B, H)


def test_cells_are_the_last_layers(as_one: list[str]) -> None:
    module, x = ours("LSTM"), torch.randn(T, B, I)
    _, (_, c_n), cells = module(x, return_cells=True)
    assert as_one[0] == STACK and cells.shape == (T, B, H)
    torch.testing.assert_close(cells[-1], c_n[-1])


def test_second_derivatives(as_one: list[str]) -> None:
    module, exact = ours("LSTM"), stack("LSTM")
    x = torch.randn(T, B, I, requires_grad=True)
    exact_x = x.detach().double().requires_grad_()

    def penalty(module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        (dx,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [x, *module.parameters()])

    for found, expected in zip(penalty(module, x), penalty(exact, exact_x), strict=True):
        assert (found - expected).norm() < 1e-5 * expected.norm()


def test_mapped_gradients(as_one: list[str]) -> None:
    """Per-sample gradients, where torch.func looks on, are those of single calls."""
    module = ours("GRU")
    weights = {name: p.detach() for name, p in module.named_parameters()}
    x = torch.randn(3, T, 1, I)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, weights, (x,))[0].square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    for n in range(3):
        module.zero_grad()
        module(x[n])[0].square().sum().backward()
        for name, p in module.named_parameters():
            torch.testing.assert_close(found[name][n], p.grad, rtol=1e-4, atol=1e-5)


def test_a_compiled_stack_is_one_operator(as_one: list[str]) -> None:
    module, seen = ours("LSTM"), []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append([node.target for node in graph.graph.nodes if "recurrent_layer" in str(node.target)])
        return graph.forward

    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    for steps, rows in ((T, B), (7, 2), (9, 3)):
        x = torch.randn(steps, rows, I)
        torch.testing.assert_close(compiled(x)[0], module(x)[0])
    assert [len(nodes) for nodes in seen] == [1]


def test_frozen_layers_below_are_left_out_of_the_backward(as_one: list[str]) -> None:
    module = ours("GRU")
    for name, p in module.named_parameters():
        p.requires_grad_(name.endswith(f"l{L - 1}"))
    module(torch.randn(T, B, I))
    assert as_one == ["forward"] * L


@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
def test_a_stack_of_one_layer_is_a_layer(mode: str) -> None:
    weights = list(stack(mode).parameters())[:4]
    h0, c0 = (None if state is None else state[:1] for state in states(mode))
    x = torch.randn(T, B, I, dtype=F64)
    found, expected = (
        recurrent_layer_forward(x, h0, c0, weights, None, None, False, True, direction, mode)
        for direction in (STACK, "forward")
    )
    torch.testing.assert_close(found, expected)


def test_a_compiler_takes_the_planners_word_for_a_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    """It need not, and could not, see through what a plan is made of."""

    def planned(call: Call, as_one: bool) -> bool:
        with open(os.devnull):  # a graph has no such thing
            return as_one

    def stacks(call: Call) -> bool:
        return sequence_choice.could_run_as_one(call.op, call.dtype, call.hidden, call.layers, call.grad)

    monkeypatch.setattr(sequence_choice, "_engine_runs", planned)
    monkeypatch.setattr(sequence_choice, "stacks", stacks)
    module, x, seen = ours("GRU"), torch.randn(T, B, I), []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append([node.args[8] for node in graph.graph.nodes if "recurrent_layer" in str(node.target)])
        return graph.forward

    with rnnattn.use_backend("triton"), torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
        torch.testing.assert_close(compiled(x)[0], module(x)[0])
    assert seen == [[STACK]]


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN_TANH"])
def test_the_operator(mode: str, backend: str) -> None:
    weights = [w.detach().float().requires_grad_() for w in stack(mode).parameters()]
    h0, c0 = states(mode, F32)
    lengths = torch.tensor([5, 0, 3, 1])
    arguments = torch.randn(T, B, I, requires_grad=True), h0, c0, weights, lengths, None, False, True, STACK, mode, True
    torch.library.opcheck(torch.ops.rnnattn.recurrent_layer.default, (*arguments, backend))
