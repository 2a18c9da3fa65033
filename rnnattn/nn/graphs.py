"""The modules in graphs that torch makes of models: as nodes of torch.fx, as torch.nn's own in torch.jit.script."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import nn


class Swapped(nn.Module):
    """Base of the modules that have a counterpart in torch.nn."""

    _torchs: type[nn.Module]

    def _is_derived(self) -> bool:
        """Whether its class is none of ours, but derived from one."""
        return "_torchs" not in vars(type(self))

    def _beyond_torch(self) -> list[str]:
        """The names of the settings that the counterpart cannot follow."""
        return []

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles for this module.

        Raises:
            NotImplementedError: torch.nn's module would compute something else.
        """
        own_forward = self._is_derived() or "forward" in vars(self)
        own = "a forward of its own" if own_forward else ", ".join(self._beyond_torch())
        if own:
            raise NotImplementedError(
                f"torch.jit.script: expected a {type(self).__name__} that torch.nn's can stand for, got one with "
                f"{own}; torch.jit.trace and torch.export take it"
            )
        ours, theirs = type(self).__name__, f"torch.nn.{self._torchs.__name__}"
        warnings.warn(
            f"rnnattn: torch.jit.script compiles {theirs} in the place of rnnattn.{ours}, and leaves it in the model "
            "that it was given; rnnattn.swap puts ours back there",
            stacklevel=2,
        )
        return twin(self, self._torchs)


def become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Gives a module another class over the same state; settings that only its present class has are forgotten."""
    for name in [n for n in vars(module) if hasattr(type(module), n) and not hasattr(kind, n)]:
        del vars(module)[name]
    module.__class__ = kind


def twin(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """A module of another class over the same state."""
    new = copy.copy(module)
    become(new, kind)
    return new


def is_symbolic(input: Any, hx: Any = None) -> bool:
    """Whether torch.fx is recording the call that input and states are given to."""
    given = (input, *hx) if isinstance(hx, tuple | list) else (input, hx)
    return any(isinstance(t, torch.fx.Proxy) for t in given)


def as_node(module: nn.Module, *arguments: Any, **settings: Any) -> Any:
    """The result of such a call, a node as of torch.nn's modules; settings that are None or False are left out.

    Raises:
        TraceError: what else the call does was recorded already, and would be done again by the node.
    """
    hooks = module._forward_pre_hooks or module._forward_hooks or module._backward_hooks or module._backward_pre_hooks
    if hooks or (isinstance(module, Swapped) and module._is_derived()):
        what = "hooks" if hooks else "a forward of its own"
        raise torch.fx.proxy.TraceError(
            f"torch.fx: expected a {type(module).__name__} without {what}; make it a leaf: Tracer.is_leaf_module"
        )
    arguments = arguments if arguments[-1] is not None else arguments[:-1]
    given = {name: value for name, value in settings.items() if value is not None and value is not False}
    proxies = arguments[:1] + (arguments[1] if isinstance(arguments[-1], tuple | list) else arguments[1:])
    tracer: Any = next(t for t in proxies if isinstance(t, torch.fx.Proxy)).tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), arguments, given)
