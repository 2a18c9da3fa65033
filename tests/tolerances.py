"""How far a result may lie from the float64 truth: one table, and the error it bounds."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16

# Relative L2 error allowed, in units of the dtype's eps. Rounding a result to its dtype costs up to
# half an eps, so a 16-bit forward that keeps its sums in fp32 stays below 1. "large" are the cases
# with scaled inputs. Where an entry lies above 8, the comment tells what the reference equations
# themselves measured, the worst of 8 seeds: these gradients are differences of nearly equal numbers.
TOLERANCES: dict[str, dict[torch.dtype, float]] = {
    "lstm": {F64: 6, F32: 6, BF16: 1, F16: 1},
    "lstm_backward": {F64: 8, F32: 8, BF16: 4, F16: 4},
    "lstm_large": {F64: 12, F32: 12, BF16: 1, F16: 1},  # fp32 5.8: gate inputs of several hundred
    "lstm_large_backward": {F64: 128, F32: 128, BF16: 8, F16: 12},  # fp32 53, fp16 6.1: 1 - tanh(c)^2
    "gru": {F64: 6, F32: 6, BF16: 1, F16: 1},
    "gru_backward": {F64: 8, F32: 8, BF16: 4, F16: 4},
    "gru_large": {F64: 8, F32: 8, BF16: 1, F16: 1},
    "gru_large_backward": {F64: 64, F32: 64, BF16: 8, F16: 8},  # fp32 29: 1 - n^2
    "rnn": {F64: 6, F32: 6, BF16: 1, F16: 1},
    "rnn_backward": {F64: 8, F32: 8, BF16: 4, F16: 4},
    "rnn_large": {F64: 8, F32: 8, BF16: 1, F16: 1},
    "rnn_large_backward": {F64: 64, F32: 64, BF16: 12, F16: 12},  # fp32 32, bf16 8.4, fp16 10: 1 - h^2
    "regularised": {F64: 6, F32: 6, BF16: 1, F16: 1},
    "regularised_backward": {F64: 8, F32: 8, BF16: 4, F16: 4},
    "normed": {F64: 16, F32: 16, BF16: 3, F16: 4},  # fp32 9.3, bf16 1.8, fp16 2.5: norms of few numbers
    "normed_backward": {F64: 64, F32: 64, BF16: 16, F16: 16},  # fp32 34, bf16 8.9, fp16 8.2: as above
    "attention_pool": {F64: 8, F32: 8, BF16: 1, F16: 1},
    "attention_pool_backward": {F64: 64, F32: 64, BF16: 4, F16: 4},  # fp32 48: dv, the sum of ds u, where sum ds = 0
    "attention_pool_large": {F64: 96, F32: 96, BF16: 1, F16: 1},  # fp32 44: an ulp of a score of 100 is 64 eps
    "attention_pool_large_backward": {F64: 128, F32: 128, BF16: 4, F16: 4},  # fp32 61: as above
}


def relative_error(got: Tensor, truth: Tensor) -> float:
    """||got - truth|| / ||truth||, computed in float64.

    Numbers below the smallest normal one of got's dtype count as zero: they bound ||truth|| from
    below. Where the truth is zero up to float64's rounding, the error is that of an element.
    """
    truth = truth.to("cpu", F64)
    difference = (got.detach().to("cpu", F64) - truth).norm().item()
    size, root = truth.norm().item(), math.sqrt(truth.numel())
    size = root if size < 1e-13 * root else max(size, torch.finfo(got.dtype).tiny * root)
    return difference / size if truth.numel() else 0.0


def close(got: Any, want: Any) -> None:
    """Float64 results (nested as they come) that differ by the order of sums alone."""
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


# Triton's interpreter rounds fp32 to bf16 toward zero, a GPU to nearest: up to twice the error (attention_pool_backward
# measured 6.1 eps, lstm_large_backward 12.6; in fp16, which the interpreter rounds to nearest, 0.9 and 6).
INTERPRETED_BF16 = 2


def assert_close(
    got: dict[str, Tensor], truth: dict[str, Tensor], op: str, dtype: torch.dtype, backend: str = ""
) -> None:
    """Every result has truth's shape, the dtype, and an error within the table (gradients: "d...")."""
    assert got.keys() == truth.keys()
    on_cpu = all(value.device.type == "cpu" for value in got.values())
    interpreted_bf16 = backend == "triton" and dtype == BF16 and on_cpu
    eps, worse = torch.finfo(dtype).eps * (INTERPRETED_BF16 if interpreted_bf16 else 1), []
    for name, value in got.items():
        assert value.shape == truth[name].shape, f"{name}: {list(value.shape)}, expected {list(truth[name].shape)}"
        assert value.dtype == dtype, f"{name}: {value.dtype}, expected {dtype}"
        allowed = TOLERANCES[op + "_backward" if name.startswith("d") else op][dtype]
        error = relative_error(value, truth[name]) / eps
        if not error <= allowed:  # NaN too
            worse.append(f"{name}: relative error {error:.3g} eps, allowed {allowed:g} eps")
    assert not worse, "; ".join(worse)
