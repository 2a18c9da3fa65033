"""The reference equations as a backend: any device, any floating dtype, no speed claimed."""

from __future__ import annotations

from typing import Any

import torch

from rnnattn import reference
from rnnattn.backends.base import Backend, Call

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Reference(Backend):
    name = "reference"

    def unsupported(self, call: Call) -> str | None:
        return None if call.dtype in FLOATING else f"dtype {call.dtype} is not a floating type"

    def kernel(self, call: Call) -> str:
        return "plain PyTorch equations, one Python step per time step"

    def recurrent_layer_forward(  # type: ignore[no-untyped-def]
        self, x, h0, c0, weights, lengths, resets, reset_to_initial, has_biases, direction, mode, save
    ):
        return reference.recurrent_layer_forward(
            x, h0, c0, weights, lengths, resets, reset_to_initial, has_biases, direction, mode
        )

    def recurrent_layer_backward(  # type: ignore[no-untyped-def]
        self, dy, dh_n, dc_n, dcells, x, h0, c0, weights, lengths, resets, reset_to_initial, y, gates, cells,
        has_biases, direction, mode, needs_dx, needs_dweights, overwrites_gates=False,
    ):  # fmt: skip
        return reference.recurrent_layer_backward(
            dy, dh_n, dc_n, dcells, x, h0, c0, weights, lengths, resets, reset_to_initial, y, gates, cells, has_biases,
            direction, mode,
        )  # fmt: skip

    def regularised_scan_forward(self, *arguments):  # type: ignore[no-untyped-def]
        *inputs, _save = arguments
        a, h0, *_ = inputs
        return *reference.regularised_scan_forward(*inputs), h0.new_empty(0), h0.new_empty(0), a.new_empty(0)

    def regularised_scan_backward(self, *arguments):  # type: ignore[no-untyped-def]
        cotangents, inputs, settings = arguments[:4], arguments[4:12], arguments[12:22]
        with torch.enable_grad():
            leaves: list[Any] = [None if t is None else t.detach().requires_grad_() for t in inputs]
            outputs = reference.regularised_scan_forward(*leaves, *settings)
        pairs = [(y, d) for y, d in zip(outputs, cotangents, strict=True) if d is not None]
        found = torch.autograd.grad(
            [y for y, _ in pairs], [t for t in leaves if t is not None], [d for _, d in pairs], materialize_grads=True
        )
        gradients = iter(found)
        return [None if t is None else next(gradients) for t in leaves]

    def attention_pool_forward(self, x, v, w, b, lengths, mask, need_weights):  # type: ignore[no-untyped-def]
        pooled, weights, lse = reference.attention_pool_forward(x, v, w, b, lengths, mask)
        return pooled.clone(), weights, lse  # not a view, which nobody could write into

    def attention_pool_backward(  # type: ignore[no-untyped-def]
        self, d_pooled, d_weights, x, v, w, b, lengths, mask, pooled, lse
    ):
        return reference.attention_pool_backward(d_pooled, d_weights, x, v, w, b, lengths, mask, pooled, lse)
