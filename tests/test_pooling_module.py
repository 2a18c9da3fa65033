"""AttentionPool beside the lines of PyTorch it stands for."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import F64
from tolerances import close
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

import rnnattn

pytestmark = pytest.mark.usefixtures("chosen")
I = 5


def composed(pool: rnnattn.AttentionPool, x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """What the docstring says AttentionPool is equivalent to, over x [B, T, D]; every row keeps something."""
    u = x if pool.weight is None else torch.tanh(F.linear(x, pool.weight, pool.bias))
    p = (u @ pool.v).masked_fill(~keep, -torch.inf).softmax(1)
    return (p[..., None] * x).sum(1), p


POOLS: dict[str, dict[str, Any]] = {
    "linear": {},
    "additive": {"score": "additive"},
    "narrow": {"score": "additive", "attention_size": 3},
    "no bias": {"score": "additive", "attention_size": 2, "bias": False},
}
pools = pytest.mark.parametrize("options", POOLS.values(), ids=POOLS)


@pools
def test_pool(options: dict[str, Any]) -> None:
    pool = rnnattn.AttentionPool(I, **options, dtype=F64)
    x = torch.randn(3, 4, I, dtype=F64, requires_grad=True)
    keep = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0], [1, 1, 1, 1]]).bool()
    for got, kept in (
        (pool(x, return_weights=True), torch.ones_like(keep)),
        (pool(x, mask=keep, return_weights=True), keep),
        (pool(x, lengths=[4, 2, 1], return_weights=True), torch.arange(4) < torch.tensor([[4], [2], [1]])),
    ):
        want = composed(pool, x, kept)
        close(got, want)
        leaves, cotangents = [x, *pool.parameters()], [torch.randn_like(value) for value in want]
        close(torch.autograd.grad(got, leaves, cotangents), torch.autograd.grad(want, leaves, cotangents))
    close(pool(x), composed(pool, x, torch.ones_like(keep))[0])


@pools
def test_pool_forms_agree(options: dict[str, Any]) -> None:
    """Unbatched, time first and packed give what the padded batch gives."""
    pool = rnnattn.AttentionPool(I, **options, dtype=F64)
    rows = [torch.randn(n, I, dtype=F64) for n in (3, 5, 1)]
    x, lengths = pad_sequence(rows, batch_first=True), torch.tensor([3, 5, 1])
    want, weights = pool(x, lengths=lengths, return_weights=True)
    for n, row in enumerate(rows):
        pooled, p = pool(row, return_weights=True)
        close((pooled, p), (want[n], weights[n, : len(row)]))
        close(pool(x[n], mask=torch.arange(5) < len(row)), want[n])
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    close(pool(packed, return_weights=True), (want, weights))
    time_first = rnnattn.AttentionPool(I, **options, batch_first=False, dtype=F64)
    time_first.load_state_dict(pool.state_dict())
    close(time_first(x.transpose(0, 1), lengths=lengths, return_weights=True), (want, weights))


def test_pool_is_what_users_write() -> None:
    """`Linear -> softmax -> sum` and `Linear -> Tanh -> Linear`, parameters taken over; the scores' bias cancels."""
    x = torch.randn(3, 4, I, dtype=F64)
    linear = nn.Linear(I, 1, dtype=F64)
    pool = rnnattn.AttentionPool(I, dtype=F64)
    pool.load_state_dict({"v": linear.weight[0]})
    close(pool(x), (linear(x).softmax(1) * x).sum(1))
    scores = nn.Sequential(nn.Linear(I, 3), nn.Tanh(), nn.Linear(3, 1, bias=False)).to(F64)
    additive = rnnattn.AttentionPool(I, "additive", 3, dtype=F64)
    additive.load_state_dict({"v": scores[2].weight[0], "weight": scores[0].weight, "bias": scores[0].bias})
    close(additive(x), (scores(x).softmax(1) * x).sum(1))


def test_pool_repr_and_initial_values() -> None:
    assert repr(rnnattn.AttentionPool(5)) == "AttentionPool(5, score=linear)"
    pool = rnnattn.AttentionPool(100, "additive", 25, bias=False, batch_first=False)
    assert repr(pool) == "AttentionPool(100, score=additive, attention_size=25, bias=False, batch_first=False)"
    assert pool.v.abs().max() <= 0.2 and pool.weight.abs().max() <= 0.1  # 1 / sqrt(fan in)
    assert pool.v.abs().max() > 0.15 and pool.weight.abs().max() > 0.09
    other = copy.deepcopy(pool)
    x = torch.randn(4, 2, 100)
    assert torch.equal(pickle.loads(pickle.dumps(pool))(x), other(x))
