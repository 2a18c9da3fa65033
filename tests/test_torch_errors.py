"""Bad calls that torch.nn checks too: exception and message are torch's. I = 5, H = 7."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnattn

F64 = torch.float64
Call = Callable[[Any], Any]


def x(*shape: int, **options: Any) -> torch.Tensor:
    return torch.ones(*shape, **options)


def packed(*shape: int, **options: Any) -> PackedSequence:
    return pack_padded_sequence(x(*shape, **options), torch.full(shape[1:2], shape[0]))


def without(name: str, module: nn.Module) -> nn.Module:
    setattr(module, name, None)
    return module


def raised(call: Callable[[], Any]) -> tuple[type[BaseException], str]:
    with pytest.raises(Exception) as info:
        call()
    return info.type, str(info.value)


LSTM_CALLS: dict[str, tuple[dict[str, Any], Call]] = {
    "1-D input": ({}, lambda m: m(x(4))),
    "4-D input": ({}, lambda m: m(x(4, 2, 3, 1))),
    "features": ({}, lambda m: m(x(4, 2, 3))),
    "features, unbatched": ({}, lambda m: m(x(4, 3))),
    "features, batch first": ({"batch_first": True}, lambda m: m(x(4, 2, 3))),
    "dtype": ({}, lambda m: m(x(4, 2, 5, dtype=F64))),
    "integers": ({}, lambda m: m(x(4, 2, 5, dtype=torch.int64))),
    "T=0": ({}, lambda m: m(x(0, 2, 5))),
    "T=0, batch first": ({"batch_first": True}, lambda m: m(x(2, 0, 5))),
    "T=0, unbatched": ({}, lambda m: m(x(0, 5))),
    "2-D states": ({}, lambda m: m(x(4, 2, 5), (x(2, 7), x(2, 7)))),
    "2-D c": ({}, lambda m: m(x(4, 2, 5), (x(1, 2, 7), x(2, 7)))),
    "3-D states, unbatched": ({}, lambda m: m(x(4, 5), (x(1, 1, 7), x(1, 1, 7)))),
    "batch of h": ({}, lambda m: m(x(4, 2, 5), (x(1, 3, 7), x(1, 2, 7)))),
    "batch of c": ({}, lambda m: m(x(4, 2, 5), (x(1, 2, 7), x(1, 3, 7)))),
    "batch of h, batch first": ({"batch_first": True}, lambda m: m(x(2, 4, 5), (x(1, 4, 7), x(1, 4, 7)))),
    "size of h": ({}, lambda m: m(x(4, 2, 5), (x(1, 2, 6), x(1, 2, 7)))),
    "size of c": ({}, lambda m: m(x(4, 2, 5), (x(1, 2, 7), x(1, 2, 6)))),
    "layers of h": ({"num_layers": 2}, lambda m: m(x(4, 2, 5), (x(1, 2, 7), x(1, 2, 7)))),
    "directions of h": ({"bidirectional": True}, lambda m: m(x(4, 2, 5), (x(1, 2, 7), x(1, 2, 7)))),
    "layers of h, unbatched": ({"num_layers": 2}, lambda m: m(x(4, 5), (x(1, 7), x(1, 7)))),
    "h is not projected": ({"proj_size": 3}, lambda m: m(x(4, 2, 5), (x(1, 2, 7), x(1, 2, 7)))),
    "three states": ({}, lambda m: m(x(4, 2, 5), (x(1, 2, 7),) * 3)),
    "one state": ({}, lambda m: m(x(4, 2, 5), (x(1, 2, 7),))),
    "device of the states": ({}, lambda m: m(x(4, 2, 5), (x(1, 2, 7, device="meta"),) * 2)),
    "device of the input": ({}, lambda m: m(x(4, 2, 5, device="meta"))),
    "not a tensor": ({}, lambda m: m([1, 2])),
    "no c": ({}, lambda m: m(packed(4, 2, 5), (x(1, 2, 7), None))),
    "one state, packed": ({}, lambda m: m(packed(4, 2, 5), (x(1, 2, 7),))),
    "no bias_hh": ({}, lambda m: without("bias_hh_l0", m)(x(4, 2, 5))),
    "no bias_ih, packed": ({}, lambda m: without("bias_ih_l0", m)(packed(4, 2, 5))),
}

# of GRU and of RNN, whose one state is h
ONE_STATE_CALLS: dict[str, tuple[dict[str, Any], Call]] = {
    **{
        name: LSTM_CALLS[name]
        for name in (
            "1-D input",
            "4-D input",
            "features",
            "features, unbatched",
            "features, batch first",
            "dtype",
            "integers",
            "T=0",
            "T=0, batch first",
            "T=0, unbatched",
            "device of the input",
            "not a tensor",
            "no bias_hh",
            "no bias_ih, packed",
        )
    },
    "2-D h": ({}, lambda m: m(x(4, 2, 5), x(2, 7))),
    "3-D h, unbatched": ({}, lambda m: m(x(4, 5), x(1, 1, 7))),
    "batch of h": ({}, lambda m: m(x(4, 2, 5), x(1, 3, 7))),
    "batch of h, batch first": ({"batch_first": True}, lambda m: m(x(2, 4, 5), x(1, 4, 7))),
    "size of h": ({}, lambda m: m(x(4, 2, 5), x(1, 2, 6))),
    "layers of h": ({"num_layers": 2}, lambda m: m(x(4, 2, 5), x(1, 2, 7))),
    "directions of h": ({"bidirectional": True}, lambda m: m(x(4, 2, 5), x(1, 2, 7))),
    "layers of h, unbatched": ({"num_layers": 2}, lambda m: m(x(4, 5), x(1, 7))),
    "states of an LSTM": ({}, lambda m: m(x(4, 2, 5), (x(1, 2, 7), x(1, 2, 7)))),
    "states of an LSTM, unbatched": ({}, lambda m: m(x(4, 5), (x(1, 7), x(1, 7)))),
    "device of h": ({}, lambda m: m(x(4, 2, 5), x(1, 2, 7, device="meta"))),
    "dtype, packed": ({}, lambda m: m(packed(4, 2, 5, dtype=F64))),
}

CELL_CALLS: dict[str, Call] = {
    "0-D input": lambda m: m(torch.tensor(1.0)),
    "3-D input": lambda m: m(x(1, 2, 5)),
    "features": lambda m: m(x(2, 4)),
    "features, unbatched": lambda m: m(x(4)),
    "3-D h": lambda m: m(x(2, 5), (x(1, 2, 7), x(2, 7))),
    "3-D c": lambda m: m(x(2, 5), (x(2, 7), x(1, 2, 7))),
    "batch of h": lambda m: m(x(2, 5), (x(3, 7), x(3, 7))),
    "batch of c": lambda m: m(x(2, 5), (x(2, 7), x(3, 7))),
    "size of h": lambda m: m(x(2, 5), (x(2, 6), x(2, 7))),
    "size of c": lambda m: m(x(2, 5), (x(2, 7), x(2, 6))),
    "1-D states": lambda m: m(x(2, 5), (x(7), x(7))),
    "2-D states, unbatched": lambda m: m(x(5), (x(1, 7), x(1, 7))),
    "three states": lambda m: m(x(2, 5), (x(2, 7),) * 3),
    "one state": lambda m: m(x(2, 5), (x(2, 7),)),
    "1-D h of the batch's size": lambda m: m(x(2, 5), (x(2), x(2, 7))),
    "one tensor for h and c": lambda m: m(x(2, 5), x(2, 2, 7)[0]),
    "one state, unbatched": lambda m: m(x(5), (x(7),)),
    "3-D h among three states": lambda m: m(x(2, 5), (x(1, 2, 7),) * 3),
}

# of GRUCell and of RNNCell
ONE_STATE_CELL_CALLS: dict[str, Call] = {
    **{name: CELL_CALLS[name] for name in ("0-D input", "3-D input", "features", "features, unbatched")},
    "3-D h": lambda m: m(x(2, 5), x(1, 2, 7)),
    "batch of h": lambda m: m(x(2, 5), x(3, 7)),
    "size of h": lambda m: m(x(2, 5), x(2, 6)),
    "1-D h": lambda m: m(x(2, 5), x(7)),
    "1-D h of the batch's size": lambda m: m(x(2, 5), x(2)),
    "2-D h, unbatched": lambda m: m(x(5), x(1, 7)),
    "states of an LSTM": lambda m: m(x(2, 5), (x(2, 7), x(2, 7))),
    "not a tensor": lambda m: m([1, 2]),
}

CONSTRUCTORS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((0, 4), {}),
    ((4, 0), {}),
    ((-1, 4), {}),
    ((4.0, 4), {}),
    ((4, "4"), {}),
    ((4,), {}),
    ((4, 4, 0), {}),
    ((4, 4), {"num_layers": -1}),
    ((4, 4), {"num_layers": 1.5}),
    ((4, 4), {"bias": 1}),
    ((4, 4), {"batch_first": 1}),
    ((4, 4), {"dropout": 1.5}),
    ((4, 4), {"dropout": -0.1}),
    ((4, 4), {"dropout": True}),
    ((4, 4), {"proj_size": 4}),
    ((4, 4), {"proj_size": -1}),
    ((4, 4), {"hidden": 3}),
    ((4, 4), {"dtype": torch.int32}),
]


def assert_same(kind: str, call: Call) -> None:
    """call(the class of that name) raises the same from rnnattn as from torch.nn."""
    assert raised(lambda: call(getattr(rnnattn, kind))) == raised(lambda: call(getattr(nn, kind)))


@pytest.mark.parametrize("name", LSTM_CALLS)
def test_lstm(name: str) -> None:
    options, call = LSTM_CALLS[name]
    assert_same("LSTM", lambda lstm: call(lstm(5, 7, **options)))


def test_dtype_of_packed_rows() -> None:
    """torch's LSTM has no check of its own there: the words are those of a product, and ours say more."""
    kind, text = raised(lambda: nn.LSTM(5, 7)(packed(4, 2, 5, dtype=F64)))
    ours, said = raised(lambda: rnnattn.LSTM(5, 7)(packed(4, 2, 5, dtype=F64)))
    assert ours is kind
    assert said.startswith(text)


@pytest.mark.parametrize("kind", ["GRU", "RNN"])
@pytest.mark.parametrize("name", ONE_STATE_CALLS)
def test_gru_and_rnn(name: str, kind: str) -> None:
    options, call = ONE_STATE_CALLS[name]
    assert_same(kind, lambda module: call(module(5, 7, **options)))


@pytest.mark.parametrize("name", CELL_CALLS)
def test_lstm_cell(name: str) -> None:
    assert_same("LSTMCell", lambda cell: CELL_CALLS[name](cell(5, 7)))


@pytest.mark.parametrize("kind", ["GRUCell", "RNNCell"])
@pytest.mark.parametrize("name", ONE_STATE_CELL_CALLS)
def test_gru_and_rnn_cell(name: str, kind: str) -> None:
    assert_same(kind, lambda cell: ONE_STATE_CELL_CALLS[name](cell(5, 7)))


def test_an_unknown_nonlinearity_of_a_cell() -> None:
    assert_same("RNNCell", lambda cell: cell(5, 7, nonlinearity="relu6")(x(2, 5)))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("arguments, options", CONSTRUCTORS, ids=str)
def test_constructor(kind: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    assert_same(kind, lambda module: module(*arguments, **options))


@pytest.mark.parametrize(
    "arguments, options",
    [((4, 4, 1, "sigmoid"), {}), ((4, 4), {"nonlinearity": "TANH"}), ((4, 4, 1, True), {}), ((4, 4, 0, "relu"), {})],
    ids=str,
)
def test_rnn_constructor(arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    assert_same("RNN", lambda module: module(*arguments, **options))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_dropout_without_a_second_layer_warns(kind: str) -> None:
    with pytest.warns(UserWarning, match="num_layers greater than 1") as theirs:
        getattr(nn, kind)(2, 3, dropout=0.5)
    with pytest.warns(UserWarning, match="num_layers greater than 1") as ours:
        getattr(rnnattn, kind)(2, 3, dropout=0.5)
    assert [str(w.message) for w in ours] == [str(w.message) for w in theirs]
