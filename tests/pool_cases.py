"""The pooling cases that every backend runs. Letters: B batch, T time, D feature size, A attention size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from cases import F64, Tensors, given_lengths, strided
from torch import Tensor

import rnnattn
from rnnattn import functional as RF


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

    def offered(self, backend: str, dtype: torch.dtype) -> bool:
        return True

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
