"""What is built, what is usable, and which backend would run: `show_config` and `explain`."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from rnnattn import backends
from rnnattn._version import __version__
from rnnattn.backends import Call


def show_config() -> str:
    """What is built and usable here, and why not, with versions and the instruction set, as text."""
    lines = [
        f"rnnattn {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        f"threads {torch.get_num_threads()}, CUDA {torch.version.cuda or 'not in this torch build'}",
        f"backend {backends.selected()}",
    ]
    for name in backends.BACKENDS:
        reason = backends.unavailable(name)
        lines.append(f"  {name:<10} {'usable' if reason is None else f'not usable: {reason}'}")
    if backends.unavailable("cpp") is None:
        lines += [f"  {key:<10} {value}" for key, value in backends.build_info().items()]
    return "\n".join(lines)


@dataclass(frozen=True)
class Decision:
    """One call of a kernel: the backend that ran it, which kernel, why, and what became of the others.

    step_us: microseconds that a step of one layer should take by the kernel's cost model, forward; None without one.
    """

    call: Call
    backend: str
    kernel: str
    reason: str
    others: dict[str, str]
    step_us: float | None = None

    def __str__(self) -> str:
        c = self.call
        dtype = str(c.dtype).removeprefix("torch.")
        head = f"{c.op} {dtype} on {c.device}, B={c.B} T={c.T}: {self.backend} ({self.kernel})"
        return "\n".join([head, f"  because {self.reason}", *(f"  {name}: {why}" for name, why in self.others.items())])


class Explanation(list[Decision]):
    """The decisions of one forward pass, in order; prints as text."""

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "no rnnattn operation ran"


def explain(module: Callable[..., Any], *inputs: Any, **kwargs: Any) -> Explanation:
    """Which backend and kernel run `module(*inputs)`, and why.

    Runs one forward pass and records every choice made in it, so it tells exactly what that call
    does, with or without gradients as they are enabled here.

    Args:
        module: any module that contains rnnattn's modules, or any callable.
        inputs, kwargs: what it takes.

    Raises:
        BackendError: the backend asked for by name cannot run the call.
    """
    with backends.recording() as choices:
        module(*inputs, **kwargs)
    return Explanation(
        Decision(
            call,
            chosen.backend,
            backends.get(chosen.backend).kernel(call),
            chosen.reason,
            _others(call, chosen.backend),
            backends.get(chosen.backend).step_us(call),
        )
        for call, chosen in choices
    )


def _others(call: Call, chosen: str) -> dict[str, str]:
    names = [name for name in backends.BACKENDS if name != chosen]
    return {name: backends.objection(name, call) or "could run it" for name in names}
