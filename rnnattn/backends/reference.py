"""The reference equations as a backend: any device, any floating dtype, no speed claimed."""

from __future__ import annotations

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

    def attention_pool_forward(self, x, v, w, b, lengths, mask, need_weights):  # type: ignore[no-untyped-def]
        return reference.attention_pool_forward(x, v, w, b, lengths, mask)

    def attention_pool_backward(  # type: ignore[no-untyped-def]
        self, d_pooled, d_weights, x, v, w, b, lengths, mask, pooled, lse
    ):
        return reference.attention_pool_backward(d_pooled, d_weights, x, v, w, b, lengths, mask, pooled, lse)
