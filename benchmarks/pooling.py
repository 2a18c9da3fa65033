"""rnnattn.AttentionPool against what people write: eager PyTorch, compiled, and attention with one query."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import rnnattn
from benchmarks.cases import DTYPES, PoolCase, ragged_lengths
from benchmarks.measure import Experiment, Peer

Form = Callable[..., Tensor]


def weights(x: Tensor, v: Tensor, w: Tensor | None, b: Tensor | None, keep: Tensor | None) -> Tensor:
    """p [B, T] for x [B, T, D]; keep is bool [B, T], True = keep."""
    scores = x @ v if w is None else torch.tanh(F.linear(x, w, b)) @ v
    return (scores if keep is None else scores.masked_fill(~keep, -torch.inf)).softmax(1)


def bmm_form(x: Tensor, v: Tensor, w: Tensor | None, b: Tensor | None, keep: Tensor | None) -> Tensor:
    return torch.bmm(weights(x, v, w, b, keep).unsqueeze(1), x).squeeze(1)


def sum_form(x: Tensor, v: Tensor, w: Tensor | None, b: Tensor | None, keep: Tensor | None) -> Tensor:
    return (weights(x, v, w, b, keep).unsqueeze(-1) * x).sum(1)


def one_query_attention(x: Tensor, v: Tensor, w: None, b: None, keep: Tensor | None) -> Tensor:
    """Linear scores only: v is the query, x the keys and the values."""
    B, T, D = x.shape
    query, keys = v.expand(B, 1, 1, D), x.unsqueeze(1)
    mask = None if keep is None else keep.view(B, 1, 1, T)
    return F.scaled_dot_product_attention(query, keys, keys, attn_mask=mask, scale=1.0).view(B, D)


def experiment(case: PoolCase, device: torch.device) -> Experiment:
    """The peers are given a ready mask, ours the lengths."""
    torch.manual_seed(0)
    torch.compiler.reset()  # of forms compiled for earlier cases: a function is compiled a few times only
    dtype = DTYPES[case.dtype]
    pool = rnnattn.AttentionPool(case.D, case.score, case.A or None, device=device, dtype=dtype)
    x = torch.randn(case.B, case.T, case.D, device=device, dtype=dtype, requires_grad=True)
    lengths = ragged_lengths(case.B, case.T, device) if case.ragged else None
    keep = None if lengths is None else torch.arange(case.T, device=device) < lengths[:, None]
    inputs = [x, *pool.parameters()]  # x, v and with additive scores weight, bias
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]

    def peer(name: str, kernel: str, form: Form) -> Peer:
        return Peer(name, lambda: kernel, lambda: _pooled(form, inputs, keep))

    peers = [
        peer("eager", "scores, softmax, bmm", bmm_form),
        peer("eager", "scores, softmax, sum of products", sum_form),
    ]
    if not case.A:
        peers.append(peer("SDPA", "scaled_dot_product_attention, one query", one_query_attention))
    if case.compiled:
        peers += [
            peer("torch.compile", "Inductor: scores, softmax, bmm", _compiled(bmm_form)),
            peer("torch.compile", "Inductor: scores, softmax, sum of products", _compiled(sum_form)),
        ]
    return Experiment(
        ours=lambda: pool(x, lengths=lengths),
        peers=peers,
        inputs=inputs,
        dy=torch.randn(case.B, case.D, device=device, dtype=dtype),
        exact=lambda: _pooled(bmm_form, exact_inputs, keep),
        exact_inputs=exact_inputs,
    )


def _pooled(form: Form, inputs: list[Tensor], keep: Tensor | None) -> Tensor:
    """inputs are x, v or x, v, w, b."""
    return form(*inputs, *[None] * (4 - len(inputs)), keep)


def _compiled(form: Form) -> Form:
    return torch.compile(form, fullgraph=True, dynamic=False)
