"""torch.nn's modules and ours with the same parameters, and what both give in training and without gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import F64
from tolerances import close
from torch import Tensor, nn

import rnnattn

# Calls go directly from the second one on.
TABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {"bidirectional": True}),
    "rnn": ("RNN", {}),
    "stack": ("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 3}),
    "lstm cell": ("LSTMCell", {}),
    "gru cell": ("GRUCell", {}),
    "rnn cell": ("RNNCell", {}),
}
I, H = 5, 6


def pair_of(name: str, **options: Any) -> list[Any]:
    """torch's and ours with the same parameters."""
    kind, settings = TABLE[name]
    pair = [getattr(package, kind)(I, H, **({"dtype": F64} | settings | options)) for package in (nn, rnnattn)]
    pair[1].load_state_dict(pair[0].state_dict())
    return pair


def inputs(module: nn.Module, B: int = 3) -> Tensor:
    """x [4, B, I], for a cell [B, I]."""
    like = next(module.parameters())
    T = () if isinstance(module, nn.RNNCellBase) else (4,)
    return torch.randn(*T, B, I, dtype=like.dtype, device=like.device)


def flat(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else [t for part in results for t in flat(part)]


def loss_of(results: Any) -> Tensor:
    """Every element of every output counts, each with a weight of its own."""
    ends = [(t, torch.linspace(-1, 2, t.numel(), dtype=t.dtype, device=t.device).view(t.shape)) for t in flat(results)]
    return torch.stack([(t.square() * weights).sum() for t, weights in ends]).sum()


def train(module: nn.Module, x: Tensor, call: Callable[..., Any] | None = None, x_grad: bool = True) -> dict[str, Any]:
    """Outputs and gradients of a forward and a backward; call: the module in a wrapper."""
    module.zero_grad()
    x = x.detach().clone().requires_grad_(x_grad)
    results = (call or module)(x)
    if (loss := loss_of(results)).requires_grad:
        loss.backward()
    gradients = {key: None if p.grad is None else p.grad.clone() for key, p in module.named_parameters()}
    return {"results": [t.detach().clone() for t in flat(results)], "x": x.grad, **gradients}


def same(theirs: nn.Module, ours: nn.Module) -> None:
    """Both give the same in training, without gradients, and in training on data."""
    x = inputs(ours)
    close(train(ours, x), train(theirs, x))
    with torch.no_grad():
        close(flat(ours(x)), flat(theirs(x)))
    close(train(ours, x, x_grad=False), train(theirs, x, x_grad=False))


def hh(module: nn.Module) -> str:
    return "weight_hh" if isinstance(module, nn.RNNCellBase) else "weight_hh_l0"


def smaller(module: nn.Module) -> dict[str, Tensor]:
    return {key: p * 0.8 for key, p in module.state_dict(keep_vars=True).items()}


def scale(module: nn.Module) -> None:
    """Changes every parameter in place."""
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(0.9).add_(0.01)
