"""Layers and cells under the transforms of torch.func: alone, in one another, mapped over samples and over members."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import F64
from small_layers import H, I, close, each_layer, twins
from torch import Tensor, nn
from torch.func import (
    functional_call,
    functionalize,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)

import rnnattn


def loss_of(module: nn.Module) -> Callable[..., Tensor]:
    return lambda parameters, x: functional_call(module, parameters, (x,))[0].square().sum()


@each_layer
def test_per_sample_gradients(name: str, own_backend: str) -> None:
    ours, _ = twins(name)
    parameters, samples = dict(ours.named_parameters()), torch.randn(3, 4, 2, I, dtype=F64)
    loss = loss_of(ours)
    got = vmap(grad(loss), (None, 0))(parameters, samples)
    for n, x in enumerate(samples):
        want = torch.autograd.grad(loss(parameters, x), list(parameters.values()))
        close([d[n] for d in got.values()], list(want))


@each_layer
def test_ensembles(name: str, own_backend: str) -> None:
    members, x = [twins(name)[0] for _ in range(3)], torch.randn(4, 2, I, dtype=F64)
    parameters, _ = stack_module_state(members)
    got = vmap(lambda p: functional_call(members[0], p, (x,))[0])(parameters)
    close(got, torch.stack([member(x)[0] for member in members]))
    with pytest.raises(AssertionError):
        close(got[0], got[1])


@each_layer
def test_vmap_over_inputs_and_lengths(name: str, own_backend: str) -> None:
    ours, _ = twins(name)
    xs, lengths = torch.randn(3, 4, 2, I, dtype=F64), torch.tensor([[4, 1], [0, 2], [3, 3]])
    got = vmap(lambda x, n: ours(x, lengths=n)[0])(xs, lengths)
    close(got, torch.stack([ours(x, lengths=n)[0] for x, n in zip(xs, lengths, strict=True)]))


@each_layer
def test_per_sample_gradients_with_lengths(name: str, own_backend: str) -> None:
    ours, _ = twins(name)
    parameters, samples = dict(ours.named_parameters()), torch.randn(3, 4, 2, I, dtype=F64)
    lengths = torch.tensor([[4, 1], [0, 2], [3, 3]])

    def loss(parameters: Any, x: Tensor, n: Tensor) -> Tensor:
        return functional_call(ours, parameters, (x,), {"lengths": n})[0].square().sum()

    got = vmap(grad(loss), (None, 0, 0))(parameters, samples, lengths)
    closed = vmap(lambda x, n: grad(lambda x: loss(parameters, x, n))(x))(samples, lengths)
    for n, x in enumerate(samples):
        inputs = x.clone().requires_grad_()
        dx, *want = torch.autograd.grad(loss(parameters, inputs, lengths[n]), [inputs, *parameters.values()])
        close([d[n] for d in got.values()], want)
        close(closed[n], dx)


@each_layer
def test_nested_grad_over_other_arguments(name: str, own_backend: str) -> None:
    """Nothing that the inner level differentiates passes through the layer."""
    results = []
    torch.manual_seed(1)
    x = torch.randn(4, 2, I, dtype=F64)
    for module in twins(name):
        parameters = {key: p.detach() for key, p in module.named_parameters()}

        def loss(s: Tensor, parameters: Any, module: nn.Module = module) -> Tensor:
            return (s * functional_call(module, parameters, (x,))[0]).square().sum()

        outer = grad(lambda p, loss=loss: grad(loss)(torch.tensor(1.3, dtype=F64), p))
        with torch.backends.mkldnn.flags(enabled=False):
            results.append(list(outer(parameters).values()))
    close(*results)


@each_layer
def test_functionalize_and_nothing_to_map(name: str, own_backend: str) -> None:
    ours, _ = twins(name)
    x = torch.randn(4, 2, I, dtype=F64)
    close(functionalize(lambda x: ours(x)[0])(x), ours(x)[0])
    y, pull = vjp(lambda x: ours(x)[0], x)
    assert vmap(pull)(torch.zeros(0, *y.shape, dtype=F64))[0].shape == (0, *x.shape)


@each_layer
def test_compiled_transforms_are_right_or_raise(name: str) -> None:
    ours, _ = twins(name)
    x = torch.randn(4, 2, I, dtype=F64)

    def gradient(x: Tensor) -> Tensor:
        return grad(lambda x: ours(x)[0].square().sum())(x)

    torch._dynamo.reset()
    try:
        got = torch.compile(gradient, backend="aot_eager")(x)
    except RuntimeError:
        return
    close(got, gradient(x))


@each_layer
def test_grad_of_torch_func_takes_the_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = twins(name)
    parameters, x = dict(ours.named_parameters()), torch.randn(4, 2, I, dtype=F64)
    want = torch.autograd.grad(loss_of(ours)(parameters, x), list(parameters.values()))
    monkeypatch.setattr("rnnattn.autograd.recurrent.recurrent_layer_forward", None)
    monkeypatch.setattr(rnnattn.backends.get("reference"), "recurrent_layer_forward", None)
    close(list(grad(loss_of(ours))(parameters, x).values()), list(want))


@each_layer
def test_jacobians_and_hessians(name: str, own_backend: str) -> None:
    ours, _ = twins(name)
    x = torch.randn(2, 2, I, dtype=F64)

    def output(x: Tensor) -> Tensor:
        return ours(x)[0]

    def loss(x: Tensor) -> Tensor:
        return ours(x)[0].pow(3).sum()

    want = torch.autograd.functional.jacobian(output, x)
    for jacobian in (
        jacrev(output)(x),
        jacfwd(output)(x),
        torch.autograd.functional.jacobian(output, x, vectorize=True),
    ):
        close(jacobian, want)
    y, tangent = jvp(output, (x,), (torch.ones_like(x),))
    close((y, tangent), (ours(x)[0].detach(), want.sum((3, 4, 5))))
    close(hessian(loss)(x), torch.autograd.functional.hessian(loss, x))
    close(grad(lambda x: grad(loss)(x).square().sum())(x), jacrev(lambda x: jacfwd(loss)(x).square().sum())(x))


@pytest.mark.parametrize("kind", [rnnattn.LSTMCell, rnnattn.GRUCell, rnnattn.RNNCell])
def test_cells(kind: Any, own_backend: str) -> None:
    cell = kind(I, H, dtype=F64)
    x = torch.randn(2, I, dtype=F64)
    for _ in range(2):  # the second time directly, where nothing looks on

        def h(x: Tensor) -> Tensor:
            states = cell(x)
            return states if isinstance(states, Tensor) else states[0]

        close(
            hessian(lambda x: h(x).pow(3).sum())(x), torch.autograd.functional.hessian(lambda x: h(x).pow(3).sum(), x)
        )
        close(vmap(h)(x[None]), h(x)[None].detach())


def test_a_prepared_module_has_no_tangents() -> None:
    prepared, x = twins("lstm")[0].eval().prepare_inference(), torch.randn(3, 2, I, dtype=F64)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"lstm: a module .* has no tangents"):
                prepared(dual)
    with torch.no_grad(), pytest.raises(RuntimeError, match="is not to be mapped; call the module"):
        vmap(lambda x: prepared(x)[0])(x[None])
