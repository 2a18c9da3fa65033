"""When an operation may skip the dispatcher."""

from __future__ import annotations

import torch
from torch import Tensor

from rnnattn.transforms import is_transformed

_VMAP_MODE = torch._C._dispatch_key_parse("VmapMode")  # of torch.autograd.grad(is_grads_batched=True)


def is_eager(x: Tensor) -> bool:
    """Whether a call just computes: x has data, and no compiler, tracer, mode, torch.func transform or map looks on.

    Then the implementation is called as a function. The dispatcher's way to an operator in Python takes 30 us,
    as long as a small call itself.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
        and type(x) in (Tensor, torch.nn.Parameter)
        and torch._C._len_torch_dispatch_stack() == 0
        and not is_transformed()
        and not torch._C._dispatch_tls_is_dispatch_key_included(_VMAP_MODE)
    )


def is_last_use() -> bool:
    """Whether the backward that runs now is the last one of its graph: what was saved for it may be overwritten.

    True unless it runs with `retain_graph=True`.
    """
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps is not None and not keeps()
