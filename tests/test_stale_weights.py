"""Nothing that a backend derives from the weights (packed, transposed, widened) may outlive a change of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import device_of
from recurrent_cases import each_mode
from torch import Tensor, nn

import rnnattn

KINDS = {"LSTM": rnnattn.LSTM, "GRU": rnnattn.GRU, "RNN_TANH": rnnattn.RNN}
on_each = pytest.mark.parametrize("backend, mode", [p for p in each_mode() if p.values[1] in KINDS])


class Model(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.recurrent = KINDS[mode](3, 4, bidirectional=True, batch_first=True)
        self.pool = rnnattn.AttentionPool(8, "additive", 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.recurrent(x)[0])


def _optimizer_step(model: Model, x: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    model(x).square().sum().backward()
    optimizer.step()


def _load(model: Model, x: Tensor) -> None:
    model.load_state_dict({name: p + 0.25 for name, p in model.state_dict().items()})


def _assign(model: Model, x: Tensor) -> None:
    model.load_state_dict({name: p + 0.25 for name, p in model.state_dict().items()}, assign=True)


def _data(model: Model, x: Tensor) -> None:
    for p in model.parameters():
        p.data[..., 0] += 1.0  # no version counter sees this


def _new_data(model: Model, x: Tensor) -> None:
    for p in model.parameters():
        p.data = p.data.flip(0) + 0.5


def _in_place(model: Model, x: Tensor) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(-1.5)


def _numpy(model: Model, x: Tensor) -> None:
    for p in model.cpu().parameters():
        p.detach().numpy()[..., -1] += 0.75
    model.to(x.device)


CHANGES: dict[str, Callable[[Model, Tensor], Any]] = {
    "optimizer step": _optimizer_step,
    "load_state_dict": _load,
    "load_state_dict, assign": _assign,
    "write through .data": _data,
    "replace .data": _new_data,
    "in place": _in_place,
    "through numpy": _numpy,
    "reset_parameters": lambda model, x: (model.recurrent.reset_parameters(), model.pool.reset_parameters()),
}


def _expected(model: Model, x: Tensor) -> Tensor:
    with rnnattn.use_backend("reference"), torch.no_grad():
        return model(x)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@on_each
def test_results_follow_the_weights(backend: str, mode: str, change: Callable[[Model, Tensor], Any]) -> None:
    model, x = Model(mode).to(device_of(backend)), torch.randn(1, 2, 3, device=device_of(backend))
    with rnnattn.use_backend(backend):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                before = model(x).detach()
            torch.testing.assert_close(before, _expected(model, x), rtol=1e-5, atol=1e-6)
            change(model, x)
            with torch.set_grad_enabled(grad):
                after = model(x).detach()
            torch.testing.assert_close(after, _expected(model, x), rtol=1e-5, atol=1e-6)
            assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@on_each
def test_results_follow_the_dtype(backend: str, mode: str, dtype: torch.dtype) -> None:
    model, x = Model(mode).to(device_of(backend)), torch.randn(1, 2, 3, device=device_of(backend))
    with rnnattn.use_backend(backend), torch.no_grad():
        wide = model(x)
        narrow = model.to(dtype)(x.to(dtype))
        assert narrow.dtype == dtype
        torch.testing.assert_close(narrow.float(), wide, rtol=0.03, atol=0.01)
        _in_place(model, x)
        torch.testing.assert_close(model(x.to(dtype)), _expected(model, x.to(dtype)), rtol=0.02, atol=0.01)
        again = model.float()(x)
        torch.testing.assert_close(again, _expected(model, x), rtol=1e-5, atol=1e-6)
        assert (again - wide).abs().max() > 1e-3


@on_each
def test_weights_changed_between_forward_and_backward_are_refused(backend: str, mode: str) -> None:
    """As autograd does for its own operations: the saved tensors are the weights themselves."""
    model, x = Model(mode).to(device_of(backend)), torch.randn(1, 2, 3, device=device_of(backend))
    with rnnattn.use_backend(backend):
        y = model(x)
        _in_place(model, x)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
