"""The order in which `auto` tries backends for a call, from measurements.

Every rule names what was measured; `python -m benchmarks` shows whether it still holds, and
docs/performance.md has the figures.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from rnnattn.backends import sequence_choice
from rnnattn.backends.base import Call
from rnnattn.backends.cpp import build_info, extension_error

AHEAD_OF_CUDNN: frozenset[int] = frozenset()  # compute capabilities where our sequence kernels measured so: none yet
SMALL_POOL = 2**20  # elements of x below which a call's own cost decides


def order(call: Call) -> list[tuple[str, str]]:
    """(backend, reason) pairs, the best first."""
    if call.traced:
        why = "a traced graph runs anywhere with torch's own operators"
        return [("torch", why), *order(replace(call, traced=False))]
    last = ("reference", "no kernel can run this call")
    if call.device != "cpu":
        ranked = [("triton", "the kernels for a GPU"), ("cuda", "CUDA kernels, where Triton is missing"), last]
        if not call.recurrent:
            return ranked
        if sequence_choice.in_one_launch(call, AHEAD_OF_CUDNN):
            return ranked
        return [("torch", "cuDNN: our recurrent layers are not yet measured ahead of it on this GPU"), *ranked]
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
    units = _units_of_torch_alone(call)
    if units:
        return [("torch", f"oneDNN multiplies 16-bit numbers by this CPU's {units}, our kernels do not"), *ranked]
    ranked.insert(1, ("torch", "torch's own kernel, though it measured slower at every size"))
    return ranked


def _torch_is_wrong(call: Call) -> bool:
    """oneDNN 3.12 returns wrong bf16 gradients from H = 1024 up on AMX (relative error above 0.1)."""
    return call.dtype == torch.bfloat16 and call.grad and call.hidden >= 1024


def _units_of_torch_alone(call: Call) -> str:
    """The instructions by which oneDNN's LSTM runs a call in 16 bits and our kernels cannot, or an empty text.

    oneDNN has no kernel for lengths, projections or other types. Ours multiply bf16 by AMX or AVX512_BF16, unless they
    were built by an older compiler or a lower instruction set was asked for; products of fp16 in fp32 are ahead of
    oneDNN's by AVX512-FP16, and were not measured against AMX-FP16.
    """
    if call.ragged or call.projection:
        return ""
    if call.dtype == torch.float16:
        return "AMX-FP16" if _has("amx_fp16") else ""
    if call.dtype != torch.bfloat16:
        return ""
    isa = _our_isa()
    if _has("amx_bf16"):
        return "" if isa == "amx" else "AMX"
    return "AVX512_BF16" if _has("avx512_bf16") and isa not in ("amx", "avx512_bf16") else ""


def _has(unit: str) -> bool:
    """Whether this CPU has some instructions; those for 16 bits are assumed where torch cannot tell."""
    return _capabilities().get(unit, False)


def _our_isa() -> str:
    return "" if extension_error() else str(build_info()["isa"])


_has._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as `backends.unavailable`
_our_isa._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _capabilities() -> dict[str, bool]:
    if not hasattr(torch.cpu, "get_capabilities"):
        return {"amx_bf16": True, "amx_fp16": True}
    return dict(torch.cpu.get_capabilities())
