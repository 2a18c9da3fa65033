"""Checks of the arguments of the operations: messages name the argument, what is expected and what was given."""

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
    lengths = lengths.to(torch.int64).contiguous()
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


def check_lstm(
    x: Tensor, h0: Tensor, c0: Tensor, weights: list[Tensor], has_biases: bool, num_layers: int, K: int
) -> None:
    """Raises RuntimeError where an argument of `functional.lstm` is off; x is [T, B, I]."""
    require(x.dim() == 3, f"lstm: expected input with 3 dimensions, got shape {list(x.shape)}")
    require(x.dtype.is_floating_point, f"lstm: expected a floating input, got {x.dtype}")
    require(x.shape[0] > 0, "Expected sequence length to be larger than 0 in RNN")
    plain = 4 if has_biases else 2
    per_direction, rest = divmod(len(weights), num_layers * K)
    require(
        rest == 0 and per_direction in (plain, plain + 1),
        f"lstm: expected {plain} or (with a projection) {plain + 1} weights for each of {num_layers} "
        f"layers and {K} directions, got {len(weights)}",
    )
    B, I, H, R = x.shape[1], x.shape[2], weights[0].shape[0] // 4, weights[1].shape[1]
    _require_state("h0", h0, (num_layers * K, B, R), x)
    _require_state("c0", c0, (num_layers * K, B, H), x)
    for n, w in enumerate(weights):
        layer, part = n // (per_direction * K), n % per_direction
        features = I if layer == 0 else K * R
        last = part == per_direction - 1 and per_direction > plain
        expected = (R, H) if last else ((4 * H, features), (4 * H, R), (4 * H,), (4 * H,))[part]
        require(w.shape == expected, f"lstm: expected weights[{n}] of shape {list(expected)}, got {list(w.shape)}")
        require(
            w.device == x.device,
            f"Input and parameter tensors are not at the same device, found input tensor at {x.device} and parameter "
            f"tensor at {w.device}",
        )
        _require_like(f"lstm: weights[{n}]", w, x)


def _require_state(name: str, state: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    require(
        state.device == x.device,
        f"Input and hidden tensors are not at the same device, found input tensor at {x.device} and hidden tensor "
        f"at {state.device}",
    )
    require(state.shape == shape, f"lstm: expected {name} of shape {list(shape)}, got {list(state.shape)}")
    _require_like(f"lstm: {name}", state, x)


def _require_like(name: str, t: Tensor, x: Tensor) -> None:
    require(t.dtype == x.dtype, f"{name}: expected dtype {x.dtype} as the input has, got {t.dtype}")
    require(t.device == x.device, f"{name}: expected device {x.device} as the input has, got {t.device}")


def check_pool(x: Tensor, v: Tensor, w: Tensor | None, b: Tensor | None) -> None:
    """Raises RuntimeError where an argument of `functional.attention_pool` is off."""
    require(x.dim() == 3, f"attention_pool: expected input with 3 dimensions [B, T, D], got shape {list(x.shape)}")
    require(x.dtype.is_floating_point, f"attention_pool: expected a floating input, got {x.dtype}")
    D = x.shape[2]
    require(D > 0, f"attention_pool: expected input with at least one feature, got shape {list(x.shape)}")
    if w is None:
        require(b is None, "attention_pool: expected no b without w (a constant cancels in the softmax)")
        expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {"v": (v, (D,))}
    else:
        require(w.dim() == 2, f"attention_pool: expected w of shape [A, {D}], got {list(w.shape)}")
        expected = {"v": (v, (w.shape[0],)), "w": (w, (w.shape[0], D))}
        if b is not None:
            expected["b"] = (b, (w.shape[0],))
    for name, (p, shape) in expected.items():
        require(p.shape == shape, f"attention_pool: expected {name} of shape {list(shape)}, got {list(p.shape)}")
        _require_like(f"attention_pool: {name}", p, x)
