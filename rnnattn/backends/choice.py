"""The order in which `auto` tries backends for a call, from measurements.

Every rule names what was measured; `python -m benchmarks` shows whether it still holds, and
docs/performance.md has the figures.
"""

from __future__ import annotations

import functools

import torch

from rnnattn.backends.base import Call

SMALL_POOL = 2**20  # elements of x below which a call's own cost decides


def order(call: Call) -> list[tuple[str, str]]:
    """(backend, reason) pairs, the best first."""
    last = ("reference", "no kernel can run this call")
    if call.device != "cpu":
        ranked = [("triton", "the kernels for a GPU"), ("cuda", "CUDA kernels, where Triton is missing"), last]
        if not call.recurrent:
            return ranked
        why = "our LSTM is not yet measured on a GPU" if call.op == "lstm" else "no other has kernels for it"
        return [("torch", f"cuDNN: {why}"), *ranked]
    ranked = [("cpp", "the kernels for a CPU"), last]
    if call.op == "attention_pool":
        full = call.dtype in (torch.float32, torch.float64) and not call.ragged and not call.compiling
        small = full and call.B * call.T * call.features < SMALL_POOL
        return [("torch", "eager PyTorch: so small a call costs less there"), *ranked] if small else ranked
    if call.op != "lstm":
        ranked.insert(1, ("torch", f"torch's own {call.op.upper()}, a GEMM and pointwise kernels per step"))
        return ranked
    if _torch_is_wrong(call):
        return ranked
    slower = _torch_is_slower(call)
    if slower:
        ranked.insert(1, ("torch", f"torch's own kernel, though {slower}"))
        return ranked
    return [("torch", "oneDNN measured faster on padded batches in this dtype"), *ranked]


def _torch_is_wrong(call: Call) -> bool:
    """oneDNN 3.12 returns wrong bf16 gradients from H = 1024 up on AMX (relative error above 0.1)."""
    return call.dtype == torch.bfloat16 and call.grad and call.hidden >= 1024


def _torch_is_slower(call: Call) -> str | None:
    """Why our LSTM runs before torch's on a CPU, or None."""
    if call.ragged:
        return "it takes 1.5 to 3 times as long on a packed sequence"
    if call.projection:
        return "oneDNN has no projection, and ATen takes 1.6 to 4.4 times as long"
    if call.dtype == torch.float16 and not _has_16_bit_products("fp16"):
        return "oneDNN takes 2.7 to 75 times as long in fp16 without fp16 instructions"
    if call.dtype == torch.bfloat16 and not call.compiling and call.B >= 4 and not _has_16_bit_products("bf16"):
        return "oneDNN takes 1.9 to 3.3 times as long in bf16 without bf16 instructions"
    few = not call.compiling and call.dtype == torch.float32 and call.B <= 4 and call.hidden <= 128
    if few and (not call.grad or call.directions == 2):
        return "oneDNN takes 1.03 to 1.7 times as long for up to 4 rows and 128 units"
    if call.dtype == torch.float64 and call.grad:
        return "ATen takes 1.4 to 3 times as long to train in fp64"
    return None


@functools.cache
def _has_16_bit_products(dtype: str) -> bool:
    """Whether this CPU multiplies 16-bit numbers itself; assumed where torch cannot tell."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return True
    has = torch.cpu.get_capabilities()
    return any(has.get(f"{unit}_{dtype}", False) for unit in ("amx", "avx512"))
