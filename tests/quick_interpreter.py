"""Triton's interpreter without what takes most of its time: it patches `triton.language` again at every call of a
device function, though the launch has done so already, and looks for overflow in sums of integers, which it reports
in debug mode only.

Internals of Triton, looked at in 3.7; where they are not as expected nothing is changed.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

LANGUAGE = ("triton.language", "triton.language.core")


@contextmanager
def patched_once_a_launch() -> Iterator[None]:
    from triton.runtime import interpreter

    original: Callable[[Any], Any] | None = getattr(interpreter, "_patch_lang", None)
    scope_type = getattr(interpreter, "_LangPatchScope", None)
    if original is None or not hasattr(scope_type, "restore"):
        yield
        return
    patched: set[str] = set()  # modules, since the launch that goes on began

    @functools.cache
    def language_of(function: Any) -> set[str]:
        globals_ = function.__globals__.values()
        return {value.__name__ for value in globals_ if inspect.ismodule(value) and value.__name__ in LANGUAGE}

    @functools.wraps(original)
    def patch_lang(function: Any) -> Any:
        named = language_of(function)
        if named <= patched:
            return scope_type()
        scope = original(function)
        if not patched:  # the launch's own, which ends with it
            restore = scope.restore

            def restored() -> None:
                restore()
                patched.clear()

            scope.restore = restored
        patched.update(named)
        return scope

    builder = interpreter.interpreter_builder
    options = builder.options
    interpreter._patch_lang = patch_lang
    if getattr(options, "sanitize_overflow", False) and not options.debug:
        builder.options = dataclasses.replace(options, sanitize_overflow=False)
    try:
        yield
    finally:
        interpreter._patch_lang = original
        builder.options = options
