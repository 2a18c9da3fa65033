"""Direct calls in other forms than a batch of one length: one row, rows of different lengths, autocast, dropout."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from cases import BF16, F32, backend_parameters
from direct_layers import LAYERS, H, I, arguments, each_layer, twins
from tolerances import close
from torch.nn.utils.rnn import pack_padded_sequence
from twins import flat

import rnnattn

pytestmark = pytest.mark.parametrize("backend", backend_parameters("cpp"))


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@each_layer
def test_one_row_without_a_batch(name: str, given: bool, taken: list[bool]) -> None:
    theirs, ours = twins(name)
    for _ in range(2):
        x, *hx = arguments(ours, B=1, given=given, grad=True)
        rows = 0 if x.dim() == 2 or ours.batch_first else 1
        states = [h.select(0 if x.dim() == 2 else 1, 0) for h in flat(hx)]
        call = [x.select(rows, 0), *([tuple(states)] if len(states) == 2 else states)]
        want, got = flat(theirs(*call)), flat(ours(*call))
        close(got, want)
        cotangents, inputs = [torch.randn_like(t) for t in want], [x, *flat(hx)]
        close(
            torch.autograd.grad(got, [*inputs, *ours.parameters()], cotangents),
            torch.autograd.grad(want, [*inputs, *theirs.parameters()], cotangents),
        )
    assert taken == [True]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", [name for name in LAYERS if "cell" not in name])
def test_rows_of_different_lengths(name: str, packed: bool, taken: list[bool]) -> None:
    """Bit for bit what the long way gives."""
    _, ours = twins(name)
    lengths, results = torch.tensor([2, 4, 3]), []
    x, *hx = arguments(ours, T=4, B=3, grad=True)
    if not packed:
        lengths[2] = 0
    for _ in range(3):
        if packed:
            given = pack_padded_sequence(x, lengths, ours.batch_first, enforce_sorted=False)
            y, states = ours(given, *hx)
            outputs = [y.data, *flat(states)]
        else:
            outputs = flat(ours(x, *hx, lengths=lengths))
        loss = sum(t.square().sum() for t in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, [x, *flat(hx), *ours.parameters()])])
        with torch.no_grad():
            assert torch.equal(flat(ours(x, *hx, lengths=lengths))[0], flat(ours(x, *hx, lengths=lengths.tolist()))[0])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    assert taken == [True] * 8
    for wrong in ([2, 4, 5], [2, -1, 3], [2, 4], torch.tensor([2.0, 4.0, 3.0])):
        with pytest.raises((TypeError, ValueError), match="lengths: expected"):
            ours(x, *hx, lengths=wrong)


@pytest.mark.parametrize("low", [BF16, torch.float16])
@each_layer
def test_autocast(name: str, low: torch.dtype, taken: list[bool]) -> None:
    """Bit for bit what the long way gives, for inputs of its type and of fp32; float64 is left to that."""
    _, ours = twins(name, F32)
    with torch.autocast("cpu", low):
        ours(*arguments(ours))
        for cast in (False, True):
            x, *hx = arguments(ours, grad=True)
            call, results = [x.to(low) if cast else x, *hx], []
            for direct_is_set in (True, False):
                ours._direct = ours._direct if direct_is_set else None
                outputs = flat(ours(*call))
                assert all(t.dtype == low for t in outputs)
                loss = sum(t.float().square().sum() for t in outputs)
                results.append([*outputs, *torch.autograd.grad(loss, [x, *flat(hx), *ours.parameters()])])
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        assert taken == [True] * 2
        with pytest.raises(RuntimeError):
            ours(x.double(), *hx)
    assert flat(ours(*arguments(ours)))[0].dtype == F32


def test_autocast_casts_weights_once_while_it_lasts(taken: list[bool]) -> None:
    """As torch's layers; and a cast that was made without gradients is of no use with them."""
    cell, x = rnnattn.GRUCell(I, H), torch.randn(3, I)
    with torch.autocast("cpu", BF16):
        with torch.no_grad():
            cell(x), cell(x)
        h = None
        for _ in range(3):
            h = cell(x, h)
        nodes, seen = [h.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is not None and node not in seen:
                seen.add(node)
                nodes += [other for other, _ in node.next_functions]
        accumulated = [node for node in seen if node.name().endswith("AccumulateGrad")]
        casts = [node for node in seen if node.name().startswith("ToCopy")]
        h.float().sum().backward()
    assert len(accumulated) == 4 and all(p.grad.abs().sum() > 0 for p in cell.parameters())
    assert len(casts) <= 4 * 3 and taken == [True] * 4


@pytest.mark.parametrize("dropout", [0.5, 1, 0.0])
@pytest.mark.parametrize("name", ["stack", "gru stack"])
def test_a_seed_drops_the_same(name: str, dropout: float, taken: list[bool]) -> None:
    theirs, ours = twins(name)
    results = []
    for module in (ours, ours, theirs):
        module.dropout = dropout
        torch.manual_seed(4)
        x, *hx = given = arguments(module, T=5, B=3, grad=True)
        outputs = flat(module(*given))
        results.append([*outputs, *torch.autograd.grad(sum(t.square().sum() for t in outputs), flat(given))])
    close(results[1], results[0]), close(results[1], results[2])
    assert taken == [True]
    for module in (theirs, ours):
        module.eval()
    close(flat(ours(x, *hx)), flat(theirs(x, *hx)))
    assert taken == [True, True]


@pytest.mark.parametrize("dropout", [1.5, -0.5, float("nan"), "0.5", None])
def test_a_dropout_that_is_none(dropout: Any, taken: list[bool]) -> None:
    """It raises what torch.nn's raises."""
    theirs, ours = twins("stack")
    x, *hx = arguments(ours)
    ours(x, *hx)
    theirs.dropout = ours.dropout = dropout
    with pytest.raises((TypeError, RuntimeError)) as expected:
        theirs(x, *hx)
    number = isinstance(dropout, float)
    with pytest.raises(expected.type, match=re.escape(str(expected.value)) if number else None):
        ours(x, *hx)
    assert taken == [False]
