"""`swap` puts this package's modules in the place of torch's, `unswap` takes them out again."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from rnnattn.nn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from rnnattn.nn.graphs import Swapped, twin

SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    ours._torchs: ours for ours in (LSTM, GRU, RNN, LSTMCell, GRUCell, RNNCell)
}
KEPT = "has no counterpart in rnnattn"
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

    Parameters, buffers, hooks, device, dtype and the training flag are the same objects before
    and after. Subclasses and parametrised modules are left alone, as their behaviour may differ.

    Args:
        model: any module. Where it is itself a recurrent layer it cannot be replaced in place: use
            the report's `model`.

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
    replaced: dict[nn.Module, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        kind = type(module)
        if kind in table and isinstance(module, Swapped) and module._beyond_torch():
            report.left[name] = f"torch's {kind.__name__} knows no {', '.join(module._beyond_torch())}"
        elif kind in table:
            new = replaced.setdefault(module, twin(module, table[kind]))
            if name:
                parent, _, attribute = name.rpartition(".")
                # Straight into the table of children: a container's own __setattr__ is not ours to run.
                model.get_submodule(parent)._modules[attribute] = new
            else:
                report.model = new
            report.swapped.append(name)
        elif isinstance(module, _RECURRENT) and kind not in table.values():
            report.left[name] = _why_left(kind, table)
    return report


def _why_left(kind: type[nn.Module], table: dict[type[nn.Module], type[nn.Module]]) -> str:
    for known in table:
        if issubclass(kind, known):
            return f"{kind.__name__} is a subclass of {known.__name__} that may behave differently"
    return f"{kind.__name__} {KEPT}"
