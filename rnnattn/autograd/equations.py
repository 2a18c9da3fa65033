"""Derivatives that no kernel computes: by the reference equations, which PyTorch sees through.

Where `torch.func` maps or forward-mode differentiation looks on, they run in an operator's place. A gradient of
an operator's gradients is that of theirs; the gradients themselves are the kernels'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad

MaybeTensors = Sequence[Tensor | None]


def is_transformed() -> bool:
    """Whether `torch.func` looks on."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def run_equations(*tensors: Tensor | None) -> bool:
    """Whether the equations are to run in an operator's place: a tensor has a tangent, or `vmap` or `jvp` looks on."""
    if is_transformed():
        return any(i.key() in (TransformType.Vmap, TransformType.Jvp) for i in retrieve_all_functorch_interpreters())
    return (
        not torch.compiler.is_compiling()
        and forward_ad._current_level >= 0
        and any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)
    )


def second_gradients(
    forward: Callable[..., Sequence[Tensor]], inputs: MaybeTensors, cotangents: MaybeTensors, seconds: MaybeTensors
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The backward of a backward.

    Args:
        forward: makes outputs of inputs, differentiably.
        inputs: those of forward; None for what there is not.
        cotangents: of its outputs, None for zero. Backward makes gradients of them, one for each input.
        seconds: cotangents of these gradients, None for zero.

    Returns:
        The gradients of sum(seconds * gradients) with respect to the inputs, and to the cotangents.
    """
    present = [n for n, t in enumerate(inputs) if t is not None]
    given = [n for n, t in enumerate(cotangents) if t is not None]
    asked = [n for n in present if seconds[n] is not None]
    if not given or not asked:
        return [None] * len(inputs), [None] * len(cotangents)

    def gradients(*leaves: Tensor) -> tuple[Tensor, ...]:
        values = dict(zip(present, leaves, strict=False))

        def outputs(*of_asked: Tensor) -> tuple[Tensor, ...]:
            changed = values | dict(zip(asked, of_asked, strict=True))
            y = forward(*(changed.get(n) for n in range(len(inputs))))
            return tuple(y[n] for n in given)

        pull = torch.func.vjp(outputs, *(values[n] for n in asked))[1]
        return tuple(pull(leaves[len(present) :]))

    pull = torch.func.vjp(gradients, *(inputs[n] for n in present), *(cotangents[n] for n in given))[1]
    found = pull(tuple(seconds[n] for n in asked))
    of_inputs = dict(zip(present, found, strict=False))
    of_cotangents = dict(zip(given, found[len(present) :], strict=True))
    return [of_inputs.get(n) for n in range(len(inputs))], [of_cotangents.get(n) for n in range(len(cotangents))]
