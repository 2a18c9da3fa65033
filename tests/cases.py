"""The cases that every backend runs: tables of data, the inputs they stand for, and one way to run them.

Letters as in `rnnattn.functional`: B batch, T time, I input size, H hidden size, R output size
(the projection size), D feature size, A attention size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import rnnattn
from rnnattn import autograd, backends
from rnnattn import functional as RF

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


@dataclass(frozen=True)
class LSTMCase:
    B: int
    T: int
    I: int
    H: int
    reason: str
    R: int = 0  # 0: no projection
    layers: int = 1
    direction: str = "forward"
    bias: bool = True
    lengths: tuple[int, ...] | None = None
    lengths_as: str = "int64"  # or int32, list
    states: bool = False  # h0 and c0 given, with gradients
    cotangents: tuple[str, ...] = ("y", "h_n", "c_n")
    layout: str = "contiguous"  # or strided, expanded, batch_first
    nan: bool = False  # NaN in x and dy at invalid steps
    scale: float = 1.0  # of x

    @property
    def id(self) -> str:
        flags = [
            self.R and f"R{self.R}", self.layers > 1 and f"L{self.layers}",
            self.direction != "forward" and self.direction, not self.bias and "nobias",
            self.lengths is not None and "len" + "_".join(map(str, self.lengths)),
            self.lengths_as != "int64" and self.lengths_as, self.states and "states",
            len(self.cotangents) < 3 and "only_" + "_".join(self.cotangents),
            self.layout != "contiguous" and self.layout, self.nan and "nan", self.scale != 1 and f"x{self.scale:g}",
        ]  # fmt: skip
        return "-".join([f"B{self.B}-T{self.T}-I{self.I}-H{self.H}", *(f for f in flags if f)])

    @property
    def op(self) -> str:
        """The row of `tolerances.TOLERANCES`."""
        return "lstm" if self.scale == 1 else "lstm_large"

    @property
    def directions(self) -> int:
        return 2 if self.direction == "bidirectional" else 1

    def weight_shapes(self) -> list[tuple[int, ...]]:
        R, K, shapes = self.R or self.H, self.directions, []
        for layer in range(self.layers):
            for _ in range(K):
                shapes += [(4 * self.H, self.I if layer == 0 else K * R), (4 * self.H, R)]
                shapes += [(4 * self.H,), (4 * self.H,)] if self.bias else []
                shapes += [(R, self.H)] if self.R else []
        return shapes

    def valid(self) -> Tensor:
        """bool [T, B]."""
        lengths = torch.tensor(self.lengths if self.lengths is not None else [self.T] * self.B, dtype=torch.int64)
        return torch.arange(self.T)[:, None] < lengths[None, :]

    def tensors(self, dtype: torch.dtype, seed: int = 0, poisoned: bool = True) -> Tensors:
        """The inputs and cotangents, on the CPU; without `poisoned` NaN stands nowhere."""
        draw = torch.Generator().manual_seed(seed)
        B, T, K, R, LK = self.B, self.T, self.directions, self.R or self.H, self.layers * self.directions

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=draw, dtype=F64) * scale).to(dtype)

        bound = self.H**-0.5
        t: Tensors = {
            "x": normal(T, B, self.I, scale=self.scale),
            "h0": normal(LK, B, R, scale=0.5) if self.states else torch.zeros(LK, B, R, dtype=dtype),
            "c0": normal(LK, B, self.H) if self.states else torch.zeros(LK, B, self.H, dtype=dtype),
            "weights": [
                ((torch.rand(s, generator=draw, dtype=F64) * 2 - 1) * bound).to(dtype) for s in self.weight_shapes()
            ],
            "lengths": given_lengths(self.lengths, self.lengths_as),
            "dy": normal(T, B, K * R),
            "dh_n": normal(LK, B, R),
            "dc_n": normal(LK, B, self.H),
        }
        if self.layout == "expanded":
            t["x"], t["dy"] = t["x"][:1].expand(T, -1, -1), t["dy"][:1, :1, :1].expand(T, B, K * R)
        if self.nan and poisoned:
            for name in ("x", "dy"):
                t[name] = t[name].masked_fill(~self.valid()[..., None], torch.nan)
        if self.layout == "strided":
            t = {name: strided(value) for name, value in t.items()}
        if self.layout == "batch_first":
            for name in ("x", "dy"):
                t[name] = t[name].transpose(0, 1).contiguous()
        return t

    def run(self, t: Tensors, backend: str, backward: bool = True) -> Tensors:
        """Outputs and gradients by name, time first whatever the layout."""
        x, h0, c0 = (t[name].detach() for name in ("x", "h0", "c0"))
        weights = [w.detach() for w in t["weights"]]
        leaves = {"dx": x} | ({"dh0": h0, "dc0": c0} if self.states else {})
        leaves |= {f"dweights[{n}]": w for n, w in enumerate(weights)}
        for leaf in leaves.values() if backward else ():
            leaf.requires_grad_()
        if self.direction == "reverse":  # the functional has no lone reverse layer
            y, h_n, c_n = autograd.lstm_layer(x, h0, c0, weights, t["lengths"], self.bias, "reverse", backend)
        else:
            with rnnattn.use_backend(backend):
                y, h_n, c_n = RF.lstm(
                    x, (h0, c0), weights, self.bias, self.layers, bidirectional=self.directions == 2,
                    batch_first=self.layout == "batch_first", lengths=t["lengths"],
                )  # fmt: skip
        results = {"y": y, "h_n": h_n, "c_n": c_n}
        if backward:
            outputs = [results[name] for name in self.cotangents]
            cotangents = [t["d" + name] for name in self.cotangents]
            results |= dict(zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), cotangents), strict=True))
        if self.layout == "batch_first":
            results |= {name: results[name].transpose(0, 1) for name in ("y", "dx") if name in results}
        return {name: value.detach() for name, value in results.items()}


@dataclass(frozen=True)
class PoolCase:
    B: int
    T: int
    D: int
    A: int  # 0: linear scores
    reason: str
    bias: bool = True
    lengths: tuple[int, ...] | None = None
    lengths_as: str = "int64"
    mask: str | None = None  # or holes, empty_rows, none_kept
    cotangents: tuple[str, ...] = ("pooled", "p")
    layout: str = "contiguous"  # or strided, expanded, transposed
    nan: bool = False  # NaN in x and the cotangents where nothing is kept
    scale: float = 1.0  # of x
    offset: float = 0.0  # added to every score: cancels in the softmax, overflows in exp

    @property
    def id(self) -> str:
        flags = [
            not self.bias and "nobias", self.lengths is not None and "len" + "_".join(map(str, self.lengths)),
            self.lengths_as != "int64" and self.lengths_as, self.mask,
            len(self.cotangents) < 2 and "only_" + self.cotangents[0],
            self.layout != "contiguous" and self.layout, self.nan and "nan", self.scale != 1 and f"x{self.scale:g}",
            self.offset and f"plus{self.offset:g}",
        ]  # fmt: skip
        kind = f"A{self.A}" if self.A else "linear"
        return "-".join([f"B{self.B}-T{self.T}-D{self.D}-{kind}", *(f for f in flags if f)])

    @property
    def op(self) -> str:
        """The row of `tolerances.TOLERANCES`."""
        return "attention_pool" if self.scale == 1 and not self.offset else "attention_pool_large"

    def kept(self) -> Tensor:
        """bool [B, T]."""
        if self.mask is not None:
            keep = torch.rand(self.B, self.T, generator=torch.Generator().manual_seed(1)) < 0.6
            if self.mask == "empty_rows":
                keep[::2] = False
            return keep if self.mask != "none_kept" else torch.zeros_like(keep)
        lengths = torch.tensor(self.lengths if self.lengths is not None else [self.T] * self.B, dtype=torch.int64)
        return torch.arange(self.T)[None, :] < lengths[:, None]

    def tensors(self, dtype: torch.dtype, seed: int = 0, poisoned: bool = True) -> Tensors:
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=draw, dtype=F64) * scale).to(dtype)

        t: Tensors = {
            "x": normal(self.B, self.T, self.D, scale=self.scale),
            "v": normal(self.A or self.D, scale=(self.A or self.D) ** -0.5),
            "w": normal(self.A, self.D, scale=self.D**-0.5) if self.A else None,
            "b": normal(self.A) if self.A and self.bias else None,
            "lengths": given_lengths(self.lengths, self.lengths_as),
            "mask": self.kept() if self.mask is not None else None,
            "dpooled": normal(self.B, self.D),
            "dp": normal(self.B, self.T),
        }
        if self.offset:
            t["v"][0] = self.offset
            t["x" if not self.A else "b"][..., 0] = 1.0 if not self.A else 40.0  # tanh(40) = 1
        if self.layout == "expanded":
            t["x"], t["dpooled"] = t["x"][:1].expand(self.B, -1, -1), t["dpooled"][:1, :1].expand(self.B, self.D)
        if self.nan and poisoned:
            keep = self.kept()
            t["x"], t["dp"] = t["x"].masked_fill(~keep[..., None], torch.nan), t["dp"].masked_fill(~keep, torch.nan)
            t["dpooled"] = t["dpooled"].masked_fill(~keep.any(1, keepdim=True), torch.nan)
        if self.layout == "strided":
            t = {name: strided(value) for name, value in t.items()}
        if self.layout == "transposed":
            t["x"] = t["x"].transpose(0, 1).contiguous().transpose(0, 1)
        return t

    def run(self, t: Tensors, backend: str, backward: bool = True) -> Tensors:
        """Outputs and gradients by name."""
        leaves = {name: t[name].detach() for name in ("x", "v", "w", "b") if t[name] is not None}
        for leaf in leaves.values() if backward else ():
            leaf.requires_grad_()
        with rnnattn.use_backend(backend):
            pooled, p = RF.attention_pool(
                leaves["x"], leaves["v"], leaves.get("w"), leaves.get("b"),
                lengths=t["lengths"], mask=t["mask"], need_weights="p" in self.cotangents,
            )  # fmt: skip
        assert (p is not None) == ("p" in self.cotangents)
        results = {"pooled": pooled} | ({} if p is None else {"p": p})
        if backward:
            outputs = [results[name] for name in self.cotangents]
            cotangents = [t["d" + name] for name in self.cotangents]
            gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
            results |= {"d" + name: gradient for name, gradient in zip(leaves, gradients, strict=True)}
        return {name: value.detach() for name, value in results.items()}


Case = LSTMCase | PoolCase

LSTM_CASES = [
    LSTMCase(3, 6, 8, 16, "the plain case, sizes multiples of 8"),
    LSTMCase(1, 37, 5, 96, "more steps and a wider state"),
    LSTMCase(1, 2, 3, 300, "H wider than a block of a GPU kernel", states=True),
    LSTMCase(2, 1, 5, 7, "T=1: first and last step are one", states=True),
    LSTMCase(1, 4, 3, 5, "B=1"),
    LSTMCase(2, 4, 1, 1, "I=1 and H=1: every tile is a tail"),
    LSTMCase(2, 5, 9, 33, "H one above a tile", states=True),
    LSTMCase(17, 2, 4, 6, "B one above a tile"),
    LSTMCase(0, 3, 4, 5, "B=0: nothing to do, weight gradients are zero"),
    LSTMCase(0, 3, 4, 5, "B=0 with lengths", lengths=()),
    LSTMCase(4, 5, 6, 7, "ragged, with an empty row that keeps its state", lengths=(3, 0, 5, 1), states=True),
    LSTMCase(3, 4, 5, 6, "all rows empty: only the states pass gradients", lengths=(0, 0, 0), states=True),
    LSTMCase(3, 6, 5, 6, "no row reaches T: the last steps are invalid everywhere", lengths=(2, 4, 3), states=True),
    LSTMCase(3, 5, 4, 6, "reverse", direction="reverse", states=True),
    LSTMCase(4, 5, 4, 6, "reverse and ragged: a row starts at its own last step", direction="reverse",
             lengths=(5, 2, 0, 4), states=True),
    LSTMCase(3, 4, 5, 6, "bidirectional", direction="bidirectional", states=True),
    LSTMCase(3, 5, 5, 6, "bidirectional and ragged", direction="bidirectional", lengths=(5, 1, 3), states=True),
    LSTMCase(2, 4, 5, 8, "projection", R=3, states=True),
    LSTMCase(3, 4, 5, 8, "projection, ragged, both directions, no bias", R=3, direction="bidirectional", bias=False,
             lengths=(4, 0, 2), states=True),
    LSTMCase(3, 4, 5, 6, "no bias", bias=False),
    LSTMCase(2, 4, 5, 6, "two layers", layers=2, states=True),
    LSTMCase(3, 4, 5, 6, "a ragged stack: padding between layers", layers=2, direction="bidirectional",
             lengths=(2, 4, 0), states=True),
    LSTMCase(3, 4, 5, 6, "only h_n has a cotangent: dy is None", cotangents=("h_n",), states=True),
    LSTMCase(3, 4, 5, 6, "only c_n has a cotangent", cotangents=("c_n",), lengths=(4, 2, 1)),
    LSTMCase(3, 4, 5, 6, "only y has a cotangent: dh_n and dc_n are None", cotangents=("y",),
             direction="bidirectional"),
    LSTMCase(3, 4, 5, 8, "every tensor has gaps between elements, NaN in them", R=3, layout="strided", states=True,
             lengths=(4, 1, 2)),
    LSTMCase(3, 4, 5, 6, "x and dy are expanded, stride 0, as y.sum().backward() makes them", layout="expanded"),
    LSTMCase(3, 4, 5, 6, "batch first", layout="batch_first", states=True, lengths=(4, 2, 3)),
    LSTMCase(4, 5, 6, 7, "NaN behind the lengths", nan=True, lengths=(3, 0, 5, 1), states=True),
    LSTMCase(3, 5, 6, 7, "NaN behind the lengths, projection, both directions", R=4, nan=True, lengths=(3, 0, 4),
             direction="bidirectional"),
    LSTMCase(2, 5, 6, 7, "NaN behind the lengths of a stack", layers=2, nan=True, lengths=(3, 4)),
    LSTMCase(3, 6, 8, 9, "saturated gates: no inf / inf in tanh", scale=100.0, states=True),
    LSTMCase(3, 4, 5, 6, "int32 lengths", lengths=(4, 0, 2), lengths_as="int32"),
    LSTMCase(3, 4, 5, 6, "lengths as a list", lengths=(1, 4, 2), lengths_as="list"),
]  # fmt: skip

POOL_CASES = [
    PoolCase(3, 5, 8, 0, "the plain case, linear"),
    PoolCase(3, 5, 8, 16, "the plain case, additive"),
    PoolCase(2, 70, 33, 0, "T and D one above tiles"),
    PoolCase(2, 70, 33, 17, "T, D and A one above tiles"),
    PoolCase(3, 6, 1, 0, "D=1"),
    PoolCase(3, 6, 1, 1, "D=1 and A=1"),
    PoolCase(2, 1, 5, 3, "T=1: the weight is 1"),
    PoolCase(1, 4, 7, 0, "B=1"),
    PoolCase(2, 0, 5, 0, "T=0: nothing is kept"),
    PoolCase(2, 0, 5, 3, "T=0, additive"),
    PoolCase(0, 4, 5, 0, "B=0"),
    PoolCase(0, 4, 5, 3, "B=0, additive: parameter gradients are zero", lengths=()),
    PoolCase(3, 5, 6, 4, "no bias", bias=False),
    PoolCase(4, 6, 5, 0, "ragged with an empty row", lengths=(6, 0, 1, 4)),
    PoolCase(4, 6, 5, 3, "ragged with an empty row, additive", lengths=(6, 0, 1, 4)),
    PoolCase(2, 4, 5, 3, "all rows empty", lengths=(0, 0)),
    PoolCase(3, 7, 5, 0, "a mask with holes", mask="holes"),
    PoolCase(3, 7, 5, 4, "a mask with holes, additive", mask="holes"),
    PoolCase(3, 7, 5, 4, "a mask with rows that keep nothing", mask="empty_rows"),
    PoolCase(3, 7, 5, 0, "a mask that keeps nothing", mask="none_kept"),
    PoolCase(3, 7, 5, 0, "NaN where the mask drops", mask="empty_rows", nan=True),
    PoolCase(3, 7, 5, 4, "NaN where the mask drops, additive", mask="holes", nan=True),
    PoolCase(3, 5, 6, 4, "NaN behind the lengths", lengths=(2, 0, 4), nan=True),
    PoolCase(3, 5, 6, 4, "every tensor has gaps between elements, NaN in them", layout="strided", mask="holes"),
    PoolCase(3, 5, 6, 0, "x and its cotangent are expanded, stride 0", layout="expanded"),
    PoolCase(3, 5, 6, 4, "x is a time-first tensor seen batch first", layout="transposed"),
    PoolCase(3, 5, 6, 0, "only pooled is wanted", cotangents=("pooled",)),
    PoolCase(3, 5, 6, 4, "only the weights have a cotangent", cotangents=("p",), lengths=(5, 3, 0)),
    PoolCase(3, 5, 6, 0, "scores around 100: exp overflows unless their maximum is taken out", offset=100.0),
    PoolCase(3, 5, 6, 4, "scores around 100, additive", offset=100.0, lengths=(5, 2, 4)),
    PoolCase(3, 5, 6, 4, "int32 lengths", lengths=(5, 0, 2), lengths_as="int32"),
    PoolCase(3, 5, 6, 0, "lengths as a list", lengths=(1, 5, 2), lengths_as="list"),
]

# Their gradients are differences of nearly equal numbers; only the forward has correct digits.
SATURATED_POOL_CASES = [
    PoolCase(2, 9, 6, 0, "scores of several hundred: the softmax picks one step", scale=100.0),
    PoolCase(2, 9, 6, 4, "saturated tanh", scale=100.0),
]


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


def device_of(backend: str) -> torch.device:
    on_gpu = torch.cuda.is_available() and backend in ("triton", "cuda")
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
    is rounded wrongly there, see tolerances.py), and long tests (few) in fp16 alone.
    """
    interpreted = not torch.cuda.is_available()
    cases, parameters = list(cases), []
    for name in names:
        marks = _skipped(name)
        for case in cases[:1] if marks else cases:
            dtypes = DTYPES[name]
            if name == "triton" and interpreted and (few or case is not cases[0]):
                dtypes = (F16,) if few else (F32, F16)
            if name == "torch" and isinstance(case, LSTMCase) and (case.B == 0 or case.direction == "reverse"):
                continue  # torch offers neither
            for dtype in dtypes[:1] if marks else dtypes:
                parameters.append(pytest.param(name, case, dtype, id=f"{name}-{case.id}-{SHORT[dtype]}", marks=marks))
    return parameters


def _skipped(name: str) -> list[pytest.MarkDecorator]:
    reason = backends.unavailable(name)
    return [] if reason is None else [pytest.mark.skip(reason=f"backend {name}: {reason}")]
