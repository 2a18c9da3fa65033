"""Nested (jagged) tensors in and out: the results and gradients of every row by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import F64
from tolerances import close
from torch import Tensor

import rnnattn

pytestmark = [pytest.mark.usefixtures("chosen"), pytest.mark.filterwarnings("ignore")]
I, H = 3, 4
LENGTHS = (4, 0, 2, 1)
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lstm": (rnnattn.LSTM, {}),
    "lstm_stack": (rnnattn.LSTM, {"num_layers": 2, "bidirectional": True, "batch_first": True, "proj_size": 2}),
    "gru": (rnnattn.GRU, {"bidirectional": True}),
    "rnn": (rnnattn.RNN, {"batch_first": True}),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def jagged(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def made(kind: str) -> Any:
    build, settings = KINDS[kind]
    return build(I, H, dtype=F64, **settings)


def each(states: Any) -> list[Tensor]:
    return [states] if isinstance(states, Tensor) else list(states)


def gradients(outputs: list[Tensor], leaves: list[Tensor], cotangents: list[Tensor]) -> Any:
    pairs = [(y, d) for y, d in zip(outputs, cotangents, strict=True) if y.requires_grad]  # not those of no step
    ends, given = zip(*pairs, strict=True)
    return torch.autograd.grad(ends, leaves, given, allow_unused=True, materialize_grads=True)


@each_kind
@pytest.mark.parametrize("with_states", [False, True], ids=["zeros", "states"])
def test_rows_are_what_they_are_alone(kind: str, with_states: bool) -> None:
    module = made(kind)
    rows = [torch.randn(n, I, dtype=F64, requires_grad=True) for n in LENGTHS]
    LK, R = module.num_layers * (1 + module.bidirectional), module.proj_size or H
    initial = [torch.randn(LK, len(rows), n, dtype=F64, requires_grad=True) for n in (R, H)][: len(module._names)]
    hx = None if not with_states else initial[0] if len(initial) == 1 else tuple(initial)
    leaves = [*rows, *module.parameters(), *(initial if with_states else [])]
    for _ in range(2):
        x = jagged(rows)
        y, states = module(x, hx)
        assert y.is_nested and y.layout == torch.jagged
        outputs = [*y.unbind(), *each(states)]
        alone: list[Tensor] = []
        finals: list[list[Tensor]] = []
        for b, row in enumerate(rows):
            own = None if hx is None else [s[:, b] for s in initial]
            if len(row):
                result, state = module(row, own if own is None or len(own) > 1 else own[0])
            else:  # a row without steps has no outputs and keeps its states
                result = row.new_zeros(0, R * (1 + module.bidirectional))
                state = own if own is not None else [row.new_zeros(LK, n) for n in (R, H)][: len(initial)]
            alone.append(result)
            finals.append(each(state))
        want = [*alone, *(torch.stack(parts, 1) for parts in zip(*finals, strict=True))]
        close(outputs, want)
        cotangents = [torch.randn_like(t) for t in want]
        close(gradients(outputs, leaves, cotangents), gradients(want, leaves, cotangents))


def test_the_result_goes_with_the_input() -> None:
    """Their lengths are one and the same, which operations on both ask for; and a model goes on with it."""
    module, pool = rnnattn.GRU(I, I, dtype=F64), rnnattn.AttentionPool(I, "additive", 5, dtype=F64)
    x = jagged([torch.randn(n, I, dtype=F64) for n in LENGTHS])
    y, _ = module(x)
    close(
        [t.detach() for t in (x + y).unbind()], [(a + b).detach() for a, b in zip(x.unbind(), y.unbind(), strict=True)]
    )
    pooled, weights = pool(torch.tanh(y), return_weights=True)
    padded, lengths = torch.nested.to_padded_tensor(torch.tanh(y), 0.0), torch.tensor(LENGTHS)
    want, want_weights = pool(padded, lengths=lengths, return_weights=True)
    close(pooled, want)
    assert weights.is_nested
    close(list(weights.unbind()), [w[:n] for w, n in zip(want_weights, LENGTHS, strict=True)])


def test_what_is_wrong_is_named() -> None:
    module, rows = rnnattn.LSTM(I, H), [torch.randn(n, I) for n in (3, 2)]
    x = jagged(rows)
    pool = rnnattn.AttentionPool(I)
    for call, message in (
        (lambda: module(x, lengths=[3, 2]), "LSTM: expected no lengths with a nested tensor; pad it"),
        (lambda: module(x, resets=torch.ones(3, 2) > 0), "LSTM: expected no resets with a nested tensor"),
        (lambda: pool(x, mask=torch.ones(2, 3) > 0), "AttentionPool: expected no mask with a nested tensor"),
        (lambda: module(torch.nested.nested_tensor(rows)), "expected a nested tensor of layout torch.jagged, got"),
        (lambda: module(x.transpose(1, 2)), r"expected a nested tensor \[B, j, features\]"),
        (lambda: module(torch.nested.narrow(torch.randn(2, 5, I), 1, torch.tensor([0, 1]), torch.tensor([3, 2]),
                                            layout=torch.jagged)), "without holes between its rows"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(RuntimeError, match=r"input\.size\(-1\) must be equal to input_size"):
        module(jagged([torch.randn(3, I + 1)]))
