"""Checks of arguments that several operations take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def checked_lengths(lengths: Tensor | Sequence[int] | None, B: int, T: int, device: torch.device) -> Tensor | None:
    """int64 lengths [B] on the device, in [0, T].

    Values on the CPU are checked; on another device (or while compiling) reading them would wait
    for the device, so they are clamped instead.

    Raises:
        TypeError: not integers. ValueError: wrong shape, or a value out of range.
    """
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor):
        lengths = torch.as_tensor(lengths)
        if lengths.numel() == 0:
            lengths = lengths.to(torch.int64)
    if lengths.dtype not in _INTEGERS:
        raise TypeError(f"lengths: expected integers, got {lengths.dtype}")
    if lengths.shape != (B,):
        raise ValueError(f"lengths: expected shape [{B}] (the batch size), got {list(lengths.shape)}")
    lengths = lengths.to(torch.int64)
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling():
        if B > 0:
            low, high = (int(value) for value in lengths.aminmax())
            if low < 0 or high > T:
                raise ValueError(
                    f"lengths: expected values from 0 to {T} (the time steps), got {low if low < 0 else high}"
                )
        return lengths.to(device, non_blocking=True)
    return lengths.to(device).clamp(0, T)


def checked_mask(mask: Tensor | None, shape: tuple[int, int], device: torch.device) -> None:
    """Raises TypeError where mask is not bool, ValueError where its shape or device is off."""
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected torch.bool with True = keep, got {mask.dtype}")
    if mask.shape != shape:
        raise ValueError(f"mask: expected shape {list(shape)} [B, T], got {list(mask.shape)}")
    if mask.device != device:
        raise ValueError(f"mask: expected device {device} as the input has, got {mask.device}")
