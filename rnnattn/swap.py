"""`swap` puts this package's modules in the place of torch's, `unswap` takes them out again."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from rnnattn.nn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from rnnattn.nn.graphs import Swapped, become, twin

SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    ours._torchs: ours for ours in (LSTM, GRU, RNN, LSTMCell, GRUCell, RNNCell)
}
KEPT = "has no counterpart in rnnattn"
# Modules of other packages whose code takes a child of theirs for another kind where it is no instance of torch.nn's.
ASKS_FOR_TORCHS = tuple(f"torchrl.modules.tensordict_module.rnn.{name}" for name in ("LSTMModule", "GRUModule"))
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)


@dataclass
class SwapReport:
    """What became of a model's recurrent modules.

    Attributes:
        model: the model; the given object, unless that itself was replaced.
        swapped: names of the modules replaced ("" is the model itself).
        left: names of the recurrent modules left alone, with the reason.
    """

    model: nn.Module
    swapped: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"swapped {name or '(the model itself)'}" for name in self.swapped]
        lines += [f"left {name or '(the model itself)'}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines) or "no recurrent modules found"


def swap(model: nn.Module) -> SwapReport:
    """Replaces torch.nn's recurrent modules in a model by rnnattn's, in place.

    The modules are the same objects before and after, of another class: parameters, hooks and settings stay, and
    whoever else holds one of them holds ours then. Subclasses, parametrised modules and those whose forward was
    replaced are left alone, as their behaviour may differ.

    Args:
        model: any module. Where it is itself a recurrent layer it is left as it is: use the report's `model`, another
            module over the same parameters.

    Returns:
        SwapReport: the model, what was swapped, and what was left and why.
    """
    return _replace(model, SWAPS)


def unswap(model: nn.Module) -> SwapReport:
    """The reverse of `swap`: torch.nn's modules in the place of rnnattn's, in place, but those that torch.nn cannot
    do: with zoneout, locked dropout, dropped weights or layer norm. A forget_bias, but a beginning, is forgotten, and
    so is recompute, which changes no result."""
    return _replace(model, {ours: theirs for theirs, ours in SWAPS.items()})


def _replace(model: nn.Module, table: dict[type[nn.Module], type[nn.Module]]) -> SwapReport:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    report = SwapReport(model)
    found = [(name, module, type(module)) for name, module in model.named_modules(remove_duplicate=False)]
    reasons = {}  # of modules, under any of their names
    for name, module, kind in found:
        if kind in table and (reason := _why_kept(model, name, module, table[kind])):
            reasons[module] = reason
    for name, module, kind in found:
        if module in reasons:
            report.left[name] = reasons[module]
        elif kind in table:
            if name:
                become(module, table[kind])
            else:
                report.model = twin(module, table[kind])
            report.swapped.append(name)
        elif isinstance(module, _RECURRENT) and kind not in table.values():
            report.left[name] = _why_left(kind, table)
    return report


def _why_kept(model: nn.Module, name: str, module: nn.Module, kind: type[nn.Module]) -> str | None:
    """What in the module or around it is for its present class alone, or would be something else in that kind."""
    if isinstance(module, Swapped) and module._beyond_torch():
        return f"torch's {kind.__name__} knows no {', '.join(module._beyond_torch())}"
    if "forward" in vars(module):
        return "its forward was replaced, by a hook of another package or by hand"
    for attribute in vars(module):
        if hasattr(kind, attribute) and not hasattr(type(module), attribute):
            return f"its attribute {attribute} is a setting of {kind.__module__.split('.')[0]}.{kind.__name__}"
    parent = model.get_submodule(name.rpartition(".")[0])
    for base in type(parent).__mro__:
        if f"{base.__module__}.{base.__qualname__}" in ASKS_FOR_TORCHS:
            return f"{base.__name__} of {base.__module__.split('.')[0]} asks for torch.nn's class"
    return None


def _why_left(kind: type[nn.Module], table: dict[type[nn.Module], type[nn.Module]]) -> str:
    for known in table:
        if issubclass(kind, known):
            return f"{kind.__name__} is a subclass of {known.__name__} that may behave differently"
    return f"{kind.__name__} {KEPT}"
