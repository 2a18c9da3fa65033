"""Gradients of gradients, and forward mode, by autograd: what no kernel computes and the equations give.

The transforms of torch.func are in test_torch_func.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import F32, F64, OWN, backend_parameters, device_of, moved, strided
from pool_cases import PoolCase
from recurrent_cases import RecurrentCase, each_mode
from small_layers import LAYERS, H, I, close, each_layer, twins
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.utils import parametrizations

import rnnattn

KINDS = {
    "states": {"states": True},
    "both directions, ragged": {"direction": "bidirectional", "lengths": (3, 0, 2), "states": True, "bias": False},
    "stack": {"layers": 2, "lengths": (3, 1, 2), "states": True},
    "episodes": {"direction": "bidirectional", "resets": "some", "states": True},
    "episodes from hx": {"resets": "some", "to_initial": True, "lengths": (3, 0, 2), "states": True},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def a_case(kind: str, mode: str) -> RecurrentCase:
    return RecurrentCase(3, 3, 2, 3, kind, mode, R=2 if mode == "LSTM" and "both" in kind else 0, **KINDS[kind])


def checked(kind: str, mode: str, backend: str) -> tuple[Callable[..., Any], list[Tensor]]:
    """The operation of a case over its differentiable inputs, and these."""
    case = a_case(kind, mode)
    t, states = case.tensors(F64), len(case.initial_of)

    def layers(x: Tensor, *rest: Tensor) -> Any:
        with rnnattn.use_backend(backend):
            return case.call(x, rest[:states], rest[states:], t["lengths"], t["resets"])

    inputs = [t["x"], *(t[name] for name in case.initial_of.values()), *t["weights"]]
    return layers, [p.requires_grad_() for p in inputs]


# --- checked against differences -------------------------------------------------------------------


@pytest.mark.parametrize("backend, mode", each_mode("reference", "cpp"))
@kinds
def test_double_backward(backend: str, mode: str, kind: str) -> None:
    layers, inputs = checked(kind, mode, backend)
    assert torch.autograd.gradgradcheck(layers, inputs, fast_mode=True)


@pytest.mark.parametrize("backend, mode", each_mode("reference", "cpp"))
@kinds
def test_forward_mode(backend: str, mode: str, kind: str) -> None:
    layers, inputs = checked(kind, mode, backend)
    options: dict[str, Any] = {"fast_mode": True, "check_forward_ad": True, "check_backward_ad": False}
    assert torch.autograd.gradcheck(layers, inputs, **options)


@pytest.mark.parametrize("backend, mode", each_mode("reference", "cpp"))
def test_gradients_of_many_cotangents_at_once(backend: str, mode: str) -> None:
    layers, inputs = checked("states", mode, backend)
    assert torch.autograd.gradcheck(layers, inputs, check_batched_grad=True)


@pytest.mark.parametrize("A", [0, 3], ids=["linear", "additive"])
@pytest.mark.parametrize("backend", backend_parameters("reference", "cpp"))
def test_pooling(backend: str, A: int) -> None:
    case = PoolCase(3, 4, 3, A, "a row that keeps nothing", lengths=(4, 0, 2))
    t = case.tensors(F64, poisoned=False)
    names = [name for name in ("x", "v", "w", "b") if t[name] is not None]

    def pool(*inputs: Tensor) -> Any:
        with rnnattn.use_backend(backend):
            return rnnattn.functional.attention_pool(
                **{"input" if name == "x" else name: p for name, p in zip(names, inputs, strict=True)},
                lengths=t["lengths"], need_weights=True,
            )  # fmt: skip

    inputs = [t[name].requires_grad_() for name in names]
    assert torch.autograd.gradgradcheck(pool, inputs)
    assert torch.autograd.gradcheck(pool, inputs, check_forward_ad=True, check_batched_grad=True)
    x, *parameters = (p.detach() for p in inputs)

    def loss(x: Tensor) -> Tensor:
        return pool(x, *parameters)[0].square().sum()

    close(hessian(loss)(x), torch.autograd.functional.hessian(loss, x))
    close(grad(lambda x: grad(loss)(x).square().sum())(x), jacrev(lambda x: jacfwd(loss)(x).square().sum())(x))
    close(vmap(loss)(torch.stack([x, 2 * x])), torch.stack([loss(x), loss(2 * x)]))


# --- every backend, and the modules, beside others -------------------------------------------------


@pytest.mark.parametrize("backend, mode", each_mode(*OWN))
def test_second_gradients_on_every_backend(backend: str, mode: str) -> None:
    """The gradients come from its kernels, those of the gradients from the equations."""
    case = RecurrentCase(2, 3, 2, 3, "a penalty on gradients", mode, lengths=(3, 2), states=True, apart=True)

    def second(t: dict[str, Any], backend: str) -> list[Tensor]:
        initials = [t[name].detach().requires_grad_() for name in case.initial_of.values()]
        x, weights = t["x"].detach().requires_grad_(), [w.detach().requires_grad_() for w in t["weights"]]
        with rnnattn.use_backend(backend):
            outputs = case.call(x, initials, weights, t["lengths"])
        cotangents = [t["d" + name].detach().requires_grad_() for name in ("y", *case.initial_of)]
        leaves = [x, *initials, *weights]
        first = torch.autograd.grad(outputs, leaves, cotangents, create_graph=True)
        return list(torch.autograd.grad(sum(d.square().sum() for d in first), [*leaves, *cotangents]))

    t = case.tensors(F32)
    got, want = second(moved(t, device_of(backend)), backend), second(moved(t, F64), "reference")
    for mine, truth in zip(got, want, strict=True):
        torch.testing.assert_close(mine.double().cpu(), truth, rtol=1e-4, atol=1e-4)


@each_layer
def test_a_gradient_penalty_is_torchs(name: str, own_backend: str) -> None:
    x, results = torch.randn(4, 2, I, dtype=F64), []
    for module in twins(name):
        inputs = x.clone().requires_grad_()
        with torch.backends.mkldnn.flags(enabled=False):
            (d,) = torch.autograd.grad(module(inputs)[0].square().sum(), inputs, create_graph=True)
            results.append(torch.autograd.grad(d.square().sum(), [inputs, *module.parameters()]))
    close(*results)


@each_layer
def test_mixed_derivatives(name: str, own_backend: str) -> None:
    """A tangent of the cotangent alone, in every way to give it one; and a second pass under saved-tensor hooks."""
    x, w = torch.randn(4, 2, I, dtype=F64), torch.randn(LAYERS[name][2].get("proj_size", H), dtype=F64)
    w = w.repeat(2) if LAYERS[name][2].get("bidirectional") else w

    def tangent_of_w(module: nn.Module, create_graph: bool) -> Tensor:
        inputs = x.clone().requires_grad_()
        y = module(inputs)[0]
        with forward_ad.dual_level():
            loss = (y @ forward_ad.make_dual(w, torch.ones_like(w))).square().sum()
            (d,) = torch.autograd.grad(loss, inputs, create_graph=create_graph)
            return forward_ad.unpack_dual(d).tangent.detach()

    def tangent_of_x(module: nn.Module) -> Tensor:
        with forward_ad.dual_level():
            d = grad(lambda x: module(x)[0].square().sum())(forward_ad.make_dual(x, torch.ones_like(x)))
            return forward_ad.unpack_dual(d).tangent.detach()

    def of_pull(module: nn.Module) -> Tensor:
        y, pull = vjp(lambda x: module(x)[0], x)
        return jvp(lambda d: pull(d)[0], (y.detach(),), (torch.ones_like(y),))[1].detach()

    def hooked(module: nn.Module) -> Tensor:
        inputs = x.clone().requires_grad_()
        (d,) = torch.autograd.grad(module(inputs)[0].square().sum(), inputs, create_graph=True)
        with torch.autograd.graph.save_on_cpu():
            loss = d.square().sum()
        return torch.autograd.grad(loss, inputs)[0]

    results = []
    for module in twins(name):
        with torch.backends.mkldnn.flags(enabled=False):
            both = [tangent_of_w(module, create_graph) for create_graph in (False, True)]
            results.append([*both, tangent_of_x(module), of_pull(module), hooked(module)])
    close(*results)


@each_layer
def test_a_third_derivative(name: str) -> None:
    x, results = torch.randn(2, 1, I, dtype=F64), []
    for module in twins(name):
        value = inputs = x.clone().requires_grad_()
        value = module(inputs)[0].sum()
        for _ in range(3):
            (d,) = torch.autograd.grad(value, inputs, create_graph=True)
            value = d.pow(3).sum()
        results.append(d.detach())
    close(*results)


def test_one_tensor_as_two_inputs() -> None:
    """h0 is c0, and b_ih is b_hh: a gradient is of both uses together."""
    ours, theirs = twins("lstm")
    state = torch.randn(1, 2, H, dtype=F64)
    x, results = torch.randn(3, 2, I, dtype=F64), []
    for module in (ours, theirs):
        module.bias_hh_l0 = module.bias_ih_l0
        both = state.clone().requires_grad_()
        wanted = [both, module.bias_ih_l0]
        first = torch.autograd.grad(module(x, (both, both))[0].square().sum(), wanted, create_graph=True)
        results.append(torch.autograd.grad(sum(d.square().sum() for d in first), wanted))
    close(*results)


def test_inputs_of_any_layout() -> None:
    case = RecurrentCase(3, 3, 2, 3, "gaps between elements", "GRU", states=True)
    t = case.tensors(F64)
    x, x_strided = t["x"], strided(t["x"])

    def penalty(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        y = case.call(x, [t["h0"]], t["weights"], None)[0]
        (d,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(d.square().sum(), x)[0]

    close(penalty(x_strided), penalty(x))


def test_a_parametrized_module(own_backend: str) -> None:
    ours, theirs = twins("gru")
    x, results = torch.randn(3, 2, I, dtype=F64), []
    for module in (ours, theirs):
        parametrizations.weight_norm(module, "weight_hh_l0")
        (first,) = torch.autograd.grad(module(x)[0].square().sum(), module.weight_ih_l0, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), list(module.parameters())))
    close(*results)
