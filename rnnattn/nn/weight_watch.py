"""`WeightWatch`: notices that the weights of a module are not those that something was derived from any more.

Writes that torch counts, and other tensors or other memory in a parameter's place, are seen at once. Writes
behind torch's back (`p.data.mul_()`, a numpy view) leave no trace but the numbers: each check compares one
part in `PARTS` of all bytes with a frozen copy. It takes the parts from all over, so that a write to a whole
matrix is seen within a few checks, and one to a single number within `PARTS`.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

PARTS = 256

# torch.equal compares an element at a time, which takes three times as long.
_memcmp = ctypes.PyDLL("msvcrt" if os.name == "nt" else None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


_data_ptr, _version = Tensor.data_ptr, attrgetter("_version")


class _Piece(NamedTuple):
    """Bytes of one parameter."""

    parameter: int
    begin: int
    size: int
    copy: int  # their address in the frozen copy


class WeightWatch:
    """Watches parameters of a module, which it holds weakly: once the module is gone, so is its watch.

    A copy by `copy.deepcopy` watches the module's copy where that was made in the same go, else the same
    module; what is unpickled watches nothing.
    """

    def __init__(self, module: nn.Module | None, names: list[str]) -> None:
        """module: None to watch nothing. names: the direct parameters of the module to watch."""
        self._names = names
        self._owner = type(module).__name__
        self._module: weakref.ref[nn.Module] | None = None
        if module is None:
            return
        parameters = [module.get_parameter(name) for name in names]
        frozen = torch.cat([_bytes(p) for p in parameters])
        # The parameters' own memory too, so that no other tensor can come to lie where they lay.
        memory = [frozen, *(p.detach() for p in parameters)]
        self._module = weakref.ref(module, lambda _: memory.clear())
        self._select = itemgetter(*names)
        self._addresses = [p.data_ptr() for p in parameters]
        counts = not any(p.is_inference() for p in parameters)
        self._versions = [p._version for p in parameters] if counts else None
        self._layouts = [(p.shape, p.stride()) for p in parameters]
        self._parts = _parts([_extent(p) for p in parameters], frozen.data_ptr())
        self._next = 0

    def check(self) -> None:
        """Raises RuntimeError where a change is seen."""
        module = None if self._module is None else self._module()
        if module is None:
            return
        current = module._parameters
        try:
            parameters = self._select(current)
            addresses = list(map(_data_ptr, parameters))
        except (KeyError, TypeError):  # not there, or None
            missing = next(name for name in self._names if current.get(name) is None)
            raise self._changed(missing, "was replaced") from None
        if addresses != self._addresses:
            raise self._changed(self._differs(addresses, self._addresses), "was replaced, or moved")
        if self._versions is not None and (versions := list(map(_version, parameters))) != self._versions:
            raise self._changed(self._differs(versions, self._versions), "was written in place")
        part = self._next
        self._next = part + 1 if part + 1 < len(self._parts) else 0
        for n, begin, size, copy in self._parts[part]:
            p = parameters[n]
            if (p.shape, p.stride()) != self._layouts[n]:
                raise self._changed(self._names[n], "has another shape")
            if _memcmp(addresses[n] + begin, copy, size):
                raise self._changed(self._names[n], "was written")

    def _differs(self, now: list[int], then: list[int]) -> str:
        return next(name for name, a, b in zip(self._names, now, then, strict=True) if a != b)

    def _changed(self, name: str, how: str) -> RuntimeError:
        return RuntimeError(f"{self._owner}: weights changed after prepare_inference() ({name} {how}); call it again")

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightWatch:
        module = None if self._module is None else self._module()
        if module is not None:
            for _ in self._parts:
                self.check()  # a change up to now must not pass for the copy's own weights
            module = memo.get(id(module), module)
        return WeightWatch(module, self._names)

    def __reduce__(self) -> tuple[Any, ...]:
        return WeightWatch, (None, self._names)


def _extent(p: Tensor) -> int:
    """Bytes from the first element to the last."""
    if p.numel() == 0:
        return 0
    return (1 + sum((n - 1) * stride for n, stride in zip(p.shape, p.stride(), strict=True))) * p.element_size()


def _bytes(p: Tensor) -> Tensor:
    """A copy of the extent."""
    size = _extent(p)
    return p.detach().as_strided((size // p.element_size(),), (1,)).clone().view(torch.uint8)


def _parts(sizes: list[int], copy: int) -> list[list[_Piece]]:
    """The bytes of all parameters, one behind the other, cut into PARTS, in the order of the checks."""
    length = max(1, -(-sum(sizes) // PARTS))
    parts: list[list[_Piece]] = [[]]
    room = length
    for n, size in enumerate(sizes):
        begin = 0
        while begin < size:
            if room == 0:
                parts.append([])
                room = length
            piece = min(room, size - begin)
            parts[-1].append(_Piece(n, begin, piece, copy))
            begin, copy, room = begin + piece, copy + piece, room - piece
    golden = (5**0.5 - 1) / 2  # its multiples leave no large gap, wherever they stop
    return [parts[n] for n in sorted(range(len(parts)), key=lambda n: n * golden % 1)]
