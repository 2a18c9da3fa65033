"""The operation `rnnattn::attention_pool`: softmax attention pooling over a sequence.

Shapes and equations: `rnnattn.reference.attention_pool`. The weights p are written only on request.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rnnattn import backends
from rnnattn.autocast import as_forward
from rnnattn.autograd.batched import map_one_by_one, one_by_one
from rnnattn.autograd.eager import is_eager
from rnnattn.autograd.equations import first_gradients, second_gradients
from rnnattn.autograd.outputs import returned, watched
from rnnattn.reference import accumulation_dtype, attention_pool_forward
from rnnattn.transforms import is_tracing, is_transformed, want_equations

torch.library.define(
    "rnnattn::attention_pool",
    "(Tensor x, Tensor v, Tensor? w, Tensor? b, Tensor? lengths, Tensor? mask, bool need_weights, "
    "str backend) -> (Tensor pooled, Tensor weights, Tensor lse)",
)
torch.library.define(
    "rnnattn::attention_pool_backward",
    "(Tensor? d_pooled, Tensor? d_weights, Tensor x, Tensor v, Tensor? w, Tensor? b, "
    "Tensor? lengths, Tensor? mask, Tensor pooled, Tensor lse, str backend) "
    "-> (Tensor dx, Tensor dv, Tensor dw, Tensor db)",
)


def _forward(x, v, w, b, lengths, mask, need_weights, backend):  # type: ignore[no-untyped-def]
    pooled, weights, lse = backends.get(backend).attention_pool_forward(x, v, w, b, lengths, mask, need_weights)
    return pooled, weights if need_weights else x.new_empty(0), lse


@torch.library.register_fake("rnnattn::attention_pool")
def _forward_fake(x, v, w, b, lengths, mask, need_weights, backend):  # type: ignore[no-untyped-def]
    B, T, D = x.shape
    weights = x.new_empty((B, T) if need_weights else 0)
    acc = accumulation_dtype(x.dtype)
    return x.new_empty(B, D, dtype=acc), weights, x.new_empty(B, dtype=acc)


def _backward(d_pooled, d_weights, x, v, w, b, lengths, mask, pooled, lse, backend):  # type: ignore[no-untyped-def]
    dx, dv, dw, db = backends.get(backend).attention_pool_backward(
        d_pooled, d_weights, x, v, w, b, lengths, mask, pooled, lse
    )
    return dx, dv, x.new_empty(0) if dw is None else dw, x.new_empty(0) if db is None else db


@torch.library.register_fake("rnnattn::attention_pool_backward")
def _backward_fake(d_pooled, d_weights, x, v, w, b, lengths, mask, pooled, lse, backend):  # type: ignore[no-untyped-def]
    dw, db = (x.new_empty(0 if p is None else p.shape) for p in (w, b))
    return x.new_empty(x.shape), x.new_empty(v.shape), dw, db


torch.library.impl("rnnattn::attention_pool", "CompositeExplicitAutograd", _forward)
torch.library.impl("rnnattn::attention_pool_backward", "CompositeExplicitAutograd", _backward)


class AttentionPooling(torch.autograd.Function):
    """forward(x, v, w, b, lengths, mask, need_weights, backend)."""

    @staticmethod
    def forward(x, v, w, b, lengths, mask, need_weights, backend):  # type: ignore[no-untyped-def]
        run = _forward if is_eager(x) else torch.ops.rnnattn.attention_pool
        return run(x, v, w, b, lengths, mask, need_weights, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, v, w, b, lengths, mask, need_weights, backend = inputs
        pooled, _, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, v, w, b, lengths, mask, watched(ctx, pooled, x), lse)
        ctx.need_weights, ctx.backend = need_weights, backend

    @staticmethod
    @as_forward
    def backward(ctx: Any, d_pooled, d_weights, _dlse):  # type: ignore[no-untyped-def]
        x, v, w, b, lengths, mask, pooled, lse = ctx.saved_tensors
        d_weights = d_weights if ctx.need_weights else None
        inputs, cotangents = (x, v, w, b), (d_pooled, d_weights)
        if want_equations(*cotangents, *inputs):
            return *first_gradients(_equations(lengths, mask), inputs, cotangents), None, None, None, None
        pooled = returned(ctx, pooled, lambda: _forward(*inputs, lengths, mask, False, ctx.backend)[0])
        # A gradient that is itself to be differentiated is the operator's, of which autograd knows the gradient.
        run: Any = torch.ops.rnnattn.attention_pool_backward
        if torch.is_grad_enabled() and is_transformed():
            run = PoolGradients.apply
        elif not torch.is_grad_enabled() and all(is_eager(t) for t in (x, *cotangents) if t is not None):
            run = _backward
        dx, dv, dw, db = run(*cotangents, *inputs, lengths, mask, pooled, lse, ctx.backend)
        return dx, dv, None if w is None else dw, None if b is None else db, None, None, None, None


def _equations(lengths: Tensor | None, mask: Tensor | None) -> Any:
    """The outputs of the reference as a function of its differentiable inputs."""
    return lambda x, v, w, b: attention_pool_forward(x, v, w, b, lengths, mask)[:2]


def _setup_backward_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    d_pooled, d_weights, x, v, w, b, lengths, mask, *_ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(d_pooled, d_weights, lengths, mask, x, v, w, b)


def _double_backward(ctx: Any, ddx, ddv, ddw, ddb):  # type: ignore[no-untyped-def]
    """pooled and lse are functions of the other inputs here: no gradient is theirs."""
    d_pooled, d_weights, lengths, mask, *inputs = ctx.saved_tensors
    seconds = [None if t is None else dd for t, dd in zip(inputs, (ddx, ddv, ddw, ddb), strict=True)]
    of_inputs, of_cotangents = second_gradients(_equations(lengths, mask), inputs, (d_pooled, d_weights), seconds)
    return *of_cotangents, *of_inputs, *[None] * 5


map_one_by_one("rnnattn::attention_pool_backward")


class PoolGradients(torch.autograd.Function):
    """`rnnattn::attention_pool_backward` for `torch.func`, which asks operators for no gradient."""

    @staticmethod
    def forward(*arguments):  # type: ignore[no-untyped-def]
        return torch.ops.rnnattn.attention_pool_backward(*arguments)

    setup_context = staticmethod(_setup_backward_context)
    backward = staticmethod(_double_backward)
    vmap = staticmethod(one_by_one(lambda *arguments: PoolGradients.apply(*arguments)))


# The operators called directly (an exported graph, opcheck) differentiate by the same rule.
torch.library.register_autograd(
    "rnnattn::attention_pool", AttentionPooling.backward, setup_context=AttentionPooling.setup_context
)
torch.library.register_autograd(
    "rnnattn::attention_pool_backward", _double_backward, setup_context=_setup_backward_context
)


def attention_pool(
    x: Tensor,
    v: Tensor,
    w: Tensor | None,
    b: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    need_weights: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """pooled and, on request, the weights, in x's dtype; shapes in `rnnattn.reference.attention_pool_forward`."""
    if want_equations(x, v, w, b):
        pooled, weights, _ = attention_pool_forward(x, v, w, b, lengths, mask)
        return pooled.to(x.dtype), weights if need_weights else None
    arguments = (x, v, w, b, lengths, mask, need_weights, backend)
    differentiable = any(p is not None and p.requires_grad for p in (x, v, w, b))
    if torch.is_grad_enabled() and (is_transformed() or differentiable) and not is_tracing():
        pooled, weights, _ = AttentionPooling.apply(*arguments)
    else:
        run = _forward if is_eager(x) else torch.ops.rnnattn.attention_pool
        pooled, weights, _ = run(*arguments)
    return pooled.to(x.dtype), weights if need_weights else None
