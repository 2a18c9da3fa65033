"""Derivatives that no kernel computes: by the reference equations, which PyTorch sees through.

Where `torch.func` maps or forward-mode differentiation looks on, they run in an operator's place. A gradient of
an operator's gradients is that of theirs; the gradients themselves are the kernels'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rnnattn.transforms import is_transformed

MaybeTensors = Sequence[Tensor | None]
Equations = Callable[..., Sequence[Tensor]]  # outputs of inputs, differentiably


def first_gradients(forward: Equations, inputs: MaybeTensors, cotangents: MaybeTensors) -> list[Tensor | None]:
    """The backward of the equations.

    Args:
        inputs: those of forward; None for what there is not.
        cotangents: of its outputs, None for zero.

    Returns:
        A gradient for each input.
    """
    present, given = _indices(inputs), _indices(cotangents)
    if not given:
        return [None if t is None else torch.zeros_like(t) for t in inputs]

    def outputs(*leaves: Tensor) -> tuple[Tensor, ...]:
        y = forward(*_placed(leaves, present, len(inputs)))
        return tuple(y[n] for n in given)

    gradients = _pulled_back(outputs, [inputs[n] for n in present], [cotangents[n] for n in given])
    return _placed(gradients, present, len(inputs))


def second_gradients(
    forward: Equations, inputs: MaybeTensors, cotangents: MaybeTensors, seconds: MaybeTensors
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The backward of the backward.

    Args:
        inputs, cotangents: as in `first_gradients`.
        seconds: cotangents of its results, None for zero.

    Returns:
        The gradients of sum(seconds * first_gradients) with respect to the inputs, and to the cotangents.
    """
    present, given = _indices(inputs), _indices(cotangents)
    asked = [n for n in present if seconds[n] is not None]
    if not given or not asked:
        return [None] * len(inputs), [None] * len(cotangents)

    def gradients(*leaves: Tensor) -> tuple[Tensor, ...]:
        values = _placed(leaves[: len(present)], present, len(inputs))

        def of_asked(*changed: Tensor) -> Sequence[Tensor]:
            replaced = dict(zip(asked, changed, strict=True))
            return forward(*(replaced.get(n, value) for n, value in enumerate(values)))

        handed = _placed(leaves[len(present) :], given, len(cotangents))
        return tuple(d for d in first_gradients(of_asked, [values[n] for n in asked], handed) if d is not None)

    leaves = [*(inputs[n] for n in present), *(cotangents[n] for n in given)]
    found = _pulled_back(gradients, leaves, [seconds[n] for n in asked])
    return (
        _placed(found[: len(present)], present, len(inputs)),
        _placed(found[len(present) :], given, len(cotangents)),
    )


def _pulled_back(function: Equations, inputs: MaybeTensors, cotangents: MaybeTensors) -> Sequence[Tensor]:
    """The vector-Jacobian product, itself differentiable where grad mode is on."""
    if is_transformed():  # where torch.autograd.grad is not to be had; torch.func.vjp refuses saved-tensor hooks
        pull = torch.func.vjp(function, *inputs)[1]
        results: Sequence[Tensor] = pull(tuple(cotangents))
        return results
    goes_on = torch.is_grad_enabled()
    with torch.enable_grad():
        # Each its own alias, as one tensor may come in as two; with a path back where it has one.
        leaves = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in inputs if t is not None]
        pairs = [(y, d) for y, d in zip(function(*leaves), cotangents, strict=True) if y.requires_grad]
    if not pairs:
        return [torch.zeros_like(t) for t in leaves]
    return torch.autograd.grad(
        [y for y, _ in pairs], leaves, [d for _, d in pairs], create_graph=goes_on, allow_unused=True,
        materialize_grads=True,
    )  # fmt: skip


def _indices(tensors: MaybeTensors) -> list[int]:
    return [n for n, t in enumerate(tensors) if t is not None]


def _placed(tensors: Sequence[Tensor], at: Sequence[int], length: int) -> list[Tensor | None]:
    """A list of that length with the tensors at those places, None at others."""
    places = dict(zip(at, tensors, strict=True))
    return [places.get(n) for n in range(length)]
