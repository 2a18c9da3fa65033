"""A caller writes into what a layer returned, before the backward: as where torch.nn's layers have no need of it.

They refuse it where oneDNN or cuDNN keep the output, and ours nowhere.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import F64
from tolerances import close
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint
from twins import TABLE, flat, inputs, pair_of

import rnnattn

each = pytest.mark.parametrize("name", TABLE)


def zero_a_step(y: Tensor) -> None:
    y[-1] = 0


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "relu_": F.relu_,
    "dropout": lambda y: F.dropout(y, 0.5, inplace=True),
    "add_": lambda y: y.add_(1),
    "masked_fill_": lambda y: y.masked_fill_(y > 0.1, 2),
    "a view": lambda y: y[..., :2].mul_(3),
    "a step": zero_a_step,
    "detached": lambda y: y.detach().zero_(),
}


def trained(module: Any, x: Tensor, write: Callable[[Tensor], Any], copied: bool = False) -> list[Tensor]:
    """Outputs that are written into, or else copies of them, and gradients."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    outputs = [t.clone() if copied else t for t in flat(module(x))]
    for y in outputs:
        write(y)
    cotangents = [torch.randn_like(y) for y in outputs]
    gradients = torch.autograd.grad(outputs, [x, *module.parameters()], cotangents, retain_graph=True)
    again = torch.autograd.grad(outputs, [x, *module.parameters()], cotangents)
    close(again, gradients)
    return [*(y.detach() for y in outputs), *gradients]


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@each
def test_gradients_are_those_of_what_was_returned(name: str, write: Callable[[Tensor], Any], own_backend: str) -> None:
    theirs, ours = pair_of(name)
    x = inputs(ours)
    want = trained(theirs, x, write, copied=True)
    for _ in range(3):  # the first call, and those that may go directly
        close(trained(ours, x, write), want)


@pytest.mark.parametrize("batch_first", [False, True])
def test_other_layouts(batch_first: bool, own_backend: str) -> None:
    theirs, ours = pair_of("gru", batch_first=batch_first, dropout=0.5, num_layers=2)
    x = inputs(ours)
    for _ in range(2):
        close(trained(ours.eval(), x, F.relu_), trained(theirs.eval(), x, F.relu_))
    B, T = x.shape[:2] if batch_first else x.shape[1::-1]
    packed = pack_padded_sequence(x, torch.tensor([2, T, 1, T])[:B], batch_first, enforce_sorted=False)
    results = []
    for module in (theirs, ours):
        y, h = module(packed)
        y.data.add_(1)
        results.append(torch.autograd.grad(y.data.square().sum() + h.sum(), list(module.parameters())))
    close(*results)


@each
def test_second_derivatives(name: str, own_backend: str) -> None:
    theirs, ours = pair_of(name)
    x, results = inputs(ours), []
    for module, copied in ((theirs, True), (ours, False), (ours, False)):
        leaf = x.clone().requires_grad_()
        y = flat(module(leaf))[0]
        y = y.clone() if copied else y
        y.mul_(2)
        (dx,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        results.append([dx.detach(), *torch.autograd.grad(dx.square().sum(), [leaf, *module.parameters()])])
    close(results[1], results[0]), close(results[2], results[0])


@pytest.mark.parametrize("score", ["linear", "additive"])
def test_pooling(score: str, own_backend: str) -> None:
    pool, x = rnnattn.AttentionPool(6, score, dtype=F64), torch.randn(3, 5, 6, dtype=F64)
    close(trained(pool, x, F.relu_), trained(pool, x, F.relu_, copied=True))


def test_regularised_layers(own_backend: str) -> None:
    layer = rnnattn.LSTM(5, 6, layer_norm=True, zoneout=0.2, dtype=F64).eval()
    x = inputs(layer)
    close(trained(layer, x, F.relu_), trained(layer, x, F.relu_, copied=True))


def under_hooks(module: Any) -> Callable[[Tensor], Any]:
    def call(x: Tensor) -> Any:
        with saved_tensors_hooks(lambda t: t, lambda t: t):
            y = F.relu_(flat(module(x))[0])
        return y

    return call


@pytest.mark.parametrize("way", ["checkpoint", "reentrant", "hooks", "copies", "save_on_cpu"])
@each
def test_what_is_kept_by_others(name: str, way: str, own_backend: str) -> None:
    """A checkpoint and hooks on what is saved look at no versions."""
    theirs, ours = pair_of(name)
    contexts = {"copies": lambda: saved_tensors_hooks(torch.clone, lambda t: t), "save_on_cpu": save_on_cpu}
    for _ in range(2):
        x = inputs(ours).requires_grad_()
        (want,) = torch.autograd.grad(F.relu(flat(theirs(x))[0]).square().sum(), x)
        if way in ("checkpoint", "reentrant"):
            y = checkpoint(lambda t: F.relu_(flat(ours(t))[0]), x, use_reentrant=way == "reentrant")
        elif way == "hooks":
            y = under_hooks(ours)(x)
        else:
            with contexts[way]():
                y = F.relu_(flat(ours(x))[0])
        y.square().sum().backward()
        close(x.grad, want)


def test_within_torch_func(own_backend: str) -> None:
    layer, x = rnnattn.GRU(3, 4, dtype=F64), torch.randn(5, 2, 3, dtype=F64)
    written, copied = (
        torch.func.grad(lambda t, relu=relu: relu(layer(t)[0]).square().sum())(x) for relu in (F.relu_, F.relu)
    )
    close(written, copied)


@pytest.mark.parametrize("score", ["linear", "additive"])
@pytest.mark.parametrize("kept", ["lengths", "mask"])
def test_pooling_of_some_steps(score: str, kept: str, own_backend: str) -> None:
    pool, x = rnnattn.AttentionPool(6, score, dtype=F64), torch.randn(3, 5, 6, dtype=F64)
    given = {"lengths": torch.tensor([5, 2, 0])} if kept == "lengths" else {"mask": torch.rand(3, 5) > 0.5}
    call = pool.forward
    pool.forward = lambda t: call(t, **given)
    close(trained(pool, x, F.relu_), trained(pool, x, F.relu_, copied=True))


def test_regularised_layers_in_training(own_backend: str) -> None:
    layer = rnnattn.GRU(5, 6, zoneout=0.3, recurrent_dropout=0.4, dtype=F64)
    x, lengths = inputs(layer), torch.tensor([4, 0, 3])
    call = layer.forward
    layer.forward = lambda t: call(t, lengths=lengths)
    close(trained(layer, x, F.relu_), trained(layer, x, F.relu_, copied=True))


def test_what_a_backward_needs_otherwise_is_still_watched() -> None:
    layer, x = rnnattn.GRU(3, 4, dtype=F64), torch.randn(5, 2, 3, dtype=F64)
    for _ in range(2):
        for change in (lambda: x.add_(1), lambda: layer.weight_hh_l0.data.add_(0), lambda: x.zero_()):
            y, _ = layer(x)
            F.relu_(y)
            with torch.no_grad():
                change()
                layer.weight_hh_l0.add_(0)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()


def test_no_output_outlives_its_backward() -> None:
    layer, x = rnnattn.LSTM(3, 4), torch.randn(5, 2, 3)
    for _ in range(3):
        y, _ = layer(x)
        loss, storage = y.square().sum(), y.untyped_storage()
        watched = weakref.ref(storage)
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
        del y, storage
        gc.collect()
        assert watched() is None
