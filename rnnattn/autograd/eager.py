"""When an operation may skip the dispatcher."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_eager(x: Tensor) -> bool:
    """Whether a call just computes: x has data, and no compiler, tracing mode or torch.func transform looks on.

    Then the implementation is called as a function. The dispatcher's way to an operator in Python takes 30 us,
    as long as a small call itself.
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, torch.nn.Parameter)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def is_last_use() -> bool:
    """Whether the backward that runs now is the last one of its graph: what was saved for it may be overwritten.

    True unless it runs with `retain_graph=True`.
    """
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps is not None and not keeps()


def refuse_tangents(operation: str, *tensors: Tensor | None) -> None:
    """Raises NotImplementedError where forward-mode differentiation looks on, which would otherwise find no tangent."""
    if forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        raise NotImplementedError(f"rnnattn: {operation} has no forward-mode derivative, only a reverse-mode one")
