"""LSTMCell, GRUCell and RNNCell are drop-in: beside torch.nn's cells, from the same seed."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from cases import F64
from tolerances import close
from torch import Tensor, nn

import rnnattn
from rnnattn import functional as RF

pytestmark = pytest.mark.usefixtures("chosen")
I, H = 5, 6
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("LSTMCell", {}),
    "gru": ("GRUCell", {}),
    "rnn": ("RNNCell", {"nonlinearity": "tanh"}),
    "relu": ("RNNCell", {"nonlinearity": "relu"}),
}
cells = pytest.mark.parametrize("name", CELLS)


def twins(name: str, **options: Any) -> tuple[Any, Any]:
    """torch's and ours with the same float64 parameters, both drawn from the same seed."""
    kind, own = CELLS[name]
    modules = []
    for package in (nn, rnnattn):
        torch.manual_seed(1)
        modules.append(getattr(package, kind)(I, H, dtype=F64, **own, **options))
    return modules[0], modules[1]


def each(state: Any) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else list(state)


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("batch", [(3,), (), (0,)], ids=["batched", "unbatched", "empty"])
@pytest.mark.parametrize("bias", [True, False])
@cells
def test_forward_and_backward(name: str, batch: tuple[int, ...], bias: bool, given: bool, chosen: str) -> None:
    theirs, ours = twins(name, bias=bias)
    x = torch.randn(*batch, I, dtype=F64, requires_grad=True)
    hx = [torch.randn(*batch, H, dtype=F64, requires_grad=True) for _ in range(2 if name == "lstm" else 1)]
    arguments = (x, *([(hx[0], hx[1]) if name == "lstm" else hx[0]] if given else []))
    if chosen == "torch" and batch == (0,):
        with pytest.raises(rnnattn.BackendError, match="empty batch"):
            ours(*arguments)
        return
    want, got = theirs(*arguments), ours(*arguments)
    close(got, want)
    cotangents = [torch.randn_like(h) for h in each(want)]
    inputs = [x, *(hx if given else [])]
    close(
        torch.autograd.grad(each(got), [*inputs, *ours.parameters()], cotangents),
        torch.autograd.grad(each(want), [*inputs, *theirs.parameters()], cotangents),
    )


@pytest.mark.parametrize("missing", ["bias_ih", "bias_hh"])
@cells
def test_one_bias_alone(name: str, missing: str) -> None:
    theirs, ours = twins(name)
    for cell in (theirs, ours):
        setattr(cell, missing, None)
    x = torch.randn(3, I, dtype=F64)
    want, got = each(theirs(x)), each(ours(x))
    close(got, want)
    cotangents = [torch.randn_like(h) for h in want]
    close(
        torch.autograd.grad(got, list(ours.parameters()), cotangents),
        torch.autograd.grad(want, list(theirs.parameters()), cotangents),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_cell_states_of_another_dtype(dtype: torch.dtype) -> None:
    theirs, ours = twins("lstm")
    x, h, c = torch.randn(3, I, dtype=F64), torch.randn(3, H, dtype=F64), torch.randn(3, H).to(dtype)
    close(ours(x, (h, c)), theirs(x, (h, c)))


def test_wider_cell_states_are_not_rounded() -> None:
    """The results are float64, as torch's are, and come of products in float64."""
    exact, ours = twins("lstm")
    ours = ours.float()
    exact.load_state_dict(ours.state_dict())
    x, h, c = torch.randn(3, I), torch.randn(3, H), torch.randn(3, H, dtype=F64)
    close(ours(x, (h, c)), exact(x.double(), (h.double(), c)))


def test_states_in_one_tensor_of_an_unbatched_cell() -> None:
    theirs, ours = twins("lstm")
    x, states = torch.randn(I, dtype=F64), torch.randn(2, H, dtype=F64)
    close(ours(x, states), theirs(x, states))


@cells
def test_states_can_be_detached_in_place(name: str) -> None:
    """As truncated backpropagation through time does; in the first call and in later ones."""
    _, ours = twins(name)
    x, hx = torch.randn(3, I, dtype=F64), None
    for _ in range(3):
        states = each(ours(x, hx))
        assert all(state.requires_grad for state in states)
        for state in states:
            state.detach_()
        hx = tuple(states) if name == "lstm" else states[0]


@cells
def test_sparse_input(name: str) -> None:
    theirs, ours = twins(name)
    x = torch.eye(I, dtype=F64)[:3].to_sparse()
    close(ours(x), theirs(x))


@pytest.mark.parametrize("bias", [True, False])
@cells
def test_parameters_repr_and_state_dict(name: str, bias: bool) -> None:
    theirs, ours = twins(name, bias=bias)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))
    kind, options = CELLS[name]
    fresh = getattr(rnnattn, kind)(I, H, bias, *options.values(), None, F64)
    assert repr(fresh) == repr(theirs)
    fresh.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, I, dtype=F64)
    close(fresh(x), theirs(x))


@cells
def test_copies(name: str) -> None:
    _, module = twins(name)
    x = torch.randn(2, I, dtype=F64)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is type(module)
        assert all(torch.equal(a, b) for a, b in zip(each(other(x)), each(module(x)), strict=True))


@cells
def test_a_cell_is_one_step_of_the_layer(name: str) -> None:
    """Unrolled by the user, with the layer's parameters."""
    kind, options = CELLS[name]
    _, cell = twins(name)
    layer = getattr(rnnattn, kind.removesuffix("Cell"))(I, H, dtype=F64, **options)
    layer.load_state_dict({f"{key}_l0": value for key, value in cell.state_dict().items()}, strict=True)
    x, state, outputs = torch.randn(4, 3, I, dtype=F64), None, []
    for x_t in x:
        state = cell(x_t, state)
        outputs.append(each(state)[0])
    y, finals = layer(x)
    close(torch.stack(outputs), y)
    close([s[None] for s in each(state)], each(finals))


@cells
def test_a_call_like_the_last_one_is_right_and_others_are_checked(name: str) -> None:
    theirs, ours = twins(name)
    x, state = (
        torch.randn(3, I, dtype=F64),
        tuple(torch.randn(3, H, dtype=F64) for _ in range(2 if name == "lstm" else 1)),
    )
    hx = state if name == "lstm" else state[0]
    for _ in range(3):
        close(ours(x, hx), theirs(x, hx))
    with torch.no_grad():
        for cell in (theirs, ours):
            cell.weight_hh.mul_(0.5)
    close(ours(x, hx), theirs(x, hx))
    close(ours(x), theirs(x))
    close(ours(x[:2]), theirs(x[:2]))
    close(ours(x[0]), theirs(x[0]))
    for wrong in (x[:, 1:], x[None]):
        with pytest.raises((RuntimeError, ValueError)):
            ours(wrong, hx)
    with pytest.raises((RuntimeError, ValueError)):
        ours(x[:2], hx)
    with pytest.raises((RuntimeError, ValueError)):
        ours(x.float(), hx)
    with torch.no_grad():
        close(ours(x, hx), theirs(x, hx))
    (dx,) = torch.autograd.grad(each(ours(x.requires_grad_(), hx))[0].sum(), x)
    (want,) = torch.autograd.grad(each(theirs(x, hx))[0].sum(), x)
    close(dx, want)
    if name == "relu":
        ours.nonlinearity = theirs.nonlinearity = "tanh"
        close(ours(x, hx), theirs(x, hx))


def test_functional_cells_are_torchs() -> None:
    x, h, c = (torch.randn(3, n, dtype=F64) for n in (I, H, H))
    for G, ours, theirs, state in (
        (4, RF.lstm_cell, torch.lstm_cell, (h, c)),
        (3, RF.gru_cell, torch.gru_cell, h),
        (1, RF.rnn_cell, torch.rnn_tanh_cell, h),
        (1, lambda *a: RF.rnn_cell(*a, nonlinearity="relu"), torch.rnn_relu_cell, h),
    ):
        weights = [torch.randn(s, dtype=F64) for s in ((G * H, I), (G * H, H), (G * H,), (G * H,))]
        close(ours(x, state, *weights), theirs(x, state, *weights))
        close(ours(x, state, *weights[:2]), theirs(x, state, *weights[:2]))
