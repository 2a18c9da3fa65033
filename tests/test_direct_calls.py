"""Calls that go directly to the C++ kernels give what others give, and leave to them what is not plain."""

from __future__ import annotations

import contextlib
import copy
import pickle
from typing import Any

import pytest
import torch
from cases import BF16, F32, F64, backend_parameters
from direct_layers import H, I, arguments, each_layer, twins
from tolerances import close
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from twins import flat

import rnnattn
from rnnattn import backends

pytestmark = pytest.mark.parametrize("backend", backend_parameters("cpp"))


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@each_layer
def test_results_and_gradients_are_torchs(name: str, given: bool, T: int, taken: list[bool]) -> None:
    theirs, ours = twins(name)
    ours(*arguments(ours, T))
    for frozen in ((), ("weight_ih",), ("weight", "bias")):
        for grad in (False, True):
            for p, q in zip(theirs.named_parameters(), ours.parameters(), strict=True):
                p[1].requires_grad_(not p[0].startswith(frozen or "none")), q.requires_grad_(p[1].requires_grad)
            given_arguments = arguments(ours, T, given=given, grad=grad)
            want, got = flat(theirs(*given_arguments)), flat(ours(*given_arguments))
            close(got, want)
            assert [t.requires_grad for t in got] == [t.requires_grad for t in want]
            if not want[0].requires_grad:
                continue
            inputs = flat(given_arguments) if grad else []
            wanted = [[*inputs, *(p for p in m.parameters() if p.requires_grad)] for m in (theirs, ours)]
            for which in (slice(0, None), slice(0, 1), slice(-1, None)):  # of the outputs that have a gradient
                cotangents = [torch.randn_like(t) for t in want[which]]
                d_want, d_got = (
                    torch.autograd.grad(outputs[which], inputs, cotangents, retain_graph=True, allow_unused=True)
                    for outputs, inputs in zip((want, got), wanted, strict=True)
                )
                for w, g, p in zip(d_want, d_got, wanted[0], strict=True):
                    close(torch.zeros_like(p) if g is None else g, torch.zeros_like(p) if w is None else w)
    assert taken == [True] * 6


@pytest.mark.parametrize("dtype", [F32, BF16])
@each_layer
def test_a_direct_call_is_bit_equal_to_the_long_way(name: str, dtype: torch.dtype, taken: list[bool]) -> None:
    _, ours = twins(name, dtype)
    given_arguments = arguments(ours, grad=True)
    inputs = [*flat(given_arguments), *ours.parameters()]
    results = []
    for _ in range(2):
        got = flat(ours(*given_arguments))
        results.append([*got, *torch.autograd.grad(sum(t.float().square().sum() for t in got), inputs)])
    assert taken == [True]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@each_layer
def test_a_graph_can_be_run_twice(name: str, taken: list[bool]) -> None:
    _, ours = twins(name)
    for _ in range(2):
        loss = sum(t.square().sum() for t in flat(ours(*arguments(ours, grad=True))))
    first = torch.autograd.grad(loss, list(ours.parameters()), retain_graph=True)
    assert all(
        torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, list(ours.parameters())), strict=True)
    )
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, list(ours.parameters()))
    assert taken == [True]


@each_layer
def test_states_can_be_written_in_place(name: str, taken: list[bool]) -> None:
    """An output is the caller's, and no view; but y is kept for the backward, as torch keeps it."""
    theirs, ours = twins(name)
    given_arguments = arguments(ours, grad=True)
    ours(*given_arguments)
    results = [flat(module(*given_arguments)) for module in (theirs, ours)]
    assert not any(t._is_view() for t in results[1])
    first = 0 if "cell" in name else 1
    for h in results[1][first:]:
        h.mul_(0.5)
    losses = [sum((f * t).sum() for t in r[first:]) for f, r in zip((0.5, 1), results, strict=True)]
    close(*(torch.autograd.grad(loss, flat(given_arguments)) for loss in losses))
    assert taken == [True]


@each_layer
def test_changes_between_forward_and_backward_are_refused(name: str, taken: list[bool]) -> None:
    _, ours = twins(name)
    for _ in range(2):
        results = flat(ours(*arguments(ours)))
    with torch.no_grad():
        ours.get_parameter(next(iter(ours.state_dict()))).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        results[0].sum().backward()
    assert taken == [True]


@each_layer
def test_gradients_of_gradients_go_through_the_operator(name: str, taken: list[bool]) -> None:
    _, ours = twins(name)
    given_arguments = arguments(ours, grad=True)
    wanted, gradients = [*flat(given_arguments), *ours.parameters()], []
    for _ in range(2):
        (first, *_) = results = flat(ours(*given_arguments))
        d = torch.autograd.grad(sum(t.sum() for t in results), wanted, create_graph=True)
        second = torch.autograd.grad(sum(t.square().sum() for t in d), wanted)
        gradients.append([*(t.detach() for t in d), *second])
        assert first.grad_fn is not None
    assert taken == [True]
    close(*gradients)


@each_layer
def test_what_is_wrong_is_refused_as_before(name: str, taken: list[bool]) -> None:
    _, ours = twins(name)
    x, *hx = arguments(ours)
    wrong: list[list[Any]] = [
        [x, (None, None)],
        [x, (flat(hx)[0], None)],
        [x[..., 1:]],
        [x[None]],
        [x.to(F32), *hx],
        ["x"],
        [None],
        [x, *hx, 1, 2, 3, 4, 5],
    ]
    h = flat(hx)
    for states in (
        [h[0][..., 1:], *h[1:]],
        [h[0][..., :1, :], *h[1:]],
        [h[0].to(F32), *h[1:]],
        h * 3,
        h[:1] * (3 - len(h)),
    ):
        wrong.append([x, states[0] if len(states) == 1 else tuple(states)])

    def answer(arguments: list[Any]) -> str:
        try:
            ours(*arguments)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "right"

    before = [answer(a) for a in wrong]
    assert all(a != "right" for a in before)
    ours(x, *hx)
    ours(x, *hx)
    assert [answer(a) for a in wrong] == before
    assert True in taken


def test_what_is_not_plain_goes_the_long_way(taken: list[bool]) -> None:
    module = rnnattn.LSTM(I, H)
    x = torch.randn(3, 2, I)
    y, _ = module(x)
    assert taken == []
    module(x)
    assert taken == [True]
    taken.clear()
    for what in (x[:, :0], torch.complex(x, x).conj().imag, x.as_subclass(type("Sub", (Tensor,), {}))):
        module(what)
    with rnnattn.use_backend("reference"):
        torch.testing.assert_close(module(x)[0], y)
    with backends.recording() as calls:
        module(x)
    assert [chosen.backend for _, chosen in calls] == ["cpp"]
    assert taken and True not in taken
    assert module(x, lengths=[3, 2])[0].shape == y.shape
    module(x)
    torch.func.vmap(lambda t: t * 2)(x)
    assert torch.equal(module(x)[0], y)
    assert taken[-1]  # a transform that has ended leaves nothing behind


def test_a_tangent_is_not_lost(taken: list[bool]) -> None:
    module = rnnattn.LSTM(I, H)
    x = torch.randn(3, 2, I)
    module(x), module(x)
    prepared = module.eval().prepare_inference()
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        taken.clear()
        for run in (module, prepared):
            with contextlib.suppress(RuntimeError) if run is prepared else contextlib.nullcontext():
                assert torch.autograd.forward_ad.unpack_dual(run(dual)[0]).tangent is not None
    assert taken == [False]


def test_saved_tensor_hooks_see_what_is_saved(taken: list[bool]) -> None:
    module = rnnattn.LSTM(I, H, dtype=F64)
    x = torch.randn(3, 2, I, dtype=F64, requires_grad=True)
    (want,) = torch.autograd.grad(module(x)[0].square().sum(), x)
    packed = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = module(x)[0]
    assert taken == [False] and any(t is x for t in packed) and any(t is module.weight_hh_l0 for t in packed)
    close(torch.autograd.grad(y.square().sum(), x)[0], want)


@pytest.mark.parametrize("change", ["contiguous", "another order"])
@each_layer
def test_what_hooks_give_back_may_lie_otherwise(name: str, change: str, taken: list[bool]) -> None:
    theirs, ours = twins(name)
    given_arguments = arguments(ours, grad=True)
    ours(*given_arguments)

    def unpack(t: Tensor) -> Tensor:
        if change == "contiguous":
            return t.contiguous()
        return t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))

    gradients = []
    for module in (theirs, ours):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            y = flat(module(*given_arguments))[0]
        gradients.append(torch.autograd.grad(y.square().sum(), flat(given_arguments), allow_unused=True)[:1])
    close(*gradients)
    assert taken == [False]


@each_layer
def test_cotangents_of_other_kinds_go_through_the_operator(name: str, taken: list[bool]) -> None:
    theirs, ours = twins(name)
    given_arguments = arguments(ours, grad=True)
    ours(*given_arguments)
    want, got = (flat(module(*given_arguments))[0] for module in (theirs, ours))
    negative = torch._neg_view(torch.randn_like(want))
    assert negative.is_neg()
    close(*(torch.autograd.grad(y, given_arguments[0], negative, retain_graph=True) for y in (got, want)))
    with FakeTensorMode(allow_non_fake_inputs=True):
        (dx,) = torch.autograd.grad(got, given_arguments[0], torch.ones(want.shape, dtype=F64))
    assert isinstance(dx, FakeTensor) and dx.shape == given_arguments[0].shape
    assert taken == [True]


@each_layer
def test_no_two_gradients_share_memory(name: str, taken: list[bool]) -> None:
    _, ours = twins(name)
    for _ in range(2):  # the long way too
        y = flat(ours(*arguments(ours)))[0]
        gradients = torch.autograd.grad(y.sum(), list(ours.parameters()))
        assert len({d.untyped_storage().data_ptr() for d in gradients}) == len(gradients)
    assert taken == [True]


def test_storage_that_was_freed_is_refused(taken: list[bool]) -> None:
    def freed(*shape: int) -> Tensor:
        t = torch.randn(shape)
        t.untyped_storage().resize_(0)
        return t

    module = rnnattn.LSTM(I, H)
    x, state = torch.randn(3, 2, I, requires_grad=True), torch.randn(1, 2, H)
    with torch.no_grad():
        prepared = rnnattn.LSTM(I, H).eval().prepare_inference()
    for called in (module, prepared, module, prepared):  # the second time each goes directly
        with pytest.raises(RuntimeError, match="x: expected a tensor with data"):
            called(freed(3, 2, I))
        # Before a call goes directly, torch says so of the layer's part of the states.
        with pytest.raises(RuntimeError, match=r"h0: expected a tensor with data|storage of size 0"):
            called(x.detach(), (freed(1, 2, H), state))
        with pytest.raises(RuntimeError, match=r"c0: expected a tensor with data|storage of size 0"):
            called(x.detach(), (state, freed(1, 2, H)))
        called(x.detach())
    y = module(x)[0]
    y.detach().untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="y: expected a tensor with data"):
        y.backward(torch.ones(3, 2, H))
    module.weight_hh_l0.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="weights: expected a tensor with data"):
        module(x)


def test_a_nonlinearity_that_there_is_not_is_refused(taken: list[bool]) -> None:
    cell = rnnattn.RNNCell(I, H)
    x = torch.randn(2, I)
    cell(x), cell(x)
    for wrong in ("Tanh", None):
        cell.nonlinearity = wrong
        with pytest.raises(RuntimeError, match=f"Unknown nonlinearity: {wrong}"):
            cell(x)


@each_layer
def test_a_module_that_was_called_can_be_copied(name: str, taken: list[bool]) -> None:
    _, ours = twins(name)
    given_arguments = arguments(ours)
    for _ in range(2):
        want = flat(ours(*given_arguments))
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        taken.clear()
        assert all(torch.equal(a, b) for a, b in zip(flat(other(*given_arguments)), want, strict=True))
        assert taken == [True]
