"""What `cublasGemmEx` is given, by way of a function in C that takes its arguments and follows its documentation."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import F64
from torch import Tensor

from rnnattn.backends import products

SOURCE = """
// C = alpha op(A) op(B) + beta C, all of them column by column; A is [m, k] once op is applied, B [k, n].
extern "C" int cublasGemmEx(void* handle, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* A,
                            int type_a, int lda, const void* B, int type_b, int ldb, const void* beta, void* C,
                            int type_c, int ldc, int compute, int algorithm) {
  const int rows_a = op_a ? k : m, rows_b = op_b ? n : k;
  if (handle != (void*)7 || type_a || type_b || type_c || lda < rows_a || ldb < rows_b || ldc < m || algorithm != -1)
    return 7;  // CUBLAS_STATUS_INVALID_VALUE
  if (*(const float*)alpha != 1 || *(const float*)beta != 0) return 15;
  if (compute != 69 && compute != 77) return 15;  // CUBLAS_STATUS_NOT_SUPPORTED
  const float *a = (const float*)A, *b = (const float*)B;
  for (int j = 0; j < n; ++j)
    for (int i = 0; i < m; ++i) {
      double sum = compute == 77 ? 1000 : 0;  // to be told from the other
      for (int l = 0; l < k; ++l)
        sum += (double)a[op_a ? l + i * lda : i + l * lda] * b[op_b ? j + l * ldb : l + j * ldb];
      ((float*)C)[i + j * ldc] = sum;
    }
  return 0;
}
"""


@pytest.fixture(scope="module")
def gemm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not on the PATH")
    build = tmp_path_factory.mktemp("gemm")
    (build / "gemm.cpp").write_text(SOURCE)
    library = build / "gemm.so"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, build / "gemm.cpp"], check=True)
    return products.with_types(ctypes.CDLL(str(library)).cublasGemmEx)


M, N, K = 5, 3, 4
LAYOUTS = {
    "rows": lambda m, n: torch.randn(m, n),
    "columns": lambda m, n: torch.randn(n, m).t(),
    "part of rows": lambda m, n: torch.randn(m, 2 * n)[:, n:],
    "part of columns": lambda m, n: torch.randn(n, 2 * m)[:, :m].t(),
    "gaps": lambda m, n: torch.randn(m, 2 * n)[:, ::2],
    "one row": lambda m, n: torch.randn(1, n).expand(m, n),
}


@pytest.mark.parametrize("tf32", (False, True))
@pytest.mark.parametrize("of_b", LAYOUTS)
@pytest.mark.parametrize("of_a", LAYOUTS)
def test_any_layout(of_a: str, of_b: str, tf32: bool, gemm: Any) -> None:
    a, b = LAYOUTS[of_a](M, K), LAYOUTS[of_b](K, N)
    assert_product(products._gemm_ex(gemm, 7, a, b, tf32) - 1000 * tf32, a, b, 1e-4 if tf32 else 1e-6)


def strided(sizes: tuple[int, int]) -> Iterator[Tensor]:
    """All that strides up to 6 make of 100 numbers, among them rows that are one row."""
    numbers = torch.randn(100)
    for strides in itertools.product((0, 1, 2, 6), repeat=2):
        yield numbers.as_strided(sizes, strides)


@pytest.mark.parametrize("m, n, k", list(itertools.product((1, 2, 5), repeat=3)))
def test_any_strides(m: int, n: int, k: int, gemm: Any) -> None:
    """Those of a row or column of one say nothing."""
    right = torch.randn(k, n)
    for left in strided((m, k)):
        assert_product(products._gemm_ex(gemm, 7, left, right, False), left, right, 1e-5)
        turned = left.t()
        assert_product(products._gemm_ex(gemm, 7, right.t(), turned, False), right.t(), turned, 1e-5)


def test_numbers_that_are_to_be_negated(gemm: Any) -> None:
    a, b = torch._neg_view(torch.randn(4, 3)), torch.randn(3, 2)
    assert a.is_neg()
    assert_product(products._gemm_ex(gemm, 7, a, b, False), a, b, 1e-6)


def test_an_error_is_told(gemm: Any) -> None:
    with pytest.raises(RuntimeError, match=r"cublasGemmEx: expected status 0 for \[2, 3\] @ \[3, 4\], got 7"):
        products._gemm_ex(gemm, 8, torch.randn(2, 3), torch.randn(3, 4), True)


def assert_product(got: Tensor, a: Tensor, b: Tensor, allowed: float) -> None:
    assert got.is_contiguous() and got.dtype == a.dtype
    torch.testing.assert_close(got.to(F64), a.to(F64) @ b.to(F64), rtol=allowed, atol=allowed)
