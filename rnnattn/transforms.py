"""Who looks on while an operation runs: autograd, the transforms of `torch.func`, and forward-mode differentiation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad

_keeps_own: ContextVar[bool] = ContextVar("_keeps_own", default=False)


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd does: one of the tensors is to have a gradient."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def is_tracing() -> bool:
    """Whether torch.jit.trace does."""
    return not torch.compiler.is_compiling() and torch._C._is_tracing()


def is_recorded() -> bool:
    """Whether a graph is being recorded that other calls are to go through."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def is_traced() -> bool:
    """Whether the graph that is being recorded is to run elsewhere, of torch's own operators where these can do it: by
    torch.jit.trace or, but for `onnx_export` itself, by torch.onnx.export."""
    if not torch.compiler.is_compiling():
        return torch._C._is_tracing()
    if torch.compiler.is_dynamo_compiling() or not torch.compiler.is_exporting():
        return False
    return bool(torch.onnx.is_in_onnx_export()) and not _keeps_own.get()


@contextlib.contextmanager
def own_operators() -> Iterator[None]:
    """Exports in this block record our operators."""
    token = _keeps_own.set(True)
    try:
        yield
    finally:
        _keeps_own.reset(token)


def is_transformed() -> bool:
    """Whether `torch.func` looks on."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def is_mapped() -> bool:
    """Whether `vmap` is among those, so that a tensor may stand for many."""
    return is_transformed() and any(i.key() == TransformType.Vmap for i in retrieve_all_functorch_interpreters())


def want_equations(*tensors: Tensor | None) -> bool:
    """Whether there is more to find out than kernels tell: a tensor has a tangent, or another transform than
    `torch.func.grad` looks on."""
    if torch.compiler.is_compiling():
        return False
    tangents = forward_ad._current_level >= 0
    if is_transformed():  # which hides tangents
        return tangents or any(i.key() != TransformType.Grad for i in retrieve_all_functorch_interpreters())
    return tangents and any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)
