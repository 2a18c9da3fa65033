"""Derivatives of derivatives, forward-mode, and torch.func: what no kernel computes and the equations give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import F32, F64, OWN, backend_parameters, device_of, moved, strided
from pool_cases import PoolCase
from recurrent_cases import RecurrentCase, each_mode
from torch import Tensor, nn
from torch.autograd import forward_ad
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
LAYERS = {
    "lstm": (rnnattn.LSTM, nn.LSTM, {}),
    "lstm_projected": (rnnattn.LSTM, nn.LSTM, {"proj_size": 2}),
    "lstm_stack": (rnnattn.LSTM, nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    "gru": (rnnattn.GRU, nn.GRU, {}),
    "rnn": (rnnattn.RNN, nn.RNN, {}),
}
each_layer = pytest.mark.parametrize("name", LAYERS)
I, H = 3, 4


@pytest.fixture(params=backend_parameters("reference", "cpp"))
def chosen(request: pytest.FixtureRequest) -> Iterator[str]:
    """Not torch's own, which has its derivatives from torch."""
    with rnnattn.use_backend(request.param):
        yield request.param


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


def twins(name: str) -> tuple[nn.Module, nn.Module]:
    """Ours and torch.nn's with the same parameters, in float64."""
    kind, original, settings = LAYERS[name]
    ours, theirs = kind(I, H, dtype=F64, **settings), original(I, H, dtype=F64, **settings)
    theirs.load_state_dict(ours.state_dict())
    ours(torch.zeros(1, 1, I, dtype=F64))  # what follows may go directly to the kernels
    return ours, theirs


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


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
def test_a_gradient_penalty_is_torchs(name: str, chosen: str) -> None:
    x, results = torch.randn(4, 2, I, dtype=F64), []
    for module in twins(name):
        inputs = x.clone().requires_grad_()
        with torch.backends.mkldnn.flags(enabled=False):
            (d,) = torch.autograd.grad(module(inputs)[0].square().sum(), inputs, create_graph=True)
            results.append(torch.autograd.grad(d.square().sum(), [inputs, *module.parameters()]))
    close(*results)


@each_layer
def test_mixed_derivatives(name: str, chosen: str) -> None:
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


# --- torch.func ------------------------------------------------------------------------------------


def loss_of(module: nn.Module) -> Callable[..., Tensor]:
    return lambda parameters, x: functional_call(module, parameters, (x,))[0].square().sum()


@each_layer
def test_per_sample_gradients(name: str, chosen: str) -> None:
    ours, _ = twins(name)
    parameters, samples = dict(ours.named_parameters()), torch.randn(3, 4, 2, I, dtype=F64)
    loss = loss_of(ours)
    got = vmap(grad(loss), (None, 0))(parameters, samples)
    for n, x in enumerate(samples):
        want = torch.autograd.grad(loss(parameters, x), list(parameters.values()))
        close([d[n] for d in got.values()], list(want))


@each_layer
def test_ensembles(name: str, chosen: str) -> None:
    members, x = [twins(name)[0] for _ in range(3)], torch.randn(4, 2, I, dtype=F64)
    parameters, _ = stack_module_state(members)
    got = vmap(lambda p: functional_call(members[0], p, (x,))[0])(parameters)
    close(got, torch.stack([member(x)[0] for member in members]))
    with pytest.raises(AssertionError):
        close(got[0], got[1])


@each_layer
def test_vmap_over_inputs_and_lengths(name: str, chosen: str) -> None:
    ours, _ = twins(name)
    xs, lengths = torch.randn(3, 4, 2, I, dtype=F64), torch.tensor([[4, 1], [0, 2], [3, 3]])
    got = vmap(lambda x, n: ours(x, lengths=n)[0])(xs, lengths)
    close(got, torch.stack([ours(x, lengths=n)[0] for x, n in zip(xs, lengths, strict=True)]))


@each_layer
def test_per_sample_gradients_with_lengths(name: str, chosen: str) -> None:
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
def test_nested_grad_over_other_arguments(name: str, chosen: str) -> None:
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
def test_functionalize_and_nothing_to_map(name: str, chosen: str) -> None:
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
def test_jacobians_and_hessians(name: str, chosen: str) -> None:
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
def test_cells(kind: Any, chosen: str) -> None:
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


def test_a_parametrized_module(chosen: str) -> None:
    ours, theirs = twins("gru")
    x, results = torch.randn(3, 2, I, dtype=F64), []
    for module in (ours, theirs):
        parametrizations.weight_norm(module, "weight_hh_l0")
        (first,) = torch.autograd.grad(module(x)[0].square().sum(), module.weight_ih_l0, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), list(module.parameters())))
    close(*results)


def test_a_prepared_module_has_no_tangents() -> None:
    prepared, x = twins("lstm")[0].eval().prepare_inference(), torch.randn(3, 2, I, dtype=F64)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"lstm: a module .* has no tangents"):
                prepared(dual)
    with torch.no_grad(), pytest.raises(RuntimeError, match="is not to be mapped; call the module"):
        vmap(lambda x: prepared(x)[0])(x[None])
