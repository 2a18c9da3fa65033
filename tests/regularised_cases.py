"""The cases of `rnnattn::regularised_scan` that every backend runs; letters and modes as in `recurrent_cases`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from cases import F32, F64, Tensors, given_lengths, strided, transposed
from torch import Tensor

from rnnattn import autograd
from rnnattn.reference import CELLS, accumulation_dtype

LEAVES = ("a", "h0", "c0", "w_hh", "b_hh", "norm_hh", "norm_c", "bias_c")


@dataclass(frozen=True)
class RegularisedCase:
    B: int
    T: int
    H: int
    reason: str
    mode: str = "LSTM"
    zoneout: str = ""  # drawn, expected, h or c (drawn for that state alone)
    dropout: bool = False  # of the state
    norm: bool = False
    bias: bool = True
    lengths: tuple[int, ...] | None = None
    resets: str = ""  # initial or zeros
    reverse: bool = False
    cotangents: tuple[str, ...] = ("y", "h_n", "c_n", "cells")  # of those that the mode has
    layout: str = "contiguous"  # or strided, transposed

    @property
    def id(self) -> str:
        flags = [
            self.mode != "LSTM" and self.mode.lower(), self.zoneout and "zoneout_" + self.zoneout,
            self.dropout and "dropout", self.norm and "norm", not self.bias and "nobias",
            self.lengths is not None and "len" + "_".join(map(str, self.lengths)),
            self.resets and "resets_" + self.resets, self.reverse and "reverse",
            len(self.cotangents) < 4 and "only_" + "_".join(self.cotangents),
            self.layout != "contiguous" and self.layout,
        ]  # fmt: skip
        return "-".join([f"B{self.B}-T{self.T}-H{self.H}", *(f for f in flags if f)])

    @property
    def op(self) -> str:
        return "normed" if self.norm else "regularised"

    def offered(self, backend: str, dtype: torch.dtype) -> bool:
        # Rounding to 16 bits moves a sum across relu's kink, where the gradient jumps.
        return backend != "torch" and (self.mode != "RNN_RELU" or dtype in (F64, F32))

    def tensors(self, dtype: torch.dtype, seed: int = 0, poisoned: bool = True) -> Tensors:
        draw = torch.Generator().manual_seed(seed)
        B, T, H, acc, lstm = self.B, self.T, self.H, accumulation_dtype(dtype), self.mode == "LSTM"
        GH = CELLS[self.mode].blocks * H

        def normal(*shape: int, to: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=draw, dtype=F64) * scale).to(dtype).to(to)

        def drawn(on: bool, p: float, *shape: int) -> Tensor | None:
            values = torch.rand(shape, generator=draw) < p
            return values if on else None

        def gain(on: bool, n: int, mean: float = 1.0) -> Tensor | None:
            values = normal(n, scale=0.3) + mean
            return values if on else None

        t: Tensors = {
            "a": normal(T, B, GH, to=acc), "h0": normal(B, H, scale=0.5), "c0": normal(B, H) if lstm else None,
            "w_hh": normal(GH, H, scale=H**-0.5), "b_hh": normal(GH, scale=0.3) if self.bias else None,
            "norm_hh": gain(self.norm, GH), "norm_c": gain(self.norm and lstm, H),
            "bias_c": gain(self.norm and lstm and self.bias, H, 0.0),
            "h_mask": None if not self.dropout else (torch.rand(B, H, generator=draw) < 0.7).to(acc) / 0.7,
            "keep_h": drawn(self.zoneout in ("drawn", "h"), 0.3, T, B, H),
            "keep_c": drawn(lstm and self.zoneout in ("drawn", "c"), 0.4, T, B, H),
            "lengths": given_lengths(self.lengths, "int64"), "resets": drawn(bool(self.resets), 0.4, T, B),
            "dy": normal(T, B, H), "dh_n": normal(B, H), "dc_n": normal(B, H), "dcells": normal(T, B, H, to=acc),
        }  # fmt: skip
        if self.lengths is not None and poisoned:
            valid = torch.arange(T)[:, None] < t["lengths"][None, :]
            for name in ("a", "dy", "dcells"):
                t[name] = t[name].masked_fill(~valid[..., None], torch.nan)
        arrange = {"strided": strided, "transposed": transposed}.get(self.layout, lambda value: value)
        return {name: arrange(value) for name, value in t.items()}

    def run(self, t: Tensors, backend: str, backward: bool = True) -> Tensors:
        dtype = t["h0"].dtype
        acc = accumulation_dtype(dtype)
        leaves = {name: t[name].detach() for name in LEAVES if t[name] is not None}
        leaves["a"] = leaves["a"].to(acc)
        for leaf in leaves.values() if backward else ():
            leaf.requires_grad_()
        expected = self.zoneout == "expected"
        outputs = autograd.regularised_scan(
            *(leaves.get(name) for name in LEAVES), None if t["h_mask"] is None else t["h_mask"].to(acc), t["keep_h"],
            t["keep_c"], 0.3 if expected else 0.0, 0.4 if expected else 0.0, t["lengths"], t["resets"],
            self.resets == "initial", self.reverse, self.mode, backend,
        )  # fmt: skip
        results = {n: y for n, y in zip(("y", "h_n", "c_n", "cells"), outputs, strict=True) if y is not None}
        if backward:
            given = [name for name in self.cotangents if name in results]
            cotangents = [t["d" + name].to(results[name].dtype) for name in given]
            gradients = torch.autograd.grad([results[name] for name in given], list(leaves.values()), cotangents)
            results |= {"d" + name: d for name, d in zip(leaves, gradients, strict=True)}
        return {name: value.detach().to(dtype) for name, value in results.items()}


# The norm of a few numbers loses digits, so no H is very small.
_EVERY = [
    RegularisedCase(3, 6, 16, "nothing on: the plain scan"),
    RegularisedCase(3, 6, 16, "layer norm", norm=True),
    RegularisedCase(3, 6, 16, "zoneout, drawn", zoneout="drawn"),
    RegularisedCase(3, 6, 16, "zoneout, its mean", zoneout="expected"),
    RegularisedCase(2, 4, 9, "zoneout of h alone", zoneout="h"),
    RegularisedCase(3, 6, 16, "locked dropout of the state", dropout=True),
    RegularisedCase(3, 7, 21, "all at once", norm=True, zoneout="drawn", dropout=True),
    RegularisedCase(1, 9, 70, "all at once, B=1 and more columns than a block", norm=True, zoneout="drawn",
                    dropout=True),
    RegularisedCase(19, 3, 13, "more rows than a tile", norm=True, zoneout="drawn", dropout=True),
    RegularisedCase(2, 3, 300, "H wider than a block of a GPU kernel", norm=True, zoneout="drawn", dropout=True),
    RegularisedCase(2, 1, 15, "T=1", norm=True, zoneout="drawn", dropout=True),
    RegularisedCase(3, 4, 16, "no bias", norm=True, bias=False),
    RegularisedCase(4, 5, 15, "ragged, with an empty row, NaN behind the lengths", norm=True, zoneout="drawn",
                    dropout=True, lengths=(3, 0, 5, 1)),
    RegularisedCase(4, 5, 15, "ragged and reverse", norm=True, zoneout="drawn", dropout=True, lengths=(3, 0, 5, 1),
                    reverse=True),
    RegularisedCase(3, 5, 15, "reverse", norm=True, zoneout="expected", reverse=True),
    RegularisedCase(4, 6, 15, "episodes", norm=True, zoneout="drawn", dropout=True, resets="zeros"),
    RegularisedCase(4, 6, 15, "episodes from the initial states, reverse and ragged", norm=True, zoneout="drawn",
                    dropout=True, resets="initial", lengths=(6, 3, 0, 5), reverse=True),
    RegularisedCase(4, 6, 15, "episodes from the initial states", norm=True, zoneout="expected", resets="initial"),
    RegularisedCase(3, 4, 12, "only h_n has a cotangent", norm=True, zoneout="drawn", cotangents=("h_n",)),
    RegularisedCase(3, 4, 12, "only y has a cotangent", norm=True, zoneout="drawn", cotangents=("y",)),
    RegularisedCase(3, 4, 16, "every tensor has gaps between elements, NaN in them", norm=True, zoneout="drawn",
                    dropout=True, lengths=(4, 1, 2), resets="initial", layout="strided"),
    RegularisedCase(3, 4, 16, "the last dimension is not the innermost in memory", norm=True, zoneout="drawn",
                    dropout=True, layout="transposed"),
    RegularisedCase(0, 3, 5, "B=0", norm=True, zoneout="drawn", dropout=True),
]  # fmt: skip


def _of_rnn(case: RegularisedCase) -> bool:
    """What says something of the cell rather than of all cells."""
    starts = (
        "nothing",
        "all at once",
        "T=1",
        "ragged and",
        "episodes from the initial states,",
        "only y",
        "every",
        "B=0",
    )
    return case.reason.startswith(starts)


REGULARISED_CASES = [
    *_EVERY,
    *(replace(case, mode="GRU") for case in _EVERY),
    *(replace(case, mode=mode) for mode in ("RNN_TANH", "RNN_RELU") for case in _EVERY if _of_rnn(case)),
    RegularisedCase(2, 4, 9, "zoneout of c alone", zoneout="c"),
    RegularisedCase(3, 5, 16, "only c_n has a cotangent", norm=True, zoneout="drawn", cotangents=("c_n",)),
    RegularisedCase(3, 5, 16, "only the cell states have a cotangent", norm=True, zoneout="drawn", dropout=True,
                    resets="zeros", lengths=(5, 0, 3), cotangents=("cells",)),
]  # fmt: skip
