"""The order in which `auto` tries backends for a call, from measurements.

A rule names what was measured; `python -m benchmarks` shows whether it still holds.
"""

from __future__ import annotations

import torch

from rnnattn.backends.base import Call


def order(call: Call) -> list[tuple[str, str]]:
    """(backend, reason) pairs, the best first."""
    own = "cpp" if call.device == "cpu" else "triton"
    ranked = [(own, f"the kernels for {call.device}")]
    if call.device != "cpu":
        ranked.append(("cuda", "CUDA kernels, where Triton is missing"))
    ranked.append(("reference", "no kernel can run this call"))
    if call.op == "lstm":
        if _torch_measured_wrong(call):
            return ranked
        if call.device != "cpu":
            ranked.insert(0, ("torch", "torch's own kernel: ours is not yet measured on a GPU"))
        elif call.ragged:
            ranked.insert(1, ("torch", "torch's own kernel on a packed sequence"))
        else:
            ranked.insert(0, ("torch", "torch's own kernel measured faster on a CPU for padded batches"))
    return ranked


def _torch_measured_wrong(call: Call) -> bool:
    """oneDNN 3.12 returns wrong bf16 gradients from H = 1024 up on AMX (relative error above 0.1)."""
    return call.device == "cpu" and call.dtype == torch.bfloat16 and call.grad and call.hidden >= 1024
