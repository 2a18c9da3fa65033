"""The reference is the specification: here it is held against torch.nn, autograd and finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import F64
from pool_cases import POOL_CASES, PoolCase
from recurrent_cases import MODES, RECURRENT_CASES, RecurrentCase
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from rnnattn import reference
from rnnattn.reference import CELLS

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "stack": {"num_layers": 3},
    "bidirectional": {"bidirectional": True},
    "projection": {"proj_size": 3},
    "all": {"num_layers": 2, "bidirectional": True, "bias": False},
    "all, projection": {"num_layers": 2, "bidirectional": True, "proj_size": 2, "bias": False},
}
KINDS = {
    "LSTM": nn.LSTM,
    "GRU": nn.GRU,
    "RNN_TANH": nn.RNN,
    "RNN_RELU": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
}


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


def _layers(module: nn.RNNBase, x: Tensor, states: list[Tensor], lengths: Any = None) -> list[Tensor]:
    """The reference's layers, stacked by hand: y and the final states."""
    K, per_layer = 2 if module.bidirectional else 1, len(module._flat_weights) // module.num_layers
    direction = "bidirectional" if module.bidirectional else "forward"
    finals: list[list[Tensor]] = []
    for n in range(module.num_layers):
        weights = list(module._flat_weights[n * per_layer : (n + 1) * per_layer])
        h0, c0 = (states[i][n * K : (n + 1) * K] if i < len(states) else None for i in range(2))
        x, *rest = reference.recurrent_layer_forward(
            x, h0, c0, weights, lengths, None, False, module.bias, direction, module.mode
        )
        finals.append(rest[: len(states)])
    return [x, *(torch.cat(parts) for parts in zip(*finals, strict=True))]


@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    "mode, options",
    [
        pytest.param(mode, options, id=f"{mode.lower()}-{name}")
        for mode in MODES
        for name, options in OPTIONS.items()
        if mode == "LSTM" or "proj_size" not in options
    ],
)
def test_layers_are_torchs(mode: str, options: dict[str, Any], ragged: bool) -> None:
    """Outputs and every gradient, with random states and cotangents."""
    B, T, I, H, lengths = 4, 6, 3, 5, torch.tensor([4, 6, 1, 3])
    module = KINDS[mode](I, H, dtype=F64, **options)
    LK, R = module.num_layers * (2 if module.bidirectional else 1), module.proj_size or H
    shapes = [(T, B, I), (LK, B, R), *([(LK, B, H)] if CELLS[mode].has_c else [])]
    x, *states = leaves = [torch.randn(s, dtype=F64, requires_grad=True) for s in shapes]
    given = tuple(states) if CELLS[mode].has_c else states[0]
    if ragged:
        packed, finals = module(pack_padded_sequence(x, lengths, enforce_sorted=False), given)
        y = pad_packed_sequence(packed)[0]
    else:
        y, finals = module(x, given)
    want = [y, *(finals if CELLS[mode].has_c else [finals])]
    got = _layers(module, x, states, lengths if ragged else None)
    close(got, want)
    leaves, cotangents = [*leaves, *module.parameters()], [torch.randn_like(value) for value in want]
    close(torch.autograd.grad(got, leaves, cotangents), torch.autograd.grad(want, leaves, cotangents))


@pytest.mark.parametrize("mode", MODES)
def test_a_lone_reverse_layer_is_half_a_bidirectional_one(mode: str) -> None:
    case = RecurrentCase(3, 5, 4, 6, "", mode, direction="bidirectional", lengths=(5, 0, 3), resets="some", states=True)
    t, has_c = case.tensors(F64), case.has_c
    settings = t["lengths"], t["resets"], False, True
    both = reference.recurrent_layer_forward(
        t["x"], t["h0"], t.get("c0"), t["weights"], *settings, "bidirectional", mode
    )
    back = reference.recurrent_layer_forward(
        t["x"], t["h0"][1:], t["c0"][1:] if has_c else None, t["weights"][4:], *settings, "reverse", mode
    )
    close(back[0], both[0][..., 6:])
    close(back[1:], [value[1:] for value in both[1:]])


@pytest.mark.parametrize("mode", MODES)
def test_no_steps(mode: str) -> None:
    """T=0: the states come back, and what is saved is as empty as it should be."""
    case = RecurrentCase(3, 0, 4, 6, "", mode, direction="bidirectional", resets="every", states=True)
    t, cell = case.tensors(F64), CELLS[mode]
    inputs = (t["x"], t["h0"], t.get("c0"), t["weights"], None, t["resets"], False)
    y, h_n, c_n, gates, cells = reference.recurrent_layer_forward(*inputs, True, "bidirectional", mode)
    assert y.shape == (0, 3, 12) and torch.equal(h_n, t["h0"])
    assert not cell.has_c or (torch.equal(c_n, t["c0"]) and cells.shape == (2, 0, 3, 6))
    assert not cell.saved or gates.shape == (2, 0, 3, 24)
    dx, dh0, _, dweights = reference.recurrent_layer_backward(
        t["dy"], t["dh_n"], None, None, *inputs, y, gates, cells, True, "bidirectional", mode
    )
    assert dx.shape == (0, 3, 4) and torch.equal(dh0, t["dh_n"])
    assert not any(d.any() for d in dweights)


SINGLE = [
    case for case in RECURRENT_CASES if case.layers == 1 and case.layout in ("contiguous", "strided") and case.T < 10
]


@pytest.mark.parametrize("case", SINGLE, ids=lambda case: case.id)
def test_explicit_backward_is_autograds(case: RecurrentCase) -> None:
    t = case.tensors(F64)
    names = ["x", *case.initial_of.values()]
    leaves = [p.detach().requires_grad_() for p in (*(t[name] for name in names), *t["weights"])]
    x, h0, *rest = leaves
    c0, weights = (rest[0], rest[1:]) if case.has_c else (None, rest)
    lengths = torch.tensor(case.lengths, dtype=torch.int64) if case.lengths is not None else None
    arguments = (x, h0, c0, weights, lengths, t["resets"], case.to_initial)
    settings = (case.bias, case.direction, case.mode)
    y, h_n, c_n, gates, cells = reference.recurrent_layer_forward(*arguments, *settings)
    outputs = {"y": y, "h_n": h_n} | ({"c_n": c_n} if case.has_c else {})
    if case.cells:  # as the operator has them: [K, T, B, H]
        outputs["cells"] = reference.zero_invalid(cells, lengths)
        t["dcells"] = t["dcells"].unflatten(-1, (case.directions, case.H)).movedim(2, 0)
    given = [name for name in case.cotangents if name in outputs]
    dy = torch.where(case.valid()[..., None], t["dy"], 0)  # autograd's own 0 * NaN is not under test
    cotangents = [dy if name == "y" else t["d" + name] for name in given]
    want = torch.autograd.grad([outputs[name] for name in given], leaves, cotangents)
    dx, dh0, dc0, dweights = reference.recurrent_layer_backward(
        *(t["d" + name] if name in given else None for name in ("y", "h_n", "c_n", "cells")),
        *arguments, y.detach(), gates.detach(), cells.detach(), *settings,
    )  # fmt: skip
    if case.bias and CELLS[case.mode].shared:  # one gradient serves both biases
        n = len(dweights) // case.directions
        dweights = [d for k in range(0, len(dweights), n) for d in (*dweights[k : k + 3], *dweights[k + 2 : k + n])]
    close([dx, dh0, *([dc0] if case.has_c else []), *dweights], want)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("resets", ["", "some"], ids=["whole", "episodes"])
def test_gradcheck_layer(mode: str, direction: str, resets: str) -> None:
    R = 2 if mode == "LSTM" else 0
    case = RecurrentCase(
        3, 3, 2, 3, "", mode, R=R, direction=direction, lengths=(3, 0, 2), resets=resets, to_initial=True, states=True
    )
    t, n = case.tensors(F64), len(case.initial_of)

    def layer(x: Any, h0: Any, *rest: Any) -> Any:
        c0, weights = (rest[0], list(rest[1:])) if n == 2 else (None, list(rest))
        results = reference.recurrent_layer_forward(
            x, h0, c0, weights, t["lengths"], t["resets"], case.to_initial, True, direction, mode
        )
        return results[: 1 + n]

    inputs = (t["x"], *(t[name] for name in case.initial_of.values()), *t["weights"])
    assert torch.autograd.gradcheck(layer, [p.requires_grad_() for p in inputs])


@pytest.mark.parametrize("case", [case for case in POOL_CASES if case.T > 0 and case.B > 0], ids=lambda case: case.id)
def test_pooling_is_a_masked_softmax(case: PoolCase) -> None:
    """Forward against torch's operations, backward against autograd through them."""
    t, clean, keep = case.tensors(F64), case.tensors(F64, poisoned=False), case.kept()
    leaves = {"x": torch.where(keep[..., None], clean["x"], 0), "v": t["v"], "w": t["w"], "b": t["b"]}
    leaves = {name: p.detach().clone().requires_grad_() for name, p in leaves.items() if p is not None}
    x, v = leaves["x"], leaves["v"]
    scores = torch.tanh(F.linear(x, leaves["w"], leaves.get("b"))) @ v if case.A else x @ v
    rows = keep.any(1)
    p = torch.zeros_like(scores)
    p[rows] = scores[rows].masked_fill(~keep[rows], -torch.inf).softmax(1)
    pooled = torch.einsum("bt,btd->bd", p, x)
    lengths = torch.tensor(case.lengths, dtype=torch.int64) if case.lengths is not None else None
    inputs = (t["x"], t["v"], t["w"], t["b"], lengths, t["mask"])
    got_pooled, got_p, lse = reference.attention_pool_forward(*inputs)
    close((got_pooled, got_p), (pooled.detach(), p.detach()))
    close(lse[rows], scores.detach()[rows].masked_fill(~keep[rows], -torch.inf).logsumexp(1))
    assert (lse[~rows] == -torch.inf).all()
    if "p" in case.cotangents:
        want = torch.autograd.grad([pooled, p], list(leaves.values()), [clean["dpooled"], clean["dp"]])
        got = reference.attention_pool_backward(t["dpooled"], t["dp"], *inputs, got_pooled, lse)
    else:
        want = torch.autograd.grad(pooled, list(leaves.values()), clean["dpooled"])
        got = reference.attention_pool_backward(t["dpooled"], None, *inputs, got_pooled, lse)
    close([d for d in got if d is not None], [torch.where(keep[..., None], want[0], 0), *want[1:]])


@pytest.mark.parametrize("A", [0, 2], ids=["linear", "additive"])
def test_gradcheck_pooling(A: int) -> None:
    t = PoolCase(2, 3, 3, A, "", mask="holes").tensors(F64)

    def pool(x: Any, v: Any, w: Any = None, b: Any = None) -> Any:
        return reference.attention_pool_forward(x, v, w, b, None, t["mask"])

    assert torch.autograd.gradcheck(pool, [t[k].requires_grad_() for k in ("x", "v", "w", "b") if t[k] is not None])
