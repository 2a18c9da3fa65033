"""LSTM, GRU and RNN are drop-in: beside torch.nn's modules of the same name, from the same seed."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from cases import F64
from tolerances import close
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import rnnattn

pytestmark = pytest.mark.usefixtures("chosen")
I, H = 5, 6
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stack": {"num_layers": 3},
    "no bias": {"bias": False},
    "batch first": {"batch_first": True},
    "bidirectional": {"bidirectional": True},
    "dropout": {"num_layers": 2, "dropout": 0.4},
    "all": {"num_layers": 2, "bias": False, "batch_first": True, "dropout": 0.25, "bidirectional": True},
}
ROWS = [(kind, name, options) for kind in ("LSTM", "GRU", "RNN") for name, options in OPTIONS.items()]
ROWS += [
    ("LSTM", "projection", {"proj_size": 3}),
    ("LSTM", "all, projection", OPTIONS["all"] | {"proj_size": 2}),
    ("RNN", "relu", {"nonlinearity": "relu"}),
    ("RNN", "all, relu", OPTIONS["all"] | {"nonlinearity": "relu"}),
]
kinds = pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
rows = pytest.mark.parametrize("kind, options", [pytest.param(k, o, id=f"{k.lower()}-{n}") for k, n, o in ROWS])


def twins(kind: str, **options: Any) -> tuple[Any, Any]:
    """torch's and ours with the same float64 parameters, both drawn from the same seed."""
    torch.manual_seed(1)
    theirs = getattr(nn, kind)(I, H, dtype=F64, **options)
    torch.manual_seed(1)
    return theirs, getattr(rnnattn, kind)(I, H, dtype=F64, **options)


def states(module: nn.RNNBase, *B: int) -> Any:
    """hx as the module takes it, with gradients."""
    layers = module.num_layers * (2 if module.bidirectional else 1)
    h = torch.randn(layers, *B, module.proj_size or H, dtype=F64, requires_grad=True)
    return (h, torch.randn(layers, *B, H, dtype=F64, requires_grad=True)) if module.mode == "LSTM" else h


def each(hx: Any) -> list[Tensor]:
    """The tensors of a state."""
    return [] if hx is None else [hx] if isinstance(hx, Tensor) else list(hx)


def gradients(outputs: Any, module: nn.Module, *inputs: Tensor) -> tuple[Tensor, ...]:
    """With cotangents that depend on the shapes alone, so that two modules get the same."""
    flat = [outputs[0].data if isinstance(outputs[0], PackedSequence) else outputs[0], *each(outputs[1])]
    draw = torch.Generator().manual_seed(7)
    cotangents = [torch.randn(value.shape, generator=draw, dtype=F64) for value in flat]
    return torch.autograd.grad(flat, [*inputs, *module.parameters()], cotangents, retain_graph=True)


# --- what they are ---------------------------------------------------------------------------------


@rows
def test_same_parameters_from_the_same_seed(kind: str, options: dict[str, Any]) -> None:
    theirs, ours = twins(kind, **options)
    want, got = theirs.state_dict(), ours.state_dict()
    assert list(got) == list(want)
    assert all(torch.equal(got[key], want[key]) for key in want)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert repr(ours) == repr(theirs)
    assert ours.mode == theirs.mode and getattr(ours, "nonlinearity", 0) == getattr(theirs, "nonlinearity", 0)


@rows
def test_state_dict_goes_both_ways(kind: str, options: dict[str, Any]) -> None:
    theirs, ours = getattr(nn, kind)(I, H, **options).eval(), getattr(rnnattn, kind)(I, H, **options).eval()
    x = torch.randn(3, 4, I)
    assert not torch.equal(theirs(x)[0], ours(x)[0])
    ours.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    fresh = getattr(nn, kind)(I, H, **options).eval()
    fresh.load_state_dict(ours.state_dict(), strict=True)
    assert torch.equal(fresh(x)[0], theirs(x)[0])
    assert ours.all_weights[0][0] is ours.weight_ih_l0


POSITIONAL: dict[str, tuple[Any, ...]] = {
    "LSTM": (I, H, 2, False, True, 0.5, True, 3, "cpu", F64),
    "GRU": (I, H, 2, False, True, 0.5, True, 0, "cpu", F64),
    "RNN": (I, H, 2, "relu", False, True, 0.5, True, 0, "cpu", F64),
}


@kinds
def test_arguments_are_positional_as_torchs(kind: str) -> None:
    arguments, theirs, ours = POSITIONAL[kind], getattr(nn, kind), getattr(rnnattn, kind)
    assert repr(ours(*arguments)) == repr(theirs(*arguments))
    assert ours(*arguments).mode == theirs(*arguments).mode
    assert ours(*arguments).weight_ih_l0.dtype == F64
    assert repr(ours(input_size=I, hidden_size=H)) == repr(theirs(I, H))
    assert ours(I, H, device="meta").weight_ih_l0.is_meta


@pytest.mark.parametrize("way", ["pickle", "deepcopy", "torch.save"])
@kinds
def test_copies(kind: str, way: str) -> None:
    _, module = twins(kind, num_layers=2, bidirectional=True)
    if way == "pickle":
        other = pickle.loads(pickle.dumps(module))
    elif way == "deepcopy":
        other = copy.deepcopy(module)
    else:
        torch.save(module, file := io.BytesIO())
        other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    x = torch.randn(3, 2, I, dtype=F64)
    assert type(other) is getattr(rnnattn, kind)
    assert all(a is not b and torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))
    before = module(x)[0]
    assert torch.equal(other(x)[0], before)
    with torch.no_grad():
        other.weight_hh_l0.zero_()
    assert torch.equal(module(x)[0], before)
    assert not torch.equal(other(x)[0], before)


# --- what they compute -----------------------------------------------------------------------------


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("batched", [True, False], ids=["3d", "2d"])
@rows
def test_forward_and_backward(kind: str, options: dict[str, Any], batched: bool, given: bool) -> None:
    theirs, ours = twins(kind, **(options | {"dropout": 0.0}))
    x = torch.randn(*((4, 3, I) if batched else (4, I)), dtype=F64, requires_grad=True)
    B = (x.shape[0 if ours.batch_first else 1],) if batched else ()
    hx = states(theirs, *B) if given else None
    want, got = theirs(x, hx), ours(x, hx)
    close(got, want)
    close(gradients(got, ours, x, *each(hx)), gradients(want, theirs, x, *each(hx)))


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("sorted_", [True, False], ids=["sorted", "unsorted"])
@rows
def test_packed(kind: str, options: dict[str, Any], sorted_: bool, given: bool) -> None:
    theirs, ours = twins(kind, **(options | {"dropout": 0.0}))
    lengths = torch.tensor([5, 4, 2, 1] if sorted_ else [2, 5, 1, 4])
    x = torch.randn(4, 5, I, dtype=F64, requires_grad=True)
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=sorted_)
    hx = states(theirs, 4) if given else None
    want, got = theirs(packed, hx), ours(packed, hx)
    assert isinstance(got[0], PackedSequence)
    assert got[0].batch_sizes is packed.batch_sizes and got[0].sorted_indices is packed.sorted_indices
    close((got[0].data, got[1]), (want[0].data, want[1]))
    close(pad_packed_sequence(got[0], total_length=7), pad_packed_sequence(want[0], total_length=7))
    close(gradients(got, ours, x, *each(hx)), gradients(want, theirs, x, *each(hx)))


@pytest.mark.parametrize("form", ["list", "int64", "int32", "int16"])
@kinds
def test_lengths_are_packing(kind: str, form: str) -> None:
    theirs, ours = twins(kind, num_layers=2, bidirectional=True, batch_first=True)
    x, lengths = torch.randn(3, 5, I, dtype=F64), [3, 5, 1]
    packed, want_states = theirs(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
    want = pad_packed_sequence(packed, batch_first=True)[0]
    got, got_states = ours(x, lengths=lengths if form == "list" else torch.tensor(lengths, dtype=getattr(torch, form)))
    close((got, got_states), (want, want_states))


@kinds
def test_rows_without_steps_keep_their_states(kind: str) -> None:
    """Which torch.nn cannot pack."""
    _, ours = twins(kind, num_layers=2, bidirectional=True)
    x = torch.randn(4, 3, I, dtype=F64)
    hx = states(ours, 3)
    y, finals = ours(x, hx, lengths=[2, 0, 4])
    assert not y[:, 1].any() and not y[2:, 0].any()
    assert all(torch.equal(final[:, 1], initial[:, 1]) for final, initial in zip(each(finals), each(hx), strict=True))


@kinds
def test_lengths_of_an_unbatched_sequence(kind: str) -> None:
    _, ours = twins(kind)
    x = torch.randn(5, I, dtype=F64)
    y, finals = ours(x, lengths=[3])
    close((y[:3], finals), ours(x[:3]))
    assert y.shape == (5, H) and not y[3:].any()


@pytest.mark.parametrize("bidirectional", [False, True])
@kinds
def test_dropout_draws_as_torch(kind: str, bidirectional: bool) -> None:
    """In training with the same seed the same elements are dropped; in evaluation none."""
    theirs, ours = twins(kind, num_layers=3, dropout=0.5, bidirectional=bidirectional)
    x = torch.randn(4, 3, I, dtype=F64, requires_grad=True)
    results = []
    for module in (theirs, ours):
        torch.manual_seed(5)
        outputs = module(x)
        results.append((outputs, gradients(outputs, module, x)))
    close(results[1], results[0])
    torch.manual_seed(6)
    assert not torch.allclose(ours(x)[0], results[1][0][0])
    want, got = theirs.eval()(x), ours.eval()(x)
    close(got, want)
    close(gradients(got, ours, x), gradients(want, theirs, x))


@kinds
def test_certain_dropout(kind: str) -> None:
    theirs, ours = twins(kind, num_layers=2, dropout=1.0)
    x = torch.randn(4, 3, I, dtype=F64)
    close(ours(x), theirs(x))


@kinds
def test_an_empty_batch(kind: str, chosen: str) -> None:
    _, ours = twins(kind, num_layers=2, bidirectional=True)
    if chosen == "torch":
        with pytest.raises(rnnattn.BackendError, match="empty batch"):
            ours(torch.zeros(4, 0, I, dtype=F64))
        return
    outputs = ours(torch.zeros(4, 0, I, dtype=F64, requires_grad=True))
    assert outputs[0].shape == (4, 0, 2 * H) and all(state.shape == (4, 0, H) for state in each(outputs[1]))
    assert all(not g.any() for g in gradients(outputs, ours))


@kinds
def test_inference_mode(kind: str) -> None:
    theirs, ours = twins(kind, num_layers=2)
    x = torch.randn(4, 3, I, dtype=F64)
    with torch.inference_mode():
        got = ours(x)
        assert got[0].is_inference()
        close(got, theirs(x))


# --- parameters and dtypes -------------------------------------------------------------------------


@kinds
def test_functional_call(kind: str) -> None:
    theirs, ours = twins(kind, num_layers=2)
    x, others = torch.randn(4, 3, I, dtype=F64), twins(kind, num_layers=2)[0]
    with torch.no_grad():
        parameters = {name: torch.randn_like(p) for name, p in others.named_parameters()}
    before = ours(x)
    close(torch.func.functional_call(ours, parameters, (x,)), torch.func.functional_call(theirs, parameters, (x,)))
    close(ours(x), before)


@kinds
def test_replaced_parameters_are_used(kind: str) -> None:
    theirs, ours = twins(kind)
    x = torch.randn(4, 3, I, dtype=F64)
    for module in (theirs, ours):
        module.weight_hh_l0 = nn.Parameter(torch.full_like(module.weight_hh_l0, 0.1))
    close(ours(x), theirs(x))


@kinds
def test_it_moves_and_freezes(kind: str) -> None:
    module, x = nn.Sequential(getattr(rnnattn, kind)(I, H)), torch.randn(4, 3, I)
    want = module(x)[0]
    torch.testing.assert_close(module.double()(x.double())[0].float(), want, rtol=1e-5, atol=1e-6)
    module[0].weight_hh_l0.requires_grad_(False)
    module(x.double())[0].sum().backward()
    assert [name for name, p in module[0].named_parameters() if p.grad is None] == ["weight_hh_l0"]
