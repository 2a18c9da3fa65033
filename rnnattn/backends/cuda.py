"""The CUDA C++ kernels of the compiled extension: the GPU without Triton.

The operators write into tensors that are made here (csrc/cuda/schemas.h lists them).
"""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
from torch import Tensor

from rnnattn.backends import pool_gemms, regularised_steps, stepwise, stepwise_backward
from rnnattn.backends.base import Backend, Call
from rnnattn.backends.cpp import build_info, extension_error, native
from rnnattn.backends.regularised import scan_gradients
from rnnattn.backends.rows import Rows
from rnnattn.reference.attention_pool import kept_steps

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODES = ("LSTM", "GRU", "RNN_TANH", "RNN_RELU")  # their numbers in csrc/cuda/modes.h
TILE = 32  # steps that a block of a pooling kernel takes at a time
BLOCKS = 512  # enough of them to fill a GPU


class Cuda(Backend):
    name = "cuda"
    reads_packed = True

    @property
    def ops(self) -> Any:
        return native()

    def unavailable(self) -> str | None:
        error = extension_error()
        if error:
            return error
        built = build_info()["cuda"]
        if not isinstance(built, list) or not built:
            return "the compiled extension was built without CUDA (RNNATTN_BUILD=cuda says why)"
        if not torch.cuda.is_available():
            return "no CUDA device"
        device = torch.cuda.get_device_capability()
        if not any(runs_on(architecture, device) for architecture in built):
            return f"built for {', '.join(built)} (TORCH_CUDA_ARCH_LIST), the device has {'.'.join(map(str, device))}"
        return None

    def unsupported(self, call: Call) -> str | None:
        if call.device != "cuda":
            return f"its kernels run on a CUDA device, the tensors are on {call.device}"
        if call.dtype not in DTYPES:
            return f"its kernels have float32, bfloat16 and float16, the tensors are {call.dtype}"
        return None

    def kernel(self, call: Call) -> str:
        if call.recurrent:
            return "a CUDA kernel and a GEMM per step"
        if call.hidden == 0:
            return "CUDA, linear scores and pooling in one pass over x"
        return "CUDA, additive scores without [B, T, A] in memory, then pooling; GEMMs in the backward pass"

    def _step(self) -> Step:
        return Step(self.ops.step_forward, self.ops.step_backward)

    def _regularised_step(self) -> Step:
        return Step(self.ops.regularised_forward, self.ops.regularised_backward)

    def recurrent_layer_forward(  # type: ignore[no-untyped-def]
        self, x, h0, c0, weights, lengths, resets, reset_to_initial, has_biases, direction, mode, save
    ):
        rows = Rows.of(x, h0.shape[1], lengths, resets)
        return stepwise.layer_forward(
            self._step(), rows, x, h0, c0, weights, resets, reset_to_initial, has_biases, direction, mode, save
        )

    def recurrent_layer_backward(  # type: ignore[no-untyped-def]
        self, dy, dh_n, dc_n, dcells, x, h0, c0, weights, lengths, resets, reset_to_initial, y, gates, cells,
        has_biases, direction, mode, needs_dx, needs_dweights, overwrites_gates=False,
    ):  # fmt: skip
        rows = Rows.of(x, h0.shape[1], lengths, resets)
        return stepwise_backward.layer_backward(
            self._step(), rows, dy, dh_n, dc_n, dcells, x, h0, c0, weights, resets, reset_to_initial, y, gates, cells,
            has_biases, direction, mode, needs_dx, needs_dweights,
        )  # fmt: skip

    def regularised_scan_forward(self, *arguments):  # type: ignore[no-untyped-def]
        return regularised_steps.scan_forward(self._regularised_step(), *arguments)

    def regularised_scan_backward(self, *arguments):  # type: ignore[no-untyped-def]
        scan = functools.partial(regularised_steps.scan_backward, self._regularised_step())
        return scan_gradients(scan, *arguments)

    def attention_pool_forward(self, x, v, w, b, lengths, mask, need_weights):  # type: ignore[no-untyped-def]
        x, v, lengths, mask = (
            pool_gemms.dense_rows(x),
            v.contiguous(),
            pool_gemms.dense_rows(lengths),
            pool_gemms.dense_rows(mask),
        )
        scores = self._additive_scores(x, v, w, b, lengths, mask) if w is not None else None
        if scores is None and need_weights:
            scores = _fp32(x, *x.shape[:2])
        return self._pool(x, v if w is None else None, lengths, mask, scores, need_weights)

    def attention_pool_backward(  # type: ignore[no-untyped-def]
        self, d_pooled, d_weights, x, v, w, b, lengths, mask, pooled, lse
    ):
        x, v, lengths, mask = (
            pool_gemms.dense_rows(x),
            v.contiguous(),
            pool_gemms.dense_rows(lengths),
            pool_gemms.dense_rows(mask),
        )
        d_pooled = pool_gemms.row_cotangent(d_pooled, pooled, lse)
        p = None
        if d_weights is not None:
            d_weights = d_weights.float().contiguous()
            p = pool_gemms.softmax_weights(self._scores(x, v, w, b, lengths, mask), lse)
        delta = pool_gemms.row_delta(d_pooled, pooled, d_weights, p)
        if w is not None:
            keep = kept_steps(x, lengths, mask)
            return pool_gemms.additive_backward(self._between_gemms, d_pooled, d_weights, delta, lse, x, v, w, b, keep)
        B, T, D = x.shape
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dv = _fp32(x, _blocks(B * -(-T // TILE)), D)
        self.ops.linear_pool_backward(x, v, lengths, mask, d_pooled, d_weights, delta, lse, dx, dv)
        return dx, dv.sum(0).to(v.dtype), None, None

    def _pool(
        self,
        x: Tensor,  # [B, T, D]
        v: Tensor | None,  # [D] for linear scores, else the scores are given
        lengths: Tensor | None,  # int64 [B]
        mask: Tensor | None,  # bool [B, T]
        scores: Tensor | None,  # fp32 [B, T], out for linear scores
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        B, T, D = x.shape
        S = max(1, min(-(-T // TILE), -(-BLOCKS // max(B, 1))))
        pooled, lse = _fp32(x, B, D), _fp32(x, B)
        weights = x.new_empty(B, T) if need_weights else None
        partial, partial_m, partial_sum = _fp32(x, B, S, D), _fp32(x, B, S), _fp32(x, B, S)
        self.ops.softmax_pool_forward(
            x, v, lengths, mask, scores, partial, partial_m, partial_sum, pooled, lse, weights
        )
        return pooled, weights, lse

    def _scores(self, x, v, w, b, lengths, mask) -> Tensor:  # type: ignore[no-untyped-def]
        """fp32 [B, T], -inf where not kept."""
        if w is not None:
            return self._additive_scores(x, v, w, b, lengths, mask)
        scores = _fp32(x, *x.shape[:2])
        self._pool(x, v, lengths, mask, scores, need_weights=False)
        return scores

    def _additive_scores(self, x, v, w, b, lengths, mask) -> Tensor:  # type: ignore[no-untyped-def]
        scores = _fp32(x, *x.shape[:2])
        self.ops.additive_scores(x, w.contiguous(), None if b is None else b.contiguous(), v, lengths, mask, scores)
        return scores

    def _between_gemms(self, product, x, v, b, keep, d_pooled, d_weights, delta, lse, T):  # type: ignore[no-untyped-def]
        (N, A), rows = product.shape, lse.shape[0]
        du, p = x.new_empty(rows, T, A), _fp32(x, rows, T)
        dv, db = _fp32(x, _blocks(-(-N // TILE)), A), _fp32(x, _blocks(-(-N // TILE)), A)
        self.ops.additive_pool_backward(
            product.view(rows, T, A), x.view(rows, T, -1), v, None if b is None else b.contiguous(),
            None if keep is None else keep.view(rows, T), d_pooled,
            None if d_weights is None else d_weights.view(rows, T), delta, lse, du, p, dv, db,
        )  # fmt: skip
        return du.view(N, A), p.view(N), dv.sum(0), db.sum(0)


class Step:
    """Two operators of a step as `stepwise.StepKernels` or `regularised_steps.RegularisedKernels`, by mode's number."""

    def __init__(self, forward: Any, backward: Any) -> None:
        self._forward, self._backward = forward, backward

    def forward(self, mode: str, *arguments: Any) -> None:
        self._forward(MODES.index(mode), *arguments)

    def backward(self, mode: str, *arguments: Any) -> None:
        self._backward(MODES.index(mode), *arguments)


def runs_on(architecture: str, device: tuple[int, int]) -> bool:
    """Whether code built for an architecture such as "8.6" or "9.0+PTX" runs on a device (major, minor)."""
    match = re.fullmatch(r"(\d+)\.(\d+)(a|f)?(\+PTX)?", architecture)
    if match is None:
        return True  # a name such as "Hopper": let the driver decide
    built = int(match[1]), int(match[2])
    return device >= built if match[4] else device[0] == built[0] and device >= built


def _blocks(tiles: int) -> int:
    return min(tiles, BLOCKS)


def _fp32(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=x.device)
