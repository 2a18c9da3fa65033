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
        return [("torch", "cuDNN: our recurrent layers are not yet measured on a GPU"), *ranked]
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
    if _has_16_bit_kernel(call):
        why = "oneDNN multiplies 16-bit numbers by this CPU's instructions; our LSTM is not yet measured there"
        return [("torch", why), *ranked]
    ranked.insert(1, ("torch", "torch's own kernel, though it measured slower at every size"))
    return ranked


def _torch_is_wrong(call: Call) -> bool:
    """oneDNN 3.12 returns wrong bf16 gradients from H = 1024 up on AMX (relative error above 0.1)."""
    return call.dtype == torch.bfloat16 and call.grad and call.hidden >= 1024


def _has_16_bit_kernel(call: Call) -> bool:
    """Whether oneDNN's LSTM runs this call in 16 bits; it has none for lengths, projections or other types."""
    names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    if call.dtype not in names or call.ragged or call.projection:
        return False
    return _has_16_bit_products(names[call.dtype])


def _has_16_bit_products(dtype: str) -> bool:
    """Whether this CPU multiplies 16-bit numbers itself; assumed where torch cannot tell."""
    return any(_capabilities().get(f"{unit}_{dtype}", False) for unit in ("amx", "avx512"))


_has_16_bit_products._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as `backends.unavailable`


@functools.cache
def _capabilities() -> dict[str, bool]:
    if not hasattr(torch.cpu, "get_capabilities"):
        return {"amx_bf16": True, "amx_fp16": True}
    return dict(torch.cpu.get_capabilities())
