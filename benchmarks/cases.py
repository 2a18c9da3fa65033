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
    """One stack of layers against torch.nn's; a ragged one has lengths from T/10 to T.

    true_fp32: without TF32, which torch's default lets cuDNN take for fp32.
    """

    B: int
    T: int
    I: int
    H: int
    layers: int = 1
    bidirectional: bool = False
    ragged: bool = False
    dtype: str = "fp32"
    op: str = "lstm"
    true_fp32: bool = False

    modes = MODES

    @property
    def shape(self) -> str:
        extras = [f"L{self.layers}"] if self.layers > 1 else []
        extras += ["bi"] if self.bidirectional else []
        extras += ["ragged"] if self.ragged else []
        extras += ["ieee"] if self.true_fp32 else []
        return "-".join([f"B{self.B}-T{self.T}-I{self.I}-H{self.H}", *extras])

    def flops(self, mode: str) -> float | None:
        """Of the products: 2 G H (I + H) for each step, row, layer and direction, in training three times that."""
        steps = int(ragged_lengths(self.B, self.T).sum()) if self.ragged else self.B * self.T
        K = 2 if self.bidirectional else 1
        inputs = self.I + (self.layers - 1) * K * self.H
        forward = 2 * steps * K * GATES[self.op] * self.H * (inputs + self.layers * self.H)
        return forward * (1.0 if mode == FORWARD else 3.0)

    def traffic(self, mode: str) -> float | None:
        return None  # bound by products or by latency

    def steps(self, mode: str) -> int | None:
        """That follow one another, over which a forward pass takes its time; both directions run side by side."""
        return self.T * self.layers if mode == FORWARD else None

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

    def traffic(self, mode: str) -> float | None:
        return None

    def steps(self, mode: str) -> int | None:
        return None  # a row is one step


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

    def traffic(self, mode: str) -> float | None:
        """Bytes of x that have to be moved: the steps within lengths read once each way, in training dx written."""
        valid = int(ragged_lengths(self.B, self.T).sum()) if self.ragged else self.B * self.T
        rows = valid if mode == FORWARD else 2 * valid + self.B * self.T
        return rows * self.D * DTYPES[self.dtype].itemsize

    def steps(self, mode: str) -> int | None:
        return None


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

# At most 60 cells, each case in two modes, for some six minutes on an H100. cuDNN's branches, by torch's rules:
# PERSIST_STATIC_SMALL_H at H = 128, PERSIST_STATIC in fp16 from H = 256 up, STANDARD for everything else.
_GPU: list[Case] = [
    # The published point: FlashRNN's chart has cuDNN at 2.01 ms forward and 5.19 ms forward+backward (H100).
    RecurrentCase(16, 1024, 768, 768, dtype="fp16"),
    # The region with targets: bf16 and TF32, H from 256 to 1024, B up to 64.
    *[
        RecurrentCase(B, 512, H, H, dtype="bf16")
        for B, H in ((16, 256), (64, 256), (1, 512), (16, 512), (16, 768), (1, 1024), (64, 1024))
    ],
    *[RecurrentCase(B, 512, H, H, dtype="fp32") for B, H in ((1, 256), (16, 512), (64, 512), (16, 768), (16, 1024))],
    RecurrentCase(64, 1024, 512, 512, dtype="bf16"),
    # Around it: small and large H, large B.
    RecurrentCase(64, 512, 128, 128, dtype="bf16"),
    RecurrentCase(1, 512, 128, 128, dtype="fp32"),
    RecurrentCase(128, 512, 512, 512, dtype="fp16"),
    RecurrentCase(128, 512, 768, 768, dtype="bf16"),
    RecurrentCase(16, 512, 1536, 1536, dtype="bf16"),
    RecurrentCase(128, 512, 1536, 1536, dtype="fp32"),
    # Stacks, directions, lengths, cells.
    RecurrentCase(16, 512, 512, 512, layers=2, dtype="bf16"),
    RecurrentCase(16, 512, 512, 512, bidirectional=True, dtype="bf16"),
    RecurrentCase(64, 512, 256, 256, layers=2, bidirectional=True, dtype="fp32"),
    RecurrentCase(64, 512, 512, 512, ragged=True, dtype="bf16"),
    RecurrentCase(64, 1024, 256, 256, ragged=True, dtype="fp32"),
    RecurrentCase(16, 512, 512, 512, dtype="bf16", op="gru"),
    RecurrentCase(64, 512, 256, 256, dtype="fp32", op="rnn"),
    # Pooling of an x far larger than L2, so that the bandwidth of memory is what bounds it.
    PoolCase(128, 2048, 1024, dtype="bf16"),
    PoolCase(128, 2048, 1024, A=128, dtype="bf16"),
    PoolCase(128, 2048, 1024, ragged=True, dtype="bf16"),
]

_GPU_GRID: list[RecurrentCase] = [
    *[
        RecurrentCase(B, T, H, H)
        for T in (512, 128, 1024)
        for H in (64, 128, 256, 512, 650, 768, 1024, 1536, 2048)
        for B in (1, 16, 64, 128, 256)
    ],
    *[
        replace(RecurrentCase(B, 512, H, H), **changes)
        for changes in (
            {"layers": 2},
            {"bidirectional": True},
            {"layers": 2, "bidirectional": True},
            {"ragged": True},
            {"op": "gru"},
            {"op": "rnn"},
        )
        for H in (256, 512, 1024)
        for B in (16, 64)
    ],
]

_GPU_POOLS: list[Case] = [
    *[PoolCase(32, 512, 512, A, ragged, compiled=not ragged) for A in (0, 128) for ragged in (False, True)],
    *[PoolCase(B, T, D, A) for B, T, D in ((1, 8192, 512), (64, 1024, 1024), (128, 2048, 256)) for A in (0, 128)],
]

# The core first, so that a run that is broken off has it.
_GPU_FULL: list[Case] = list(
    dict.fromkeys(
        [
            *_GPU,
            *_in_dtypes([*_GPU_GRID, *_GPU_POOLS], "bf16", "fp32", "fp16"),
            *[replace(case, true_fp32=True) for case in _GPU_GRID],
        ]
    )
)

GPU_SUITES: dict[str, list[Case]] = {"gpu": _GPU, "gpu-full": _GPU_FULL}
SUITES: dict[str, list[Case]] = {"quick": _QUICK, "cpu": _CPU, **GPU_SUITES}
