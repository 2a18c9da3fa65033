"""The reference is the specification: here it is held against torch.nn, autograd and finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import F64, LSTM_CASES, POOL_CASES, LSTMCase, PoolCase
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from rnnattn import reference

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "stack": {"num_layers": 3},
    "bidirectional": {"bidirectional": True},
    "projection": {"proj_size": 3},
    "all": {"num_layers": 2, "bidirectional": True, "proj_size": 2, "bias": False},
}


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


def _layers(module: nn.LSTM, x: torch.Tensor, h0: torch.Tensor, c0: torch.Tensor, lengths: Any = None) -> Any:
    """The reference's layers, stacked by hand."""
    K, per_layer = 2 if module.bidirectional else 1, len(module._flat_weights) // module.num_layers
    direction = "bidirectional" if module.bidirectional else "forward"
    h_n, c_n = [], []
    for n in range(module.num_layers):
        weights = list(module._flat_weights[n * per_layer : (n + 1) * per_layer])
        states = slice(n * K, (n + 1) * K)
        x, h, c, _, _ = reference.lstm_layer_forward(
            x, h0[states], c0[states], weights, lengths, module.bias, direction
        )
        h_n.append(h)
        c_n.append(c)
    return x, torch.cat(h_n), torch.cat(c_n)


@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_lstm_is_torchs(options: dict[str, Any], ragged: bool) -> None:
    """Outputs and every gradient, with random states and cotangents."""
    B, T, I, H, lengths = 4, 6, 3, 5, torch.tensor([4, 6, 1, 3])
    module = nn.LSTM(I, H, dtype=F64, **options)
    LK, R = module.num_layers * (2 if module.bidirectional else 1), module.proj_size or H
    x, h0, c0 = (torch.randn(s, dtype=F64, requires_grad=True) for s in ((T, B, I), (LK, B, R), (LK, B, H)))
    if ragged:
        packed, states = module(pack_padded_sequence(x, lengths, enforce_sorted=False), (h0, c0))
        want = (pad_packed_sequence(packed)[0], *states)
    else:
        y, states = module(x, (h0, c0))
        want = (y, *states)
    got = _layers(module, x, h0, c0, lengths if ragged else None)
    close(got, want)
    leaves, cotangents = [x, h0, c0, *module.parameters()], [torch.randn_like(value) for value in want]
    close(torch.autograd.grad(got, leaves, cotangents), torch.autograd.grad(want, leaves, cotangents))


def test_a_lone_reverse_layer_is_half_a_bidirectional_one() -> None:
    case = LSTMCase(3, 5, 4, 6, "", direction="bidirectional", lengths=(5, 0, 3), states=True)
    t = case.tensors(F64)
    both = reference.lstm_layer_forward(t["x"], t["h0"], t["c0"], t["weights"], t["lengths"], True, "bidirectional")
    back = reference.lstm_layer_forward(
        t["x"], t["h0"][1:], t["c0"][1:], t["weights"][4:], t["lengths"], True, "reverse"
    )
    close(back[0], both[0][..., 6:])
    close(back[1:], [value[1:] for value in both[1:]])


SINGLE = [case for case in LSTM_CASES if case.layers == 1 and case.layout in ("contiguous", "strided") and case.T < 10]


@pytest.mark.parametrize("case", SINGLE, ids=lambda case: case.id)
def test_explicit_backward_is_autograds(case: LSTMCase) -> None:
    t = case.tensors(F64)
    leaves = [t["x"].detach(), t["h0"], t["c0"], *t["weights"]]
    leaves = [p.detach().requires_grad_() for p in leaves]
    x, h0, c0, *weights = leaves
    lengths = torch.tensor(case.lengths, dtype=torch.int64) if case.lengths is not None else None
    arguments = (x, h0, c0, weights, lengths)
    y, h_n, c_n, gates, cells = reference.lstm_layer_forward(*arguments, case.bias, case.direction)
    given = {"y": y, "h_n": h_n, "c_n": c_n}
    dy = torch.where(case.valid()[..., None], t["dy"], 0)  # autograd's own 0 * NaN is not under test
    cotangents = [dy if name == "y" else t["d" + name] for name in case.cotangents]
    want = torch.autograd.grad([given[name] for name in case.cotangents], leaves, cotangents)
    dx, dh0, dc0, dweights = reference.lstm_layer_backward(
        *(t["d" + name] if name in case.cotangents else None for name in given),
        *arguments, y.detach(), gates.detach(), cells.detach(), case.bias, case.direction,
    )  # fmt: skip
    if case.bias:  # one gradient serves both biases
        n = len(dweights) // case.directions
        dweights = [d for k in range(0, len(dweights), n) for d in (*dweights[k : k + 3], *dweights[k + 2 : k + n])]
    close([dx, dh0, dc0, *dweights], want)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_gradcheck_lstm(direction: str) -> None:
    case = LSTMCase(3, 3, 2, 3, "", R=2, direction=direction, lengths=(3, 0, 2), states=True)
    t = case.tensors(F64)

    def layer(x: Any, h0: Any, c0: Any, *weights: Any) -> Any:
        return reference.lstm_layer_forward(x, h0, c0, list(weights), t["lengths"], True, direction)[:3]

    assert torch.autograd.gradcheck(layer, [p.requires_grad_() for p in (t["x"], t["h0"], t["c0"], *t["weights"])])


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
