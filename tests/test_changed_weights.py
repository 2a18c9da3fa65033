"""What programs do to the weights of modules between calls: results and gradients stay torch.nn's.

Elsewhere: results that follow the weights on every backend (test_stale_weights), torch.func (test_torch_func).
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BF16, F32, F64
from tolerances import close
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from twins import TABLE, hh, inputs, loss_of, pair_of, same, scale, smaller, train

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
each = pytest.mark.parametrize("name", TABLE)
Stage = Callable[[Any], Any]  # changes a module, or returns another one in its place


def on_each(change: Callable[[Any, str, Any], Any]) -> Stage:
    """A stage that calls `change` with the module, a parameter's name, and the parameter."""
    return torch.no_grad()(lambda m: [change(m, key, p) for key, p in list(m.named_parameters())])


def reparametrized(parametrization: Callable[[nn.Module, str], Any]) -> list[Stage]:
    def assign(module: nn.Module) -> None:  # orthogonal columns, as one of the parametrizations wants them
        setattr(module, hh(module), torch.linalg.qr(torch.randn_like(getattr(module, hh(module))))[0])

    begin, end = lambda m: parametrization(m, hh(m)), lambda m: parametrize.remove_parametrizations(m, hh(m))
    return [begin, scale, assign, scale, end, scale]


def drop_in_a_hook(module: Any) -> None:
    """As dropout of recurrent weights is often written: a parameter of another name, the weight set before calls."""
    module.raw, module.calls = nn.Parameter(module._parameters.pop(hh(module)).detach()), 0

    def drop(module: Any, _: Any) -> None:
        module.calls += 1
        keep = torch.rand(module.raw.shape, generator=torch.Generator().manual_seed(module.calls)) > 0.3
        setattr(module, hh(module), module.raw * keep)

    module.register_forward_pre_hook(drop)


def tie(module: nn.Module, key: str, p: Tensor) -> None:
    """One tensor for what two directions or two layers have of one shape, and for the two biases of a step."""
    for other in (key.replace("bias_ih", "bias_hh"), f"{key}_reverse", key.replace("l0", "l1")):
        if other != key and getattr(getattr(module, other, None), "shape", None) == p.shape:
            setattr(module, other, getattr(module, key))


def odd_view(t: Tensor) -> Tensor:
    """The same numbers in a larger buffer, from an odd element on."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


def frozen(*which: int) -> Stage:
    return lambda m: [p.requires_grad_(n not in which) for n, p in enumerate(m.parameters())]


def saved(what: Any) -> Any:
    torch.save(what, file := io.BytesIO())
    return torch.load(io.BytesIO(file.getvalue()), weights_only=isinstance(what, dict))


def optimized(**how: bool) -> Stage:
    def steps(module: nn.Module) -> None:
        optimizer = torch.optim.Adam(module.parameters(), 0.05, **how)
        for _ in range(3):
            train(module, inputs(module)), optimizer.step()

    return steps


STAGES: dict[str, list[Stage]] = {
    "weight_norm": reparametrized(parametrizations.weight_norm),
    "spectral_norm": reparametrized(parametrizations.spectral_norm),  # each look at the weight changes its vectors
    "orthogonal": reparametrized(parametrizations.orthogonal),
    "weight_norm by a hook": [
        lambda m: nn.utils.weight_norm(m, hh(m)), scale, lambda m: nn.utils.remove_weight_norm(m, hh(m)), scale,
    ],
    "a weight made by a hook": [drop_in_a_hook, scale],
    "pruned": [
        lambda m: prune.l1_unstructured(m, hh(m), 0.4), scale, lambda m: prune.ln_structured(m, hh(m), 0.3, 2, 0),
        scale, lambda m: prune.remove(m, hh(m)), scale,
    ],
    "tied": [on_each(tie), scale, copy.deepcopy, scale],
    "frozen": [frozen(*range(99)), *(frozen(n) for n in range(5)), *(frozen(*{*range(99)} - {n}) for n in range(5))],
    "initialized": [on_each(lambda m, key, p: nn.init.normal_(p)), on_each(lambda m, key, p: nn.init.ones_(p))],
    "replaced": [on_each(lambda m, key, p: setattr(m, key, nn.Parameter(p * 0.7))), scale],
    "other dtypes and back": [lambda m: [m.to(t)(inputs(m)) for t in (F32, F32, BF16, BF16, F64)]],
    "data": [on_each(lambda m, key, p: p.data.copy_(p.flip(0))), on_each(lambda m, key, p: p.set_(odd_view(p)))],
    "loaded": [
        lambda m: m.load_state_dict(smaller(m)), lambda m: m.load_state_dict(smaller(m), assign=True),
        lambda m: m.load_state_dict(saved(smaller(m))),
    ],
    "from a vector": [lambda m: nn.utils.vector_to_parameters(torch.linspace(-1, 1, 2000, dtype=F64), m.parameters())],
    "Adam": [optimized(), optimized(foreach=True), optimized(fused=True)],
    "copies": [copy.deepcopy, scale, lambda m: pickle.loads(pickle.dumps(m)), scale, saved, scale, copy.copy, scale],
}  # fmt: skip


@pytest.mark.parametrize("stages", STAGES.values(), ids=STAGES)
@each
def test_what_is_done_to_weights_is_followed(name: str, stages: list[Stage]) -> None:
    pair = pair_of(name)
    same(*pair)
    for stage in stages:
        for n, module in enumerate(pair):
            torch.manual_seed(3)
            other = stage(module)
            pair[n] = other if isinstance(other, nn.Module) else module
        same(*pair)


@each
def test_a_copy_in_the_middle_of_training_is_its_own(name: str) -> None:
    theirs, ours = pair_of(name)
    same(theirs, ours), ours.zero_grad()
    x = inputs(ours)
    pending, other = ours(x), copy.deepcopy(ours)
    want = train(theirs, x)
    close(train(other, x), want)
    assert all(p.grad is None for p in ours.parameters())
    loss_of(pending).backward()
    close({key: p.grad for key, p in ours.named_parameters()}, {key: want[key] for key, _ in ours.named_parameters()})
    scale(other), same(theirs, ours)
    scale(theirs), same(theirs, other)
