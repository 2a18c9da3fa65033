"""Interpreted kernels read and write nothing but their arguments: a GPU faults elsewhere, or takes what lies there.

Internals of Triton's interpreter, looked at in 3.6 and 3.7.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def checked_addresses() -> Iterator[None]:
    """While it lasts, a launch raises where the addresses of a load or store that its mask allows are not all in one of
    the tensors that it was given. Atomics are not looked at."""
    from triton.runtime import interpreter

    extents: list[tuple[int, int]] = []  # of the launch that goes on
    run, convert = interpreter.InterpretedFunction.run, interpreter._implicit_cvt
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    @functools.wraps(run)
    def new_launch(*arguments: Any, **keywords: Any) -> Any:
        extents.clear()
        return run(*arguments, **keywords)

    @functools.wraps(convert)
    def noted(arg: Any) -> Any:
        if isinstance(arg, torch.Tensor) and arg.numel():
            last = sum((size - 1) * stride for size, stride in zip(arg.shape, arg.stride(), strict=True))
            extents.append((arg.data_ptr(), arg.data_ptr() + (last + 1) * arg.element_size()))
        return convert(arg)

    def check(pointers: Any, mask: Any, does: str) -> None:
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
        if addresses.size == 0:
            return
        width = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
        first, behind = int(addresses.min()), int(addresses.max()) + width
        if not any(begin <= first and behind <= end for begin, end in extents):
            touched = [(begin, end) for begin, end in extents if begin <= first < end or begin < behind <= end]
            beside = [f"{first - begin} and {behind - end} bytes from the ends of one" for begin, end in touched]
            raise RuntimeError(f"a {does} outside of the kernel's arguments: {', '.join(beside) or 'in none'}")

    def checked_load(self: Any, pointers: Any, mask: Any, *more: Any) -> Any:
        check(pointers, mask, "load")
        return load(self, pointers, mask, *more)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *more: Any) -> Any:
        check(pointers, mask, "store")
        return store(self, pointers, value, mask, *more)

    interpreter.InterpretedFunction.run, interpreter._implicit_cvt = new_launch, noted
    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    try:
        yield
    finally:
        interpreter.InterpretedFunction.run, interpreter._implicit_cvt = run, convert
        builder.create_masked_load, builder.create_masked_store = load, store
