"""The products around a scan: sums in the accumulation type, fp32 at the precision of torch's recurrent layers.

cuDNN computes all of a recurrent layer in TF32 where `torch.backends.cudnn.rnn.fp32_precision` says so, as by default;
`torch.mm` asks another switch, by default off, that is one for all threads. So where the two differ fp32 products on
a GPU go to the cuBLAS that torch has loaded, whose `cublasGemmEx` takes the precision as an argument
(docs.nvidia.com/cuda/cublas).
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rnnattn.reference import accumulation_dtype

# Of the enumerations in cublas_api.h and library_types.h. Pedantic is true fp32 whatever the mode of torch's handle.
OP_N, OP_T, CUDA_R_32F, GEMM_DEFAULT = 0, 1, 0, -1
COMPUTE_32F_PEDANTIC, COMPUTE_32F_FAST_TF32 = 69, 77
INT, POINTER = ctypes.c_int, ctypes.c_void_p
ONE, ZERO = ctypes.c_float(1.0), ctypes.c_float(0.0)
LARGEST = 2**31 - 1

Multiply = Callable[[Tensor, Tensor], Tensor]  # of 2-D operands, in their dtype


def takes_tf32() -> bool:
    """Whether torch's own recurrent layers may take TF32."""
    return torch.backends.cudnn.rnn.fp32_precision == "tf32"  # type: ignore[attr-defined,no-any-return]


def wide(a: Tensor) -> Tensor:
    """An operand of `matmul`, made ready once: torch has 16-bit GEMMs with fp32 results on CUDA only."""
    return a if a.is_cuda else a.to(accumulation_dtype(a.dtype))


def matmul(a: Tensor, b: Tensor, multiply: Multiply = torch.mm) -> Tensor:
    """a @ b of 2-D operands with the result in the accumulation type, not rounded in between."""
    acc = accumulation_dtype(a.dtype)
    if a.is_cuda and a.dtype != acc:
        return torch.mm(a, b, out_dtype=acc)
    return multiply(wide(a), wide(b))


def recurrent_multiply(x: Tensor) -> Multiply:
    """How a layer with the input x multiplies: as a recurrent layer of torch does, by switches that are read once."""
    if not x.is_cuda or x.dtype != torch.float32:
        return torch.mm
    tf32, gemm = takes_tf32(), _cublas_gemm_ex()
    by_torch = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return torch.mm if gemm is None or tf32 == by_torch else functools.partial(_on_device, gemm, tf32)


@functools.cache
def _cublas_gemm_ex() -> Any:
    """`cublasGemmEx` of the library that torch has loaded, of which its handles are, or None."""
    version = torch.version.cuda
    if version is None or not hasattr(os, "RTLD_NOLOAD"):
        return None
    try:
        library = ctypes.CDLL(f"libcublas.so.{version.split('.')[0]}", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        return with_types(library.cublasGemmEx)
    except (OSError, AttributeError):
        return None


def with_types(gemm: Any) -> Any:
    """The function with the types of cublasGemmEx: handle, two operations, m, n, k, alpha, A with its type and leading
    dimension, B, beta, C with theirs, the type of computation, the algorithm."""
    matrix = POINTER, INT, INT
    gemm.argtypes = POINTER, INT, INT, INT, INT, INT, POINTER, *matrix, *matrix, POINTER, *matrix, INT, INT
    gemm.restype = INT
    return gemm


def _on_device(gemm: Any, tf32: bool, a: Tensor, b: Tensor) -> Tensor:
    if 0 in (*a.shape, *b.shape) or max(*a.shape, *b.shape, *a.stride(), *b.stride()) > LARGEST:
        return torch.mm(a, b)
    with torch.cuda.device(a.device):  # of which the handle is
        return _gemm_ex(gemm, torch.cuda.current_blas_handle(), a, b, tf32)


def _gemm_ex(gemm: Any, handle: int, a: Tensor, b: Tensor, tf32: bool) -> Tensor:
    """a @ b. Columns come first in cuBLAS, so what it is given is c^T = b^T a^T."""
    c = a.new_empty(a.shape[0], b.shape[1])
    (a, op_a, row_a), (b, op_b, row_b) = _stored(a), _stored(b)
    status = gemm(
        handle, op_b, op_a, c.shape[1], c.shape[0], a.shape[1], ctypes.byref(ONE), b.data_ptr(), CUDA_R_32F, row_b,
        a.data_ptr(), CUDA_R_32F, row_a, ctypes.byref(ZERO), c.data_ptr(), CUDA_R_32F, c.shape[1],
        COMPUTE_32F_FAST_TF32 if tf32 else COMPUTE_32F_PEDANTIC, GEMM_DEFAULT,
    )  # fmt: skip
    if status != 0:
        raise RuntimeError(f"cublasGemmEx: expected status 0 for {list(a.shape)} @ {list(b.shape)}, got {status}")
    return c


def _stored(a: Tensor) -> tuple[Tensor, int, int]:
    """The matrix as cuBLAS can read it, whether it lies transposed, and how far its rows or columns are apart."""
    a = a.resolve_neg()
    for operation, (rows, columns) in ((OP_N, (0, 1)), (OP_T, (1, 0))):
        if a.stride(columns) == 1 and a.stride(rows) >= a.shape[columns]:
            return a, operation, a.stride(rows)
    return a.contiguous(), OP_N, a.shape[1]
