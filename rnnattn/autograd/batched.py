"""Operators mapped over an extra dimension by calling them for each of its elements.

For `torch.func.vmap` over gradients, and for `torch.autograd.grad(is_grads_batched=True)`, which
`torch.autograd.functional.jacobian(vectorize=True)` calls, and which has tensors of an older kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def one_by_one(run: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """A rule for `torch.func.vmap` of a function whose results are tensors and lists of them."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        results = _mapped(run, arguments, in_dims, info.batch_size)
        return results, tuple([0] * len(r) if isinstance(r, list) else 0 for r in results)

    return rule


def map_one_by_one(name: str) -> None:
    """Registers such rules for an operator, of both kinds."""
    namespace, _, operator = name.partition("::")
    run = getattr(getattr(torch.ops, namespace), operator)

    def older_rule(*arguments: Any) -> Any:
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        sizes = [torch._remove_batch_dim(t, level, 1, 0).shape[0] for t in _tensors(arguments)]  # 1 for one without it
        given = _each(lambda t: torch._remove_batch_dim(t, level, max(sizes), 0), arguments)
        in_dims = _each(lambda t: 0, arguments)
        results = _mapped(run, given, in_dims, max(sizes))
        return _each(lambda t: torch._add_batch_dim(t, 0, level), results)

    torch.library.register_vmap(name, one_by_one(run))
    torch.library.impl(name, "Batched", older_rule)


def _mapped(run: Callable[..., Any], arguments: Any, in_dims: Any, size: int) -> tuple[Any, ...]:
    if size > 0:
        return _stacked([run(*_element(arguments, in_dims, n)) for n in range(size)])
    # One call tells what results look like, of which there are to be none.
    results = _stacked([run(*_element(_each(_one, arguments), in_dims, 0))])
    return _each(lambda t: t[:0], results)


def _one(t: Tensor) -> Tensor:
    """t, or zeros of its shape with 1 where it is 0."""
    return t if t.numel() else t.new_zeros([max(size, 1) for size in t.shape])


def _tensors(arguments: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _each(found.append, arguments)
    return found


def _each(function: Callable[[Tensor], Any], arguments: Any) -> tuple[Any, ...]:
    """The arguments, with the function's results in the place of tensors, in lists too."""
    return tuple(
        [function(t) for t in a] if isinstance(a, list | tuple) else function(a) if isinstance(a, Tensor) else a
        for a in arguments
    )


def _element(arguments: Any, in_dims: Any, n: int) -> list[Any]:
    """The arguments of the call for element n."""
    return [
        _element(a, [None] * len(a) if d is None else d, n)
        if isinstance(a, list | tuple)
        else a.select(d, n) if isinstance(a, Tensor) and d is not None else a
        for a, d in zip(arguments, in_dims, strict=True)
    ]  # fmt: skip


def _stacked(calls: list[Any]) -> tuple[Any, ...]:
    return tuple(
        [torch.stack(parts) for parts in zip(*results, strict=True)]
        if isinstance(results[0], list | tuple)
        else torch.stack(results)
        for results in zip(*calls, strict=True)
    )
