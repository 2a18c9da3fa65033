"""What the tables of cases share: which backend runs what, how inputs are made, and the truth.

The tables are `recurrent_cases` and `pool_cases`.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor

from rnnattn import backends

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
SHORT = {F64: "fp64", F32: "fp32", BF16: "bf16", F16: "fp16"}

# backend -> the dtypes it is checked in. torch's own kernels are checked for our wrapping only.
DTYPES = {
    "reference": (F64, F32, BF16, F16),
    "cpp": (F64, F32, BF16, F16),
    "triton": (F32, BF16, F16),
    "cuda": (F32, BF16, F16),
    "torch": (F64, F32),
}
OWN = ("reference", "cpp", "triton", "cuda")  # with operations of their own

Tensors = dict[str, Any]  # name -> Tensor; "weights" -> list of them, "lengths" -> as the case has it


class Case(Protocol):
    """A row of a table: a shape, and how to run it."""

    @property
    def id(self) -> str: ...

    @property
    def op(self) -> str:
        """The row of `tolerances.TOLERANCES`."""

    def offered(self, backend: str, dtype: torch.dtype) -> bool:
        """Whether the backend has this operation, and the dtype leaves the case an exact answer."""

    def tensors(self, dtype: torch.dtype, seed: int = 0, poisoned: bool = True) -> Tensors:
        """The inputs and cotangents, on the CPU; without `poisoned` NaN stands nowhere."""

    def run(self, t: Tensors, backend: str, backward: bool = True) -> Tensors:
        """Outputs and gradients by name."""


def given_lengths(lengths: tuple[int, ...] | None, form: str) -> Any:
    if lengths is None or form == "list":
        return lengths if lengths is None else list(lengths)
    return torch.tensor(lengths, dtype=getattr(torch, form))


def strided(value: Any) -> Any:
    """The same numbers with a NaN (for integers -1, for masks True) between every two of them."""
    if isinstance(value, list):
        return [strided(v) for v in value]
    if not isinstance(value, Tensor):
        return value
    gap = torch.nan if value.is_floating_point() else True if value.dtype == torch.bool else -1
    return torch.stack([value, torch.full_like(value, gap)], -1)[..., 0]


def transposed(value: Any) -> Any:
    """The same numbers with the last two dimensions in the other order in memory."""
    if isinstance(value, list):
        return [transposed(v) for v in value]
    if not isinstance(value, Tensor) or value.dim() < 2:
        return value
    return value.transpose(-1, -2).contiguous().transpose(-1, -2)


@contextlib.contextmanager
def recurrent_precision(of_fp32: str) -> Iterator[None]:
    """torch's switch for recurrent layers: tf32 or ieee."""
    rnn: Any = torch.backends.cudnn.rnn
    before, rnn.fp32_precision = rnn.fp32_precision, of_fp32
    try:
        yield
    finally:
        rnn.fp32_precision = before


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors: without a GPU, or by wish beside one."""
    return not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"


def device_of(backend: str) -> torch.device:
    """Where its kernels run."""
    on_gpu = torch.cuda.is_available() and (backend == "cuda" or (backend == "triton" and not interpreted()))
    return torch.device("cuda" if on_gpu else "cpu")


def moved(t: Any, to: torch.device | torch.dtype) -> Any:
    """Every floating tensor in dtype `to`, or every tensor on the device `to`, strides kept."""
    if isinstance(t, dict):
        return {name: moved(value, to) for name, value in t.items()}
    if isinstance(t, list):
        return [moved(value, to) for value in t]
    if isinstance(t, Tensor) and (isinstance(to, torch.device) or t.is_floating_point()):
        return t.to(to)
    return t


@functools.cache
def truth(case: Case, dtype: torch.dtype, seed: int = 0) -> Tensors:
    """The reference in float64 on inputs rounded to dtype. What is invalid is zero here, not NaN."""
    return case.run(moved(case.tensors(dtype, seed, poisoned=False), F64), "reference")


def backend_parameters(*names: str) -> list[Any]:
    """Names of backends as parameters; one that cannot run here is skipped, with the reason."""
    return [pytest.param(name, marks=_skipped(name)) for name in names]


def runs(cases: Iterable[Case], names: Iterable[str] = tuple(DTYPES), few: bool = False) -> list[Any]:
    """backend x case x dtype as parameters; one skipped entry for a backend that cannot run here.

    Interpreted kernels are slow: they run the first case in every dtype, the others in fp32 and fp16 (bf16
    is rounded wrongly there, see tolerances.py), or where there are many in these by turns, and long tests
    (few) in fp16 alone.
    """
    cases, parameters = list(cases), []
    for name in names:
        marks = _skipped(name)
        for n, case in enumerate(cases[:1] if marks else cases):
            dtypes = DTYPES[name]
            sampled = name == "triton" and interpreted() and (few or n > 0)
            if sampled:
                dtypes = (F16,) if few else (F32, F16)
            dtypes = tuple(dtype for dtype in dtypes if case.offered(name, dtype))
            if sampled and len(cases) >= 60:
                dtypes = dtypes[n % len(dtypes) :][:1]
            for dtype in dtypes[:1] if marks else dtypes:
                parameters.append(pytest.param(name, case, dtype, id=f"{name}-{case.id}-{SHORT[dtype]}", marks=marks))
    return parameters


def _skipped(name: str) -> list[pytest.MarkDecorator]:
    reason = backends.unavailable(name)
    return [] if reason is None else [pytest.mark.skip(reason=f"backend {name}: {reason}")]
