"""The table of backends, and how one is chosen for a call.

`auto` takes the first backend of `choice.order(call)` that can run the call. A backend asked for
by name runs or raises: it never falls back.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch

from rnnattn.backends import choice
from rnnattn.backends.aten import Torch
from rnnattn.backends.base import Backend, BackendError, Call
from rnnattn.backends.cpp import Cpp, build_info, empty_cache
from rnnattn.backends.cuda import Cuda
from rnnattn.backends.reference import Reference
from rnnattn.backends.triton import Triton

TORCH = Torch()
BACKENDS: dict[str, Backend] = {b.name: b for b in (Reference(), Cpp(), Triton(), Cuda(), TORCH)}
NAMES = ("auto", *BACKENDS)


class Choice(NamedTuple):
    backend: str
    reason: str


def _checked_name(name: str, origin: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{origin}: expected one of {', '.join(NAMES)}, got {name!r}")
    return name


_selected = _checked_name(os.environ.get("RNNATTN_BACKEND", "auto"), "RNNATTN_BACKEND")
_required = [name for name in os.environ.get("RNNATTN_REQUIRE", "").split(",") if name]
_warned: set[str] = set()
_record: list[tuple[Call, Choice]] | None = None


class use_backend(contextlib.AbstractContextManager["use_backend"]):
    """Sets the backend for the whole process; as a context manager, until the block ends.

    `rnnattn.use_backend("cpp")` sets it from here on, `with rnnattn.use_backend("cpp"): ...` for a
    block. The initial value is `auto`, or the environment variable RNNATTN_BACKEND.

    Raises:
        ValueError: the name is not one of auto, reference, cpp, triton, cuda, torch.
    """

    def __init__(self, name: str) -> None:
        global _selected
        self._previous = _selected
        _selected = _checked_name(name, "use_backend")

    def __exit__(self, *exc: object) -> None:
        global _selected
        _selected = self._previous


def selected() -> str:
    """The backend that is set: a name, or "auto"."""
    return _selected


def get(name: str) -> Backend:
    return BACKENDS[name]


def unavailable(name: str) -> str | None:
    """Why the named backend cannot run on this machine, or None."""
    return BACKENDS[name].unavailable()


# What torch.compiler.assume_constant_result sets; calling that would import Dynamo, which takes seconds.
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def objection(name: str, call: Call) -> str | None:
    """Why the named backend cannot run this call, or None."""
    return unavailable(name) or BACKENDS[name].unsupported(call)


@contextlib.contextmanager
def recording() -> Iterator[list[tuple[Call, Choice]]]:
    """Collects every call and choice made until the block ends."""
    global _record
    previous, _record = _record, []
    try:
        yield _record
    finally:
        _record = previous


def is_recording() -> bool:
    """Whether a block of `recording` wants to know of every call."""
    return _record is not None


def select(call: Call) -> Choice:
    """The backend that runs a call, and why.

    Raises:
        BackendError: a backend was asked for by name (or by RNNATTN_REQUIRE) that cannot run.
    """
    chosen = _select(call)
    if _record is not None:
        _record.append((call, chosen))
    return chosen


def _select(call: Call) -> Choice:
    for name in _required:
        reason = unavailable(_checked_name(name, "RNNATTN_REQUIRE"))
        if reason:
            raise BackendError(f"RNNATTN_REQUIRE names backend {name!r}, which cannot run: {reason}")
    if _selected != "auto":
        reason = objection(_selected, call)
        if reason:
            raise BackendError(f"backend {_selected!r} was asked for and cannot run {call.op}: {reason}")
        return Choice(_selected, "asked for by name")
    passed_over: dict[str, str] = {}
    for name, why in choice.order(call):
        reason = objection(name, call)
        if reason is None:
            if passed_over.keys() - {"torch"}:
                _warn_once(call, name, passed_over)
            return Choice(name, "; ".join([why, *passed_over.values()]))
        passed_over[name] = f"not {name}: {reason}"
    raise BackendError(f"no backend can run {call.op}: {'; '.join(passed_over.values())}")


def _warn_once(call: Call, name: str, passed_over: dict[str, str]) -> None:
    if torch.compiler.is_compiling() or call.op in _warned or call.device == "meta":
        return
    _warned.add(call.op)
    runs = "the reference equations" if name == "reference" else f"backend {name}"
    warnings.warn(
        f"rnnattn: {call.op} on {call.device} falls back to {runs} ({'; '.join(passed_over.values())})", stacklevel=2
    )


__all__ = [
    "BACKENDS",
    "TORCH",
    "Backend",
    "BackendError",
    "Call",
    "Choice",
    "build_info",
    "empty_cache",
    "get",
    "is_recording",
    "objection",
    "recording",
    "select",
    "selected",
    "unavailable",
    "use_backend",
]
