"""The Triton kernels, on a CUDA device or, with TRITON_INTERPRET=1, interpreted on a CPU.

triton is imported with the first call that runs here, not with the package.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from types import SimpleNamespace

import torch
from torch import Tensor

from rnnattn.backends import pool_gemms, regularised_steps, sequence, sequence_choice, stepwise, stepwise_backward
from rnnattn.backends.base import Backend, Call
from rnnattn.backends.regularised import scan_gradients
from rnnattn.backends.rows import Rows
from rnnattn.reference import STACK, has_projection, stack_backward, stack_forward
from rnnattn.reference.attention_pool import kept_steps

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 8192  # features of one step that a pooling kernel still holds in registers
WIDEST_ROW = 4096  # units of a row that a step with layer norm does


class Triton(Backend):
    name = "triton"
    reads_packed = True

    def unavailable(self) -> str | None:
        if not _installed():
            return "triton is not installed (pip install triton)"
        if torch.cuda.is_available() or _interpreting():
            return None
        return "no CUDA device (TRITON_INTERPRET=1 runs the kernels on a CPU, slowly)"

    def unsupported(self, call: Call) -> str | None:
        if call.dtype not in DTYPES:
            return f"its kernels have float32, bfloat16 and float16, the tensors are {call.dtype}"
        if call.device == "cpu" and not _interpreting():
            return "its kernels run on a CUDA device, the tensors are on cpu (TRITON_INTERPRET=1 interprets them)"
        if call.device not in ("cpu", "cuda"):
            return f"its kernels run on a CUDA device, the tensors are on {call.device}"
        if call.op == "attention_pool" and max(call.features, call.hidden) > WIDEST:
            return f"its pooling kernels take at most {WIDEST} features, got D={call.features}, A={call.hidden}"
        if call.regularised and call.hidden > WIDEST_ROW:
            return f"its kernels for a regularised step take at most {WIDEST_ROW} units, got H={call.hidden}"
        return None

    def kernel(self, call: Call) -> str:
        if call.recurrent:
            return _recurrent_kernel(call)
        if call.hidden == 0:
            return "Triton, linear scores and pooling in one pass over x"
        return "Triton, additive scores and pooling fused; GEMMs in the backward pass"

    def stacks(self, call: Call) -> bool:
        return sequence_choice.stacks(call)

    def step_us(self, call: Call) -> float | None:
        as_one = sequence_choice.runs_as_one(call)
        plan = sequence_choice.plan_of_call(call, as_one=as_one)
        if plan is None:
            return None
        return plan.step_us * (call.T + call.layers - 1) / (call.T * call.layers) if as_one else plan.step_us

    def recurrent_layer_forward(  # type: ignore[no-untyped-def]
        self, x, h0, c0, weights, lengths, resets, *settings
    ):
        rows = Rows.of(x, h0.shape[1], lengths, resets)
        with _device(x):
            return _layer_forward(rows, x, h0, c0, weights, resets, *settings)

    def recurrent_layer_backward(  # type: ignore[no-untyped-def]
        self, dy, dh_n, dc_n, dcells, x, h0, c0, weights, lengths, resets, reset_to_initial, y, gates, cells,
        has_biases, direction, mode, needs_dx, needs_dweights, overwrites_gates=False,
    ):  # fmt: skip
        rows = Rows.of(x, h0.shape[1], lengths, resets)
        with _device(x):
            return _layer_backward(
                rows, dy, dh_n, dc_n, dcells, x, h0, c0, weights, resets, reset_to_initial, y, gates, cells, has_biases,
                direction, mode, needs_dx, needs_dweights,
            )  # fmt: skip

    def regularised_scan_forward(self, *arguments):  # type: ignore[no-untyped-def]
        with _device(arguments[0]):
            return regularised_steps.scan_forward(_regularised(), *arguments)

    def regularised_scan_backward(self, *arguments):  # type: ignore[no-untyped-def]
        with _device(arguments[4]):
            return scan_gradients(functools.partial(regularised_steps.scan_backward, _regularised()), *arguments)

    def attention_pool_forward(self, x, v, w, b, lengths, mask, need_weights):  # type: ignore[no-untyped-def]
        B, T, D = x.shape
        if B == 0 or T == 0:
            weights = x.new_zeros(B, T) if need_weights else None
            return torch.zeros(B, D, device=x.device), weights, torch.full((B,), -torch.inf, device=x.device)
        with _device(x):
            scores = _empty_scores(x) if need_weights else None
            pooled, lse = _pool(x, v, w, b, lengths, mask, scores)
            weights = None if scores is None else pool_gemms.softmax_weights(scores, lse).to(x.dtype)
        return pooled, weights, lse

    def attention_pool_backward(  # type: ignore[no-untyped-def]
        self, d_pooled, d_weights, x, v, w, b, lengths, mask, pooled, lse
    ):
        from rnnattn.kernels import additive_pool_backward, linear_pool_backward

        if x.shape[0] == 0 or x.shape[1] == 0:
            return tuple(None if p is None else p.new_zeros(p.shape) for p in (x, v, w, b))
        v, b, lengths, mask, d_weights = stepwise.contiguous(v, b, lengths, mask, d_weights)
        with _device(x):
            d_pooled, p = pool_gemms.row_cotangent(d_pooled, pooled, lse), None
            if d_weights is not None:
                scores = _empty_scores(x)
                _pool(x, v, w, b, lengths, mask, scores)
                p = pool_gemms.softmax_weights(scores, lse)
            delta = pool_gemms.row_delta(d_pooled, pooled, d_weights, p)
            if w is None:
                dx, dv = linear_pool_backward(
                    d_pooled, d_weights, delta, lse, pool_gemms.dense_rows(x), v, lengths, mask
                )
                return dx, dv, None, None
            keep = kept_steps(x, lengths, mask)
            return pool_gemms.additive_backward(
                additive_pool_backward, d_pooled, d_weights, delta, lse, x, v, w, b, keep
            )


def _pool(
    x: Tensor,  # [B, T, D]
    v: Tensor,  # [D] or [A]
    w: Tensor | None,  # [A, D]
    b: Tensor | None,  # [A]
    lengths: Tensor | None,  # int64 [B]
    mask: Tensor | None,  # bool [B, T]
    scores: Tensor | None,  # out fp32 [B, T]
) -> tuple[Tensor, Tensor]:
    """pooled [B, D] and lse [B]."""
    from rnnattn.kernels import additive_pool_forward, linear_pool_forward

    x, v = pool_gemms.dense_rows(x), v.contiguous()
    b, lengths, mask = stepwise.contiguous(b, lengths, mask)
    if w is None:
        pooled, lse = linear_pool_forward(x, v, lengths, mask, scores)
    else:
        pooled, lse = additive_pool_forward(x, v, w.contiguous(), b, lengths, mask, scores)
    return pooled, lse


def _empty_scores(x: Tensor) -> Tensor:
    """fp32 [B, T]: -inf, which the kernel overwrites at kept steps."""
    return torch.full(x.shape[:2], -torch.inf, device=x.device)


def _device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: make it the one that x is on."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _layer_forward(  # type: ignore[no-untyped-def]
    rows, x, h0, c0, weights, resets, reset_to_initial, has_biases, direction, mode, save
):
    """In one launch, or step by step."""
    inputs, settings = (x, h0, c0, weights), (resets, reset_to_initial, has_biases)
    launch = _launch(x, rows, h0, weights, direction, mode, backward=False)
    if launch is not None:
        precision = sequence_choice.precision(x.dtype)
        return sequence.layer_forward(_sequence(), launch, precision, rows, *inputs, *settings, direction, mode, save)
    if direction != STACK:
        return stepwise.layer_forward(_step(), rows, *inputs, *settings, direction, mode, save)

    def layer(x, h, c, w):  # type: ignore[no-untyped-def]
        return _layer_forward(rows, x, h, c, w, *settings, "forward", mode, save)

    return stack_forward(layer, *inputs)


def _layer_backward(  # type: ignore[no-untyped-def]
    rows, dy, dh_n, dc_n, dcells, x, h0, c0, weights, resets, reset_to_initial, y, gates, cells, has_biases, direction,
    mode, needs_dx, needs_dweights,
):  # fmt: skip
    inputs, results = (dy, dh_n, dc_n, dcells, x, h0, c0, weights), (y, gates, cells)
    arguments = *inputs, resets, reset_to_initial, *results, has_biases, direction, mode, needs_dx, needs_dweights
    launch = _launch(x, rows, h0, weights, direction, mode, backward=True)
    if launch is not None:
        precision = sequence_choice.precision(x.dtype)
        return sequence.layer_backward(_sequence(), launch, precision, rows, *arguments)
    if direction != STACK:
        return stepwise_backward.layer_backward(_step(), rows, *arguments)

    def layer(dy, dh, dc, dcells, x, h, c, w, y, gates, cells, needs_dx):  # type: ignore[no-untyped-def]
        return _layer_backward(
            rows, dy, dh, dc, dcells, x, h, c, w, resets, reset_to_initial, y, gates, cells, has_biases, "forward",
            mode, needs_dx, needs_dweights,
        )  # fmt: skip

    return stack_backward(layer, *inputs, *results, needs_dx)


def _launch(
    x: Tensor, rows: Rows, h0: Tensor, weights: list[Tensor], direction: str, mode: str, backward: bool
) -> sequence.Launch | None:
    """How the sequence kernels run a layer or a stack, or None: step by step, as always with a projection."""
    K, B, H = h0.shape
    if has_projection(weights, K):
        return None
    directions, layers = (1, K) if direction == STACK else (K, 1)
    return sequence_choice.launch_for(x.device, mode, B, rows.T, H, x.dtype, directions, backward, layers)


def _recurrent_kernel(call: Call) -> str:
    as_one = sequence_choice.runs_as_one(call)
    forward = sequence_choice.plan_of_call(call, as_one=as_one)
    backward = sequence_choice.plan_of_call(call, True, as_one) if call.grad else None
    if forward is None:
        return "a Triton kernel and a GEMM per step"
    return str(forward) if backward is None else f"forward {forward}; backward {backward}"


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _step() -> stepwise.StepKernels:
    from rnnattn.kernels import step_backward, step_forward

    return SimpleNamespace(forward=step_forward, backward=step_backward)


@functools.cache
def _sequence() -> sequence.SequenceKernels:
    from rnnattn.kernels import sequence_backward, sequence_forward

    return SimpleNamespace(forward=sequence_forward, backward=sequence_backward)


@functools.cache
def _regularised() -> regularised_steps.RegularisedKernels:
    from rnnattn.kernels import regularised_backward, regularised_forward

    return SimpleNamespace(forward=regularised_forward, backward=regularised_backward)
