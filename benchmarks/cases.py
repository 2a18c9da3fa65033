"""The cases of every suite, as data. B batch, T time, I input, H hidden, D features, A attention size."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORWARD, BACKWARD = MODES = ("forward", "forward+backward")  # inference, and a training step
GATES = {"lstm": 4, "gru": 3, "rnn": 1}


@dataclass(frozen=True)
class RecurrentCase:
    """One stack of layers against torch.nn's; a ragged one has lengths from T/10 to T."""

    B: int
    T: int
    I: int
    H: int
    layers: int = 1
    bidirectional: bool = False
    ragged: bool = False
    dtype: str = "fp32"
    op: str = "lstm"

    modes = MODES

    @property
    def shape(self) -> str:
        extras = [f"L{self.layers}"] if self.layers > 1 else []
        extras += ["bi"] if self.bidirectional else []
        extras += ["ragged"] if self.ragged else []
        return "-".join([f"B{self.B}-T{self.T}-I{self.I}-H{self.H}", *extras])

    def flops(self, mode: str) -> float | None:
        """Of the products: 2 G H (I + H) for each step, row, layer and direction, in training three times that."""
        steps = int(ragged_lengths(self.B, self.T).sum()) if self.ragged else self.B * self.T
        K = 2 if self.bidirectional else 1
        inputs = self.I + (self.layers - 1) * K * self.H
        forward = 2 * steps * K * GATES[self.op] * self.H * (inputs + self.layers * self.H)
        return forward * (1.0 if mode == FORWARD else 3.0)

    @property
    def intensity(self) -> float | None:
        """Flop per byte of a forward step of the first layer that reads its weights, x and h, and writes h."""
        weights = GATES[self.op] * self.H * (self.I + self.H)
        states = self.B * (self.I + 2 * self.H)
        return 2 * self.B * weights / ((weights + states) * DTYPES[self.dtype].itemsize)


@dataclass(frozen=True)
class StepCase:
    """One step of streaming inference, B = T = 1, whole Python calls with a state carried on.

    variant: LSTM, LSTMCell, or LSTM-prepared, what `rnnattn.LSTM.prepare_inference()` returns.
    """

    variant: str
    H: int = 256
    dtype: str = "fp32"

    op = "step"
    modes = (FORWARD,)
    intensity = None

    @property
    def shape(self) -> str:
        return f"{self.variant}-B1-T1-I{self.H}-H{self.H}"

    def flops(self, mode: str) -> float | None:
        return RecurrentCase(1, 1, self.H, self.H).flops(mode)


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
    modes = MODES
    intensity = None

    @property
    def score(self) -> str:
        return "additive" if self.A else "linear"

    @property
    def shape(self) -> str:
        extras = [f"A{self.A}"] if self.A else []
        extras += ["ragged"] if self.ragged else []
        return "-".join([f"{self.score}-B{self.B}-T{self.T}-D{self.D}", *extras])

    def flops(self, mode: str) -> float | None:
        return None  # bound by memory: a rate of operations says nothing


Case = RecurrentCase | StepCase | PoolCase


def name(case: Case) -> str:
    """What `--filter` matches, such as lstm/B16-T64-I128-H256-fp32."""
    return f"{case.op}/{case.shape}-{case.dtype}"


def ragged_lengths(B: int, T: int, device: torch.device | None = None) -> Tensor:
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
    RecurrentCase(1, 64, 128, 128),
    RecurrentCase(16, 64, 128, 256),
    RecurrentCase(32, 128, 256, 512),
    RecurrentCase(16, 64, 128, 256, dtype="bf16"),
    RecurrentCase(16, 64, 128, 128, layers=2, bidirectional=True),
    RecurrentCase(32, 128, 128, 256, ragged=True),
    RecurrentCase(16, 64, 128, 256, op="gru"),
]

_CPU_SHAPES: list[RecurrentCase] = [
    RecurrentCase(1, 1, 256, 256),
    RecurrentCase(1, 256, 256, 256),
    RecurrentCase(1, 256, 512, 512),
    RecurrentCase(1, 100, 1024, 1024),
    RecurrentCase(4, 256, 256, 256),
    RecurrentCase(16, 128, 128, 256),
    RecurrentCase(32, 128, 256, 512),
    RecurrentCase(64, 100, 512, 512),
    RecurrentCase(32, 64, 1024, 1024),
    RecurrentCase(128, 50, 300, 650),
    RecurrentCase(32, 128, 256, 256, layers=2, bidirectional=True),
    RecurrentCase(32, 200, 256, 256, ragged=True),
]

_CPU: list[Case] = [
    *_in_dtypes([StepCase(variant) for variant in ("LSTM", "LSTMCell", "LSTM-prepared")], "fp32", "bf16"),
    *[replace(case, op=op, dtype=dtype) for op in GATES for dtype in ("fp32", "bf16") for case in _CPU_SHAPES],
    *_in_dtypes(
        [
            *[PoolCase(32, 512, 512, A, ragged, compiled=not ragged) for A in (0, 128) for ragged in (False, True)],
            *[PoolCase(8, 64, 128, A) for A in (0, 128)],
            *[PoolCase(1, 2048, 256, A) for A in (0, 128)],
        ],
        "fp32",
        "bf16",
    ),
]

_GPU: list[Case] = [
    # The published point: FlashRNN's chart has cuDNN at 2.01 ms forward and 5.19 ms forward+backward (H100).
    RecurrentCase(16, 1024, 768, 768, dtype="fp16"),
    *_in_dtypes(
        [
            PoolCase(32, 512, 512, compiled=True),
            PoolCase(32, 512, 512, A=128, compiled=True),
            PoolCase(32, 512, 512, ragged=True),
            PoolCase(32, 512, 512, A=128, ragged=True),
            *[PoolCase(1, 8192, 512, A) for A in (0, 128)],
            *[PoolCase(64, 1024, 1024, A) for A in (0, 128)],
            *[PoolCase(128, 2048, 256, A) for A in (0, 128)],
            *[RecurrentCase(B, 512, H, H) for H in (128, 256, 512, 768, 1024, 1536) for B in (1, 16, 64, 128)],
        ],
        "fp16",
        "bf16",
        "fp32",
    ),
]

SUITES: dict[str, list[Case]] = {"quick": _QUICK, "cpu": _CPU, "gpu": _GPU}
