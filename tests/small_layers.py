"""Small layers in float64, ours and torch.nn's with the same parameters, for the tests of derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import F64
from torch import nn

import rnnattn

LAYERS = {
    "lstm": (rnnattn.LSTM, nn.LSTM, {}),
    "lstm_projected": (rnnattn.LSTM, nn.LSTM, {"proj_size": 2}),
    "lstm_stack": (rnnattn.LSTM, nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    "gru": (rnnattn.GRU, nn.GRU, {}),
    "rnn": (rnnattn.RNN, nn.RNN, {}),
}
each_layer = pytest.mark.parametrize("name", LAYERS)
I, H = 3, 4


def twins(name: str) -> tuple[nn.Module, nn.Module]:
    """Ours and torch.nn's with the same parameters, in float64."""
    kind, original, settings = LAYERS[name]
    ours, theirs = kind(I, H, dtype=F64, **settings), original(I, H, dtype=F64, **settings)
    theirs.load_state_dict(ours.state_dict())
    ours(torch.zeros(1, 1, I, dtype=F64))  # what follows may go directly to the kernels
    return ours, theirs


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
