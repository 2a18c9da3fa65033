"""The modules whose calls may go directly, and which of their calls did."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import F64
from torch import nn

import rnnattn
from rnnattn.nn import direct

I, H = 5, 6
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("LSTM", {}),
    "lstm, batch_first": ("LSTM", {"batch_first": True}),
    "lstm, both directions": ("LSTM", {"bidirectional": True}),
    "lstm, projection": ("LSTM", {"proj_size": 4, "bidirectional": True, "bias": False}),
    "lstm, projection and biases": ("LSTM", {"proj_size": 4}),
    "gru": ("GRU", {"bidirectional": True}),
    "gru, no bias": ("GRU", {"bias": False, "batch_first": True}),
    "rnn": ("RNN", {"bidirectional": True, "batch_first": True}),
    "rnn, relu": ("RNN", {"nonlinearity": "relu"}),
    "stack": ("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 3}),
    "gru stack": ("GRU", {"num_layers": 3, "batch_first": True, "bias": False}),
    "lstm cell": ("LSTMCell", {}),
    "lstm cell, no bias": ("LSTMCell", {"bias": False}),
    "gru cell": ("GRUCell", {}),
    "rnn cell, relu": ("RNNCell", {"nonlinearity": "relu"}),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch, backend: str) -> list[bool]:
    """Of every call that was tried directly, whether it was taken."""
    seen: list[bool] = []
    run = direct.call_layer()

    def spy(*arguments: Any) -> Any:
        results = run(*arguments)
        seen.append(results is not None)
        return results

    monkeypatch.setattr(direct, "call_layer", lambda: spy)
    return seen


def twins(name: str, dtype: torch.dtype = F64) -> tuple[Any, Any]:
    """torch's and ours with the same parameters."""
    kind, options = LAYERS[name]
    theirs, ours = (getattr(package, kind)(I, H, dtype=dtype, **options) for package in (nn, rnnattn))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def arguments(module: Any, T: int = 3, B: int = 2, given: bool = True, grad: bool = False) -> list[Any]:
    """x, and initial states if given, as the module takes them."""
    dtype = next(module.parameters()).dtype
    cell = isinstance(module, nn.RNNCellBase)
    shape = (B,) if cell else (B, T) if module.batch_first else (T, B)
    x = torch.randn(*shape, I, dtype=dtype, requires_grad=grad)
    if not given:
        return [x]
    K = () if cell else (module.num_layers * (1 + module.bidirectional),)
    h = torch.randn(*K, B, getattr(module, "proj_size", 0) or H, dtype=dtype, requires_grad=grad)
    if "LSTM" not in type(module).__name__:
        return [x, h]
    return [x, (h, torch.randn(*K, B, H, dtype=dtype, requires_grad=grad))]
