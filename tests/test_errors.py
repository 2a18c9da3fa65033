"""Bad calls that torch.nn has no check for, or lets fail inside a kernel: the message names the argument, what
was expected and what was given."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnnattn
from rnnattn import functional as RF

F64, I64, BOOL = torch.float64, torch.int64, torch.bool


def x(*shape: int, **options: Any) -> torch.Tensor:
    return torch.ones(*shape, **options)


def rnn(*arguments: Any, **options: Any) -> Any:
    return rnnattn.LSTM(5, 7)(*arguments, **options)


def without(name: str) -> Any:
    module = rnnattn.LSTM(5, 7)
    setattr(module, name, None)
    return module


def cell(*arguments: Any) -> Any:
    return rnnattn.LSTMCell(5, 7)(*arguments)


def attention(*arguments: Any, **options: Any) -> Any:
    return rnnattn.AttentionPool(5)(*arguments, **options)


def packed(*shape: int, **options: Any) -> Any:
    return pack_padded_sequence(x(*shape, **options), [4, 2])


def lstm(**arguments: Any) -> Any:
    good = {
        "input": x(4, 2, 5), "hx": (x(1, 2, 7), x(1, 2, 7)),
        "weights": [x(28, 5), x(28, 7), x(28), x(28)],
    }  # fmt: skip
    return RF.lstm(**(good | arguments))


def gru(**arguments: Any) -> Any:
    good = {"input": x(4, 2, 5), "hx": x(1, 2, 7), "weights": [x(21, 5), x(21, 7), x(21), x(21)]}
    return RF.gru(**(good | arguments))


def simple(**arguments: Any) -> Any:
    good = {"input": x(4, 2, 5), "hx": x(1, 2, 7), "weights": [x(7, 5), x(7, 7), x(7), x(7)]}
    return RF.rnn(**(good | arguments))


def pool(*, input: Any = None, v: Any = None, **arguments: Any) -> Any:
    return RF.attention_pool(x(2, 4, 5) if input is None else input, x(5) if v is None else v, **arguments)


def model(*arguments: Any, **options: Any) -> Any:
    return rnnattn.SequenceClassifier(3, 4, 5)(*arguments, **options)


B2, B3 = r"\[2\]", r"\[3\]"
# name -> (call, exception, what the message must say, each a regular expression)
CALLS: dict[str, tuple[Callable[[], Any], type[Exception], list[str]]] = {
    # modules
    "dtype of h": (lambda: rnn(x(4, 2, 5), (x(1, 2, 7, dtype=F64),) * 2), RuntimeError, ["h0", "float32", "float64"]),
    "dtype of c": (lambda: rnn(x(4, 2, 5), (x(1, 2, 7), x(1, 2, 7, dtype=F64))),
        RuntimeError, ["c0", "float32", "float64"]),
    "packed features": (lambda: rnn(packed(4, 2, 3)), RuntimeError, ["input_size", "5", "3"]),
    "packed rank": (lambda: rnn(packed(4, 2, 5, 1)), RuntimeError, ["2 dimensions", "3"]),
    "packed dtype": (lambda: rnn(packed(4, 2, 5, dtype=F64)), RuntimeError, ["input", "float32", "float64"]),
    "packed batch of h": (lambda: rnn(packed(4, 2, 5), (x(1, 3, 7), x(1, 3, 7))),
        RuntimeError, [r"hidden\[0\]", r"\(1, 2, 7\)", r"\[1, 3, 7\]"]),
    "packed and lengths": (lambda: rnn(packed(4, 2, 5), lengths=[4, 2]), ValueError, ["lengths", "PackedSequence"]),
    "cell dtype": (lambda: cell(x(2, 5, dtype=F64)), RuntimeError, ["input", "weights", "float64", "float32"]),
    "cell dtype of h": (lambda: cell(x(2, 5), (x(2, 7, dtype=F64), x(2, 7))),
        RuntimeError, ["h0", "float64", "float32"]),
    "sparse input": (lambda: rnn(x(4, 2, 5).to_sparse()), RuntimeError, ["input", "dense", "sparse_coo"]),
    "no recurrent bias": (lambda: without("bias_hh_l0")(x(4, 2, 5)), TypeError, ["element 3", "NoneType"]),
    "no h": (lambda: rnn(packed(4, 2, 5), (None, x(1, 2, 7))), TypeError, ["element 0", "NoneType"]),
    "states are one tensor": (lambda: rnn(x(4, 2, 5), x(2, 1, 2, 7)), TypeError, ["lstm", "hx", "tuple", "Tensor"]),
    "cell state is one tensor": (lambda: cell(x(2, 5), x(2, 7)), TypeError, ["hx", "tuple", "Tensor"]),
    # lengths
    "too long": (lambda: rnn(x(4, 2, 5), lengths=[5, 2]), ValueError, ["lengths", "0 to 4", "5"]),
    "negative length": (lambda: rnn(x(4, 2, 5), lengths=torch.tensor([4, -1])),
        ValueError, ["lengths", "0 to 4", "-1"]),
    "batch first, too long": (lambda: rnnattn.LSTM(5, 7, batch_first=True)(x(2, 4, 5), lengths=[5, 2]),
        ValueError, ["lengths", "0 to 4", "5"]),
    "float lengths": (lambda: rnn(x(4, 2, 5), lengths=torch.tensor([4.0, 2.0])),
        TypeError, ["lengths", "integers", "float32"]),
    "bool lengths": (lambda: rnn(x(4, 2, 5), lengths=torch.tensor([True, False])),
        TypeError, ["lengths", "integers", "bool"]),
    "lengths of another batch": (lambda: rnn(x(4, 2, 5), lengths=[4, 2, 1]), ValueError, ["lengths", B2, B3]),
    "2-D lengths": (lambda: rnn(x(4, 2, 5), lengths=x(2, 1, dtype=I64)), ValueError, ["lengths", B2, r"\[2, 1\]"]),
    "unbatched, too long": (lambda: rnn(x(4, 5), lengths=[5]), ValueError, ["lengths", "0 to 4", "5"]),
    # resets
    "float resets": (lambda: rnn(x(4, 2, 5), resets=x(4, 2)), TypeError, ["resets", "torch.bool", "float32"]),
    "integer resets": (lambda: rnn(x(4, 2, 5), resets=x(4, 2, dtype=I64)),
        TypeError, ["resets", "torch.bool", "int64"]),
    "resets in a list": (lambda: rnn(x(4, 2, 5), resets=[[True, False]] * 4), TypeError, ["resets", "tensor", "list"]),
    "resets batch first": (lambda: rnn(x(4, 2, 5), resets=x(2, 4, dtype=BOOL)),
        ValueError, ["resets", r"\[4, 2\] \[T, B\]", r"got \[2, 4\]"]),
    "resets time first": (lambda: rnnattn.GRU(5, 7, batch_first=True)(x(2, 4, 5), resets=x(4, 2, dtype=BOOL)),
        ValueError, ["resets", r"\[2, 4\] \[B, T\]", r"got \[4, 2\]"]),
    "1-D resets": (lambda: rnn(x(4, 2, 5), resets=x(4, dtype=BOOL)), ValueError, ["resets", r"\[4, 2\]", r"got \[4\]"]),
    "resets of an unbatched sequence": (lambda: rnn(x(4, 5), resets=x(4, 1, dtype=BOOL)),
        ValueError, ["resets", r"\[4\] \[T\]", r"got \[4, 1\]"]),
    "device of resets": (lambda: rnn(x(4, 2, 5), resets=x(4, 2, dtype=BOOL, device="meta")),
        ValueError, ["resets", "cpu", "meta"]),
    "packed and resets": (lambda: rnn(packed(4, 2, 5), resets=x(4, 2, dtype=BOOL)),
        ValueError, ["resets", "PackedSequence", "lengths="]),
    "functional, float resets": (lambda: simple(resets=x(4, 2)), TypeError, ["resets", "torch.bool", "float32"]),
    # functional.lstm
    "2-D input": (lambda: lstm(input=x(4, 5)), RuntimeError, ["input", "3 dimensions", r"\[4, 5\]"]),
    "integer input": (lambda: lstm(input=x(4, 2, 5, dtype=I64)), RuntimeError, ["input", "float32", "int64"]),
    "number of weights": (lambda: lstm(weights=[x(28, 5)] * 3), RuntimeError, ["weights", "4 or", "got 3"]),
    "shape of a weight": (lambda: lstm(weights=[x(28, 5), x(28, 7), x(27), x(28)]),
        RuntimeError, [r"weights\[2\]", r"\[28\]", r"\[27\]"]),
    "features of w_ih": (lambda: lstm(weights=[x(28, 6), x(28, 7), x(28), x(28)]),
        RuntimeError, [r"weights\[0\]", r"\[28, 5\]", r"\[28, 6\]"]),
    "shape of w_hr": (lambda: lstm(hx=(x(1, 2, 3), x(1, 2, 7)), weights=[x(28, 5), x(28, 3), x(28), x(28), x(2, 7)]),
        RuntimeError, [r"weights\[4\]", r"\[3, 7\]", r"\[2, 7\]"]),
    "dtype of a weight": (lambda: lstm(weights=[x(28, 5), x(28, 7, dtype=F64), x(28), x(28)]),
        RuntimeError, [r"weights\[1\]", "float32", "float64"]),
    "shape of h0": (lambda: lstm(hx=(x(2, 2, 7), x(1, 2, 7))), RuntimeError, ["h0", r"\[1, 2, 7\]", r"\[2, 2, 7\]"]),
    "shape of c0": (lambda: lstm(hx=(x(1, 2, 7), x(1, 3, 7))), RuntimeError, ["c0", r"\[1, 2, 7\]", r"\[1, 3, 7\]"]),
    "no weights of floating numbers": (lambda: lstm(input=x(4, 2, 5, dtype=I64), hx=(x(1, 2, 7, dtype=I64),) * 2,
        weights=[x(28, 5, dtype=I64), x(28, 7, dtype=I64)], has_biases=False),
        RuntimeError, ["input", "floating", "int64"]),
    # functional.gru and functional.rnn
    "gru: dtype of h": (lambda: rnnattn.GRU(5, 7)(x(4, 2, 5), x(1, 2, 7, dtype=F64)),
        RuntimeError, ["gru", "h0", "float32", "float64"]),
    "gru: number of weights": (lambda: gru(weights=[x(21, 5)] * 5),
        RuntimeError, ["gru", "expected 4 weights", "got 5"]),
    "gru: shape of a weight": (lambda: gru(weights=[x(21, 5), x(21, 7), x(28), x(21)]),
        RuntimeError, ["gru", r"weights\[2\]", r"\[21\]", r"\[28\]"]),
    "gru: weights of an LSTM": (lambda: gru(weights=[x(28, 5), x(28, 7), x(28), x(28)]),
        RuntimeError, ["gru", "h0", r"\[1, 2, 9\]", r"\[1, 2, 7\]"]),
    "gru: shape of h0": (lambda: gru(hx=x(2, 2, 7)), RuntimeError, ["h0", r"\[1, 2, 7\]", r"\[2, 2, 7\]"]),
    "gru: packed and lengths": (lambda: rnnattn.GRU(5, 7)(packed(4, 2, 5), lengths=[4, 2]),
        ValueError, ["GRU", "lengths", "PackedSequence"]),
    "gru: packed batch of h": (lambda: rnnattn.GRU(5, 7)(packed(4, 2, 5), x(1, 3, 7)),
        RuntimeError, ["hidden size", r"\(1, 2, 7\)", r"\[1, 3, 7\]"]),
    "gru: too long": (lambda: rnnattn.GRU(5, 7)(x(4, 2, 5), lengths=[5, 2]), ValueError, ["lengths", "0 to 4", "5"]),
    "gru cell: dtype of h": (lambda: rnnattn.GRUCell(5, 7)(x(2, 5), x(2, 7, dtype=F64)),
        RuntimeError, ["gru", "h0", "float64", "float32"]),
    "rnn: nonlinearity": (lambda: simple(nonlinearity="elu"), ValueError, ["nonlinearity", "tanh, relu", "'elu'"]),
    "rnn: shape of w_hh": (lambda: simple(weights=[x(7, 5), x(7, 6), x(7), x(7)]),
        RuntimeError, ["rnn", r"weights\[1\]", r"\[7, 7\]", r"\[7, 6\]"]),
    "rnn: integer input": (lambda: simple(input=x(4, 2, 5, dtype=I64)),
        RuntimeError, ["rnn: input", "float32", "int64"]),
    "rnn cell: nonlinearity": (
        lambda: RF.rnn_cell(x(2, 5), x(2, 7), x(7, 5), x(7, 7), nonlinearity="elu"),
        ValueError, ["nonlinearity", "tanh, relu", "'elu'"]),
    # functional.attention_pool and AttentionPool
    "pool: 2-D input": (lambda: pool(input=x(4, 5)), RuntimeError, ["input", "3 dimensions", r"\[4, 5\]"]),
    "pool: integers": (lambda: pool(input=x(2, 4, 5, dtype=I64)), RuntimeError, ["input", "floating", "int64"]),
    "pool: no features": (lambda: pool(input=x(2, 4, 0), v=x(0)), RuntimeError, ["input", "feature", r"\[2, 4, 0\]"]),
    "pool: v": (lambda: pool(v=x(6)), RuntimeError, [r"\bv\b", r"\[5\]", r"\[6\]"]),
    "pool: w": (lambda: pool(v=x(3), w=x(3, 6)), RuntimeError, [r"\bw\b", r"\[3, 5\]", r"\[3, 6\]"]),
    "pool: 1-D w": (lambda: pool(v=x(3), w=x(3)), RuntimeError, [r"\bw\b", r"\[A, 5\]", B3]),
    "pool: v for w": (lambda: pool(v=x(5), w=x(3, 5)), RuntimeError, [r"\bv\b", B3, r"\[5\]"]),
    "pool: b": (lambda: pool(v=x(3), w=x(3, 5), b=x(5)), RuntimeError, [r"\bb\b", B3, r"\[5\]"]),
    "pool: b without w": (lambda: pool(b=x(5)), RuntimeError, ["b without w"]),
    "pool: dtype of v": (lambda: pool(v=x(5, dtype=F64)), RuntimeError, [r"\bv\b", "float32", "float64"]),
    "pool: device of v": (lambda: pool(v=x(5, device="meta")), RuntimeError, [r"\bv\b", "cpu", "meta"]),
    "pool: mask and lengths": (lambda: pool(lengths=[1, 2], mask=x(2, 4, dtype=BOOL)),
        ValueError, ["lengths or mask", "both"]),
    "pool: mask shape": (lambda: pool(mask=x(4, 2, dtype=BOOL)), ValueError, ["mask", r"\[2, 4\]", r"\[4, 2\]"]),
    "pool: float mask": (lambda: pool(mask=x(2, 4)), TypeError, ["mask", "bool", "float32"]),
    "pool: integer mask": (lambda: pool(mask=x(2, 4, dtype=I64)), TypeError, ["mask", "bool", "int64"]),
    "pool: mask device": (lambda: pool(mask=x(2, 4, dtype=BOOL, device="meta")), ValueError, ["mask", "cpu", "meta"]),
    "pool: too long": (lambda: pool(lengths=[5, 1]), ValueError, ["lengths", "0 to 4", "5"]),
    "pool: float lengths": (lambda: pool(lengths=[1.0, 2.0]), TypeError, ["lengths", "integers", "float32"]),
    "pool: lengths of another batch": (lambda: pool(lengths=[1, 2, 3]), ValueError, ["lengths", B2, B3]),
    "AttentionPool: features": (lambda: attention(x(2, 4, 6)), RuntimeError, ["input_size", "5", "6"]),
    "AttentionPool: rank": (lambda: attention(x(5)), ValueError, ["2D or 3D", "1D"]),
    "AttentionPool: packed and lengths": (lambda: attention(packed(4, 2, 5), lengths=[4, 2]),
        ValueError, ["lengths", "PackedSequence"]),
    "AttentionPool: dtype": (lambda: attention(x(2, 4, 5, dtype=F64)), RuntimeError, [r"\bv\b", "float64", "float32"]),
    # constructors and settings
    "unknown score": (lambda: rnnattn.AttentionPool(5, score="dot"),
        ValueError, ["score", "linear, additive", "'dot'"]),
    "linear attention_size": (lambda: rnnattn.AttentionPool(5, attention_size=3),
        ValueError, ["attention_size", "None", "3"]),
    "no features": (lambda: rnnattn.AttentionPool(0), ValueError, ["input_size", "positive", "0"]),
    "attention_size": (lambda: rnnattn.AttentionPool(5, "additive", -2),
        ValueError, ["attention_size", "positive", "-2"]),
    "num_classes": (lambda: rnnattn.SequenceClassifier(0, 4, 5), ValueError, ["num_classes", "positive", "0"]),
    "classifier: rank": (lambda: model(x(2, 4)), ValueError, ["features", "3D", "2D"]),
    "classifier: ids rank": (lambda: rnnattn.SequenceClassifier(3, 4, 5, 10)(x(2, 4, 5, dtype=I64)),
        ValueError, ["token ids", "2D", "3D"]),
    "classifier: too long": (lambda: model(x(2, 4, 5), lengths=[9, 1]), ValueError, ["lengths", "0 to 4", "9"]),
    "unknown backend": (lambda: rnnattn.use_backend("mps"),
        ValueError, ["use_backend", "auto, reference, cpp", "'mps'"]),
    "swap of no module": (lambda: rnnattn.swap([nn.LSTM(2, 3)]),
        TypeError, ["model", "Module", "list"]),  # type: ignore[arg-type]
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_message_says_what_is_wrong(name: str) -> None:
    call, exception, words = CALLS[name]
    with pytest.raises(exception) as info:
        call()
    assert info.type is exception
    for word in words:
        assert re.search(word, str(info.value)), f"{word!r} is not in: {info.value}"


def test_an_unknown_backend_changes_nothing() -> None:
    rnnattn.use_backend("reference")
    with pytest.raises(ValueError, match="nope"):
        rnnattn.use_backend("nope")
    assert rnnattn.backends.selected() == "reference"
