"""The cases of every suite, as data. B batch, T time, I input, H hidden, D features, A attention size."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class LSTMCase:
    """One stack of layers against torch.nn.LSTM; a ragged one has lengths from T/10 to T."""

    B: int
    T: int
    I: int
    H: int
    layers: int = 1
    bidirectional: bool = False
    ragged: bool = False
    dtype: str = "fp32"

    op = "lstm"

    @property
    def shape(self) -> str:
        extras = [f"L{self.layers}"] if self.layers > 1 else []
        extras += ["bi"] if self.bidirectional else []
        extras += ["ragged"] if self.ragged else []
        return "-".join([f"B{self.B}-T{self.T}-I{self.I}-H{self.H}", *extras])


@dataclass(frozen=True)
class PoolCase:
    """One attention pooling against eager PyTorch; A is 0 with linear scores.

    compiled: also against torch.compile, whose compilation takes seconds.
    """

    B: int
    T: int
    D: int
    A: int = 0
    ragged: bool = False
    compiled: bool = False
    dtype: str = "fp32"

    op = "attention_pool"

    @property
    def score(self) -> str:
        return "additive" if self.A else "linear"

    @property
    def shape(self) -> str:
        extras = [f"A{self.A}"] if self.A else []
        extras += ["ragged"] if self.ragged else []
        return "-".join([f"{self.score}-B{self.B}-T{self.T}-D{self.D}", *extras])


Case = LSTMCase | PoolCase


def name(case: Case) -> str:
    """What `--filter` matches, such as lstm/B16-T64-I128-H256-fp32."""
    return f"{case.op}/{case.shape}-{case.dtype}"


def ragged_lengths(B: int, T: int, device: torch.device) -> Tensor:
    """Lengths [B] spread evenly over T/10 .. T, in no order."""
    lengths = torch.linspace(max(1, T // 10), T, B).round().long()
    return lengths[torch.randperm(B, generator=torch.Generator().manual_seed(0))].to(device)


def _in_dtypes(cases: list[Case], *dtypes: str) -> list[Case]:
    return [replace(case, dtype=dtype) for case in cases for dtype in dtypes]


_QUICK: list[Case] = [
    PoolCase(32, 512, 512, compiled=True),
    PoolCase(32, 512, 512, A=128, compiled=True),
    PoolCase(32, 512, 512, ragged=True),
    PoolCase(32, 512, 512, A=128, ragged=True),
    PoolCase(8, 64, 128),
    PoolCase(8, 64, 128, A=128),
    PoolCase(1, 2048, 256),
    PoolCase(1, 2048, 256, A=128),
    PoolCase(32, 512, 512, A=128, dtype="bf16"),
    LSTMCase(1, 64, 128, 128),
    LSTMCase(16, 64, 128, 256),
    LSTMCase(32, 128, 256, 512),
    LSTMCase(16, 64, 128, 256, dtype="bf16"),
    LSTMCase(16, 64, 128, 128, layers=2, bidirectional=True),
    LSTMCase(32, 128, 128, 256, ragged=True),
]

_CPU: list[Case] = [
    *_in_dtypes(
        [
            *[PoolCase(32, 512, 512, A, ragged, compiled=not ragged) for A in (0, 128) for ragged in (False, True)],
            *[PoolCase(8, 64, 128, A) for A in (0, 128)],
            *[PoolCase(1, 2048, 256, A) for A in (0, 128)],
            LSTMCase(1, 1, 256, 256),
            LSTMCase(1, 256, 256, 256),
            LSTMCase(1, 256, 512, 512),
            LSTMCase(1, 100, 1024, 1024),
            LSTMCase(4, 256, 256, 256),
            LSTMCase(16, 128, 128, 256),
            LSTMCase(32, 128, 256, 512),
            LSTMCase(64, 100, 512, 512),
            LSTMCase(32, 64, 1024, 1024),
            LSTMCase(128, 50, 300, 650),
            LSTMCase(32, 128, 256, 256, layers=2, bidirectional=True),
            LSTMCase(32, 200, 256, 256, ragged=True),
        ],
        "fp32",
        "bf16",
    )
]

_GPU: list[Case] = [
    # The published point: FlashRNN's chart has cuDNN at 2.01 ms forward and 5.19 ms forward+backward (H100).
    LSTMCase(16, 1024, 768, 768, dtype="fp16"),
    *_in_dtypes(
        [
            PoolCase(32, 512, 512, compiled=True),
            PoolCase(32, 512, 512, A=128, compiled=True),
            PoolCase(32, 512, 512, ragged=True),
            PoolCase(32, 512, 512, A=128, ragged=True),
            *[PoolCase(1, 8192, 512, A) for A in (0, 128)],
            *[PoolCase(64, 1024, 1024, A) for A in (0, 128)],
            *[PoolCase(128, 2048, 256, A) for A in (0, 128)],
            *[LSTMCase(B, 512, H, H) for H in (128, 256, 512, 768, 1024, 1536) for B in (1, 16, 64, 128)],
        ],
        "fp16",
        "bf16",
        "fp32",
    ),
]

SUITES: dict[str, list[Case]] = {"quick": _QUICK, "cpu": _CPU, "gpu": _GPU}
