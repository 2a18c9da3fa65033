"""Any case made ready to run: its experiment, and torch's switches while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks import pooling, recurrent, streaming
from benchmarks.cases import Case, PoolCase, RecurrentCase, StepCase
from benchmarks.measure import Experiment


def experiment(case: Case, device: torch.device) -> Experiment:
    if isinstance(case, StepCase):
        return streaming.experiment(case, device)
    return pooling.experiment(case, device) if isinstance(case, PoolCase) else recurrent.experiment(case, device)


def switches(case: Case) -> contextlib.AbstractContextManager[None]:
    """To be entered around everything that is done with a case."""
    return true_fp32() if isinstance(case, RecurrentCase) and case.true_fp32 else contextlib.nullcontext()


@contextlib.contextmanager
def true_fp32() -> Iterator[None]:
    """cuDNN in fp32 without TF32."""
    rnn: Any = torch.backends.cudnn.rnn
    precision = rnn.fp32_precision
    rnn.fp32_precision = "ieee"
    try:
        yield
    finally:
        rnn.fp32_precision = precision
