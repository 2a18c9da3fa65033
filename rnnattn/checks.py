"""Checks of the arguments of the operations: messages name the argument, what is expected and what was given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rnnattn.packing import Packing
from rnnattn.transforms import is_mapped, is_recorded

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def checked_lengths(lengths: Tensor | Sequence[int] | None, B: int, T: int, device: torch.device) -> Tensor | None:
    """int64 lengths [B] on the device, in [0, T].

    Values on the CPU are checked; on another device (or while compiling or tracing, or mapped over by torch.func)
    reading them would wait for the device, so they are clamped instead.

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
    if lengths.device.type == "cpu" and not is_recorded() and not is_mapped():
        if B > 0:
            low, high = (int(value) for value in lengths.aminmax())
            if low < 0 or high > T:
                raise ValueError(
                    f"lengths: expected values from 0 to {T} (the time steps), got {low if low < 0 else high}"
                )
        return lengths.to(device, non_blocking=True)
    return lengths.to(device).clamp(0, T)


def checked_steps(
    op: str, x: Tensor, lengths: Tensor | Sequence[int] | Packing | None
) -> tuple[int, int, Tensor | None]:
    """T, B and int64 lengths [B] of x [T, B, I], or of packed rows x [N, I]; of these on the CPU, whatever has x.

    Raises:
        RuntimeError: not such an x. The others as `checked_lengths`.
    """
    if isinstance(lengths, Packing):
        T, B = lengths.shape
        return T, B, lengths.lengths()
    if x.dim() != 3:
        raise RuntimeError(f"{op}: expected input with 3 dimensions, got shape {list(x.shape)}")
    T, B, _ = x.shape
    if T == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    return T, B, checked_lengths(lengths, B, T, x.device)


def checked_resets(resets: Tensor | None, input: Tensor, batch_first: bool) -> Tensor | None:
    """resets [T, B] of an input [T, B, I] (given as [B, T] of one [B, T, I] with batch_first), or [T] of one [T, I].

    Raises:
        TypeError: not a bool tensor. ValueError: wrong shape or device.
    """
    if resets is None:
        return None
    if not isinstance(resets, Tensor):
        raise TypeError(f"resets: expected a torch.bool tensor, got {type(resets).__name__}")
    if resets.dtype != torch.bool:
        raise TypeError(f"resets: expected torch.bool with True = an episode begins, got {resets.dtype}")
    if resets.shape != input.shape[:-1]:
        letters = "[T]" if input.dim() == 2 else "[B, T]" if batch_first else "[T, B]"
        raise ValueError(f"resets: expected shape {list(input.shape[:-1])} {letters}, got {list(resets.shape)}")
    if resets.device != input.device:
        raise ValueError(f"resets: expected device {input.device} as the input has, got {resets.device}")
    return resets.t() if batch_first else resets


def check_recompute(recompute: str | None, reset_to_initial: bool = False, return_cells: bool = False) -> bool:
    """Whether the steps are to be computed again in the backward pass, in chunks.

    Raises:
        ValueError: an unknown way; resets that are not to zeros; cells of steps that are not kept.
    """
    if recompute is None:
        return False
    if recompute != "chunk":
        raise ValueError(f"recompute: expected None or 'chunk', got {recompute!r}")
    if reset_to_initial:
        raise ValueError("recompute: expected no reset_to_initial with 'chunk', only resets to zeros")
    if return_cells:
        raise ValueError("recompute: expected no return_cells with 'chunk', which keeps no steps in between")
    return True


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


def check_states(op: str, hx: Any, argument: int) -> None:
    """Raises TypeError or RuntimeError, in torch's words, where hx is not two tensors; it is that argument there."""
    if not isinstance(hx, tuple | list):
        raise TypeError(
            f"{op}(): argument 'hx' (position {argument + 1}) must be tuple of Tensors, not {type(hx).__name__}"
        )
    for n, state in enumerate(hx):
        if not isinstance(state, Tensor):
            raise TypeError(_no_tensor(n, argument, state))
    if len(hx) != 2:
        raise RuntimeError(f"{op} expects two hidden states")


def check_recurrent(
    op: str,
    G: int,
    x: Tensor,
    B: int,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    has_biases: bool,
    num_layers: int,
    K: int,
) -> None:
    """Raises RuntimeError, for a weight that is None TypeError, where an argument of `functional.lstm`, `gru` or `rnn`
    is off.

    x is [T, B, I] or packed, G the blocks of H rows in the cell's weights; a cell with c0 may have a projection.
    """
    for n, w in enumerate(weights):
        if w is None:
            raise TypeError(_no_tensor(n, 2 if x.dim() == 3 else 3, w))  # packed: batch sizes come first
    if x.layout != torch.strided:
        raise RuntimeError(f"{op}: expected a dense input, got {x.layout}")
    plain = 4 if has_biases else 2
    per_direction, rest = divmod(len(weights), num_layers * K)
    if rest or per_direction not in ((plain,) if c0 is None else (plain, plain + 1)):
        number = f"{plain}" if c0 is None else f"{plain} or (with a projection) {plain + 1}"
        raise RuntimeError(
            f"{op}: expected {number} weights for each of {num_layers} layers and {K} directions, got {len(weights)}"
        )
    if x.dtype != weights[0].dtype:
        raise RuntimeError(factors(op, "input", x, "weights[0]", weights[0]))
    if h0.dtype != weights[1].dtype:
        raise RuntimeError(factors(op, "h0", h0, "weights[1]", weights[1]))
    if not (x.dtype.is_floating_point or x.dtype.is_complex):
        raise RuntimeError(f"{op}: expected a floating or complex input, got {x.dtype}")
    H = weights[0].shape[0] // G
    R = H if c0 is None else weights[1].shape[1]
    for name, state, features in (("h0", h0, R), ("c0", c0, H)):
        if state is None:
            continue
        if state.device != x.device:
            raise RuntimeError(_devices("hidden", x, state))
        _check_parameter(op, name, state, (num_layers * K, B, features), x)
    dtype, device, features = x.dtype, x.device, x.shape[-1]
    for first in range(0, len(weights), per_direction):
        if first == per_direction * K:
            features = K * R  # from the second layer on
        shapes = [(G * H, features), (G * H, R), *[(G * H,)] * (plain - 2), (R, H)]
        for n, shape in zip(range(first, first + per_direction), shapes, strict=False):
            w = weights[n]
            if w.device != device:
                raise RuntimeError(_devices("parameter", x, w))
            if w.shape != shape or w.dtype != dtype:
                _check_parameter(op, f"weights[{n}]", w, shape, x)


def factors(op: str, name: str, x: Tensor, weight_name: str, weight: Tensor) -> str:
    """Of two dtypes, which cannot be multiplied: torch's words, and ours."""
    got, expected = (t.type().split(".")[-1].removesuffix("Tensor") for t in (x, weight))
    return (
        f"mat1 and mat2 must have the same dtype, but got {got} and {expected}: {op}: {name}: expected {weight.dtype} "
        f"as {weight_name} has, got {x.dtype}"
    )


def check_pool(x: Tensor, v: Tensor, w: Tensor | None, b: Tensor | None) -> None:
    """Raises RuntimeError where an argument of `functional.attention_pool` is off."""
    if x.dim() != 3:
        raise RuntimeError(f"attention_pool: expected input with 3 dimensions [B, T, D], got shape {list(x.shape)}")
    if not x.dtype.is_floating_point:
        raise RuntimeError(f"attention_pool: expected a floating input, got {x.dtype}")
    D = x.shape[2]
    if D == 0:
        raise RuntimeError(f"attention_pool: expected input with at least one feature, got shape {list(x.shape)}")
    if w is None:
        if b is not None:
            raise RuntimeError("attention_pool: expected no b without w (a constant cancels in the softmax)")
        _check_parameter("attention_pool", "v", v, (D,), x)
        return
    if w.dim() != 2:
        raise RuntimeError(f"attention_pool: expected w of shape [A, {D}], got {list(w.shape)}")
    A = w.shape[0]
    _check_parameter("attention_pool", "v", v, (A,), x)
    _check_parameter("attention_pool", "w", w, (A, D), x)
    if b is not None:
        _check_parameter("attention_pool", "b", b, (A,), x)


def _check_parameter(op: str, name: str, p: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    if p.shape != shape:
        raise RuntimeError(f"{op}: expected {name} of shape {list(shape)}, got {list(p.shape)}")
    if p.dtype != x.dtype:
        raise RuntimeError(f"{op}: {name}: expected dtype {x.dtype} as the input has, got {p.dtype}")
    if p.device != x.device:
        raise RuntimeError(f"{op}: {name}: expected device {x.device} as the input has, got {p.device}")


def _no_tensor(n: int, argument: int, got: Any) -> str:
    """torch's words."""
    return f"expected Tensor as element {n} in argument {argument}, but got {type(got).__name__}"


def _devices(kind: str, x: Tensor, other: Tensor) -> str:
    """torch's words."""
    return (
        f"Input and {kind} tensors are not at the same device, found input tensor at {x.device} and {kind} "
        f"tensor at {other.device}"
    )
