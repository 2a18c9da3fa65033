"""The recurrent cases that every backend runs, whatever the cell.

Letters as in `rnnattn.functional`: B batch, T time, I input size, H hidden size, R output size (the
projection size). Modes as in `rnnattn.reference.CELLS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from cases import F32, F64, OWN, Tensors, backend_parameters, given_lengths, strided, transposed
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import rnnattn
from rnnattn import autograd
from rnnattn import functional as RF
from rnnattn.packing import Packing
from rnnattn.stack import run_stack


@dataclass(frozen=True)
class RecurrentCase:
    B: int
    T: int
    I: int
    H: int
    reason: str
    mode: str = "LSTM"
    R: int = 0  # 0: no projection
    layers: int = 1
    direction: str = "forward"
    bias: bool = True
    lengths: tuple[int, ...] | None = None
    lengths_as: str = "int64"  # or int32, list
    resets: str = ""  # where episodes begin: some, every, none or first
    to_initial: bool = False  # resets are to the initial states
    states: bool = False  # h0 (and c0) given, with gradients
    cells: bool = False  # c_t of every step is wanted; LSTM
    cotangents: tuple[str, ...] = ("y", "h_n", "c_n", "cells")  # of those that there are
    layout: str = "contiguous"  # or strided, transposed, expanded, batch_first, packed (lengths fall, T is the first)
    nan: bool = False  # NaN in x and dy at invalid steps
    scale: float = 1.0  # of x
    recompute: str = ""  # or chunk
    apart: bool = False  # every unit's sum stays far from 0, where relu has its kink

    @property
    def id(self) -> str:
        flags = [
            self.mode != "LSTM" and self.mode.lower(), self.R and f"R{self.R}", self.layers > 1 and f"L{self.layers}",
            self.direction != "forward" and self.direction, not self.bias and "nobias",
            self.lengths is not None and "len" + "_".join(map(str, self.lengths)),
            self.lengths_as != "int64" and self.lengths_as, self.resets and f"resets_{self.resets}",
            self.to_initial and "to_initial", self.states and "states", self.cells and "cells",
            len(self.cotangents) < 4 and "only_" + "_".join(self.cotangents),
            self.layout != "contiguous" and self.layout, self.nan and "nan", self.scale != 1 and f"x{self.scale:g}",
            self.recompute, self.apart and "apart",
        ]  # fmt: skip
        return "-".join([f"B{self.B}-T{self.T}-I{self.I}-H{self.H}", *(f for f in flags if f)])

    @property
    def op(self) -> str:
        """The row of `tolerances.TOLERANCES`."""
        return self.mode.split("_")[0].lower() + ("" if self.scale == 1 else "_large")

    def offered(self, backend: str, dtype: torch.dtype) -> bool:
        if backend == "torch" and (self.resets or self.recompute or self.cells):
            return False
        if backend == "torch" and (self.B == 0 or self.direction == "reverse"):
            return False
        # Rounding to 16 bits moves a sum across relu's kink, where the gradient jumps.
        return self.mode != "RNN_RELU" or self.apart or dtype in (F64, F32)

    @property
    def has_c(self) -> bool:
        return self.mode == "LSTM"

    @property
    def initial_of(self) -> dict[str, str]:
        """The final states that the mode has -> their initial ones."""
        return {"h_n": "h0"} | ({"c_n": "c0"} if self.has_c else {})

    @property
    def directions(self) -> int:
        return 2 if self.direction == "bidirectional" else 1

    def weight_shapes(self) -> list[tuple[int, ...]]:
        R, K, shapes = self.R or self.H, self.directions, []
        G = {"LSTM": 4, "GRU": 3}.get(self.mode, 1) * self.H
        for layer in range(self.layers):
            for _ in range(K):
                shapes += [(G, self.I if layer == 0 else K * R), (G, R)]
                shapes += [(G,), (G,)] if self.bias else []
                shapes += [(R, self.H)] if self.R else []
        return shapes

    def valid(self) -> Tensor:
        """bool [T, B]."""
        lengths = torch.tensor(self.lengths if self.lengths is not None else [self.T] * self.B, dtype=torch.int64)
        return torch.arange(self.T)[:, None] < lengths[None, :]

    def begins(self) -> Tensor | None:
        """resets [T, B]."""
        if not self.resets:
            return None
        t, some = torch.arange(self.T)[:, None], torch.rand(self.T, self.B, generator=torch.Generator().manual_seed(5))
        return {"some": some < 0.4, "every": some >= 0, "none": some < 0, "first": (some >= 0) & (t == 0)}[self.resets]

    def tensors(self, dtype: torch.dtype, seed: int = 0, poisoned: bool = True) -> Tensors:
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
            "resets": self.begins(),
            "dy": normal(T, B, K * R),
            "dh_n": normal(LK, B, R),
            "dc_n": normal(LK, B, self.H),
        }
        if self.apart:
            for w in t["weights"]:
                w.mul_(0.25) if w.dim() == 2 else w.copy_(torch.tensor([3.0, -3.0]).repeat(w.shape[0])[: w.shape[0]])
        if self.cells:
            t["dcells"] = normal(T, B, K * self.H)
        if not self.has_c:
            del t["c0"], t["dc_n"]
        if self.layout == "expanded":
            t["x"], t["dy"] = t["x"][:1].expand(T, -1, -1), t["dy"][:1, :1, :1].expand(T, B, K * R)
        if self.nan and poisoned:
            for name in ("x", "dy", *(("dcells",) if self.cells else ())):
                t[name] = t[name].masked_fill(~self.valid()[..., None], torch.nan)
        if self.layout == "transposed":
            t = {name: transposed(value) for name, value in t.items()}
        if self.layout == "strided":
            t = {name: strided(value) for name, value in t.items()}
        if self.layout == "batch_first":
            for name in ("x", "dy", *(("resets",) if self.resets else ()), *(("dcells",) if self.cells else ())):
                t[name] = t[name].transpose(0, 1).contiguous()
        return t

    def run(self, t: Tensors, backend: str, backward: bool = True) -> Tensors:
        """Outputs and gradients by name, time first whatever the layout."""
        x, weights = self._packed(t["x"].detach()), [w.detach() for w in t["weights"]]
        initials = [t[name].detach() for name in self.initial_of.values()]
        leaves = {"dx": x}
        if self.states:
            leaves |= {f"d{name}": s for name, s in zip(self.initial_of.values(), initials, strict=True)}
        leaves |= {f"dweights[{n}]": w for n, w in enumerate(weights)}
        for leaf in leaves.values() if backward else ():
            leaf.requires_grad_()
        if self.direction == "reverse":  # the functional has no lone reverse layer
            c0 = initials[1] if self.has_c else None
            outputs = autograd.recurrent_layer(
                x, initials[0], c0, weights, t["lengths"], t["resets"], self.to_initial, self.bias, "reverse",
                self.mode, backend,
            )  # fmt: skip
        else:
            with rnnattn.use_backend(backend):
                outputs = self.call(x, initials, weights, t["lengths"], t["resets"])
        names = "y", *self.initial_of, *(["cells"] if self.cells else [])
        results = dict(zip(names, outputs, strict=False))
        if backward:
            given = [name for name in self.cotangents if name in results]
            gradients = torch.autograd.grad(
                [results[name] for name in given],
                list(leaves.values()),
                [self._packed(t["d" + name]) if name in ("y", "cells") else t["d" + name] for name in given],
            )
            results |= dict(zip(leaves, gradients, strict=True))
        sequences = [name for name in ("y", "cells", "dx") if name in results]
        if self.layout == "batch_first":
            results |= {name: results[name].transpose(0, 1) for name in sequences}
        if self.layout == "packed":
            results |= {name: self._padded(results[name]) for name in sequences}
        return {name: value.detach() for name, value in results.items()}

    def _packed(self, sequence: Tensor) -> Tensor:
        if self.layout != "packed" or self.lengths is None:
            return sequence
        return pack_padded_sequence(sequence, list(self.lengths)).data

    def _padded(self, rows: Tensor) -> Tensor:
        assert self.lengths is not None
        batch_sizes = Packing.of_lengths(torch.tensor(self.lengths), len(rows)).batch_sizes
        return pad_packed_sequence(PackedSequence(rows, batch_sizes), total_length=self.T)[0]

    def call(
        self,
        x: Tensor,
        initials: Sequence[Tensor],
        weights: Sequence[Tensor],
        lengths: Any,
        resets: Tensor | None = None,
    ) -> tuple[Any, ...]:
        """The functional of the mode; what modules call with packed rows, which functionals do not take."""
        if self.layout == "packed":
            y, h_n, c_n, cells = run_stack(
                self.mode, x, initials[0], initials[1] if self.has_c else None, weights, self.bias, self.layers,
                bidirectional=self.directions == 2, lengths=Packing.of_lengths(lengths, len(x)),
                recompute=self.recompute or None, return_cells=self.cells,
            )  # fmt: skip
            return y, h_n, *(state for state in (c_n, cells) if state is not None)
        settings: dict[str, Any] = {
            "has_biases": self.bias, "num_layers": self.layers, "bidirectional": self.directions == 2,
            "batch_first": self.layout == "batch_first", "lengths": lengths,
            "resets": resets, "reset_to_initial": self.to_initial, "recompute": self.recompute or None,
        }  # fmt: skip
        if self.mode == "LSTM":
            return RF.lstm(x, (initials[0], initials[1]), weights, return_cells=self.cells, **settings)
        if self.mode == "GRU":
            return RF.gru(x, initials[0], weights, **settings)
        return RF.rnn(x, initials[0], weights, self.mode.split("_")[1].lower(), **settings)


# Rows that say something of every cell.
_EVERY = [
    RecurrentCase(3, 6, 8, 16, "the plain case, sizes multiples of 8"),
    RecurrentCase(1, 37, 5, 96, "more steps and a wider state"),
    RecurrentCase(1, 2, 3, 300, "H wider than a block of a GPU kernel", states=True),
    RecurrentCase(2, 1, 5, 7, "T=1: first and last step are one", states=True),
    RecurrentCase(1, 4, 3, 5, "B=1"),
    RecurrentCase(4, 5, 1, 1, "I=1 and H=1: every tile is a tail (a shape whose one-number sums do not cancel)"),
    RecurrentCase(2, 5, 9, 33, "H one above a tile", states=True),
    RecurrentCase(17, 2, 4, 6, "B one above a tile"),
    RecurrentCase(11, 2, 19, 37, "a few steps of more rows than the product of unpacked weights takes at once"),
    RecurrentCase(0, 3, 4, 5, "B=0: nothing to do, weight gradients are zero"),
    RecurrentCase(0, 3, 4, 5, "B=0 with lengths", lengths=()),
    RecurrentCase(4, 5, 6, 7, "ragged, with an empty row that keeps its state", lengths=(3, 0, 5, 1), states=True),
    RecurrentCase(3, 4, 5, 6, "all rows empty: only the states pass gradients", lengths=(0, 0, 0), states=True),
    RecurrentCase(3, 6, 5, 6, "no row reaches T: the last steps are invalid everywhere", lengths=(2, 4, 3),
                  states=True),
    RecurrentCase(3, 5, 4, 6, "reverse", direction="reverse", states=True),
    RecurrentCase(4, 5, 4, 6, "reverse and ragged: a row starts at its own last step", direction="reverse",
                  lengths=(5, 2, 0, 4), states=True),
    RecurrentCase(3, 4, 5, 6, "bidirectional", direction="bidirectional", states=True),
    RecurrentCase(3, 5, 5, 6, "bidirectional and ragged", direction="bidirectional", lengths=(5, 1, 3), states=True),
    RecurrentCase(3, 4, 5, 6, "no bias", bias=False),
    RecurrentCase(2, 4, 5, 6, "two layers", layers=2, states=True),
    RecurrentCase(3, 4, 5, 6, "a ragged stack: padding between layers", layers=2, direction="bidirectional",
                  lengths=(2, 4, 0), states=True),
    RecurrentCase(3, 4, 5, 6, "only h_n has a cotangent: dy is None", cotangents=("h_n",), states=True),
    RecurrentCase(3, 4, 5, 6, "only y has a cotangent: those of the final states are None", cotangents=("y",),
                  direction="bidirectional"),
    RecurrentCase(3, 4, 5, 8, "every tensor has gaps between elements, NaN in them", layout="strided", states=True,
                  lengths=(4, 1, 2)),
    RecurrentCase(3, 4, 5, 6, "x and dy are expanded, stride 0, as y.sum().backward() makes them", layout="expanded"),
    RecurrentCase(3, 4, 5, 8, "the last dimension is not the innermost in memory, of initial states without their own "
                  "cotangents too", layout="transposed", states=True, cotangents=("y",)),
    RecurrentCase(3, 5, 5, 8, "the same with lengths and episodes, both directions", layout="transposed", states=True,
                  cotangents=("y",), lengths=(5, 0, 3), resets="some", to_initial=True, direction="bidirectional"),
    RecurrentCase(3, 11, 4, 5, "computed again in chunks of 3 steps", recompute="chunk", states=True),
    RecurrentCase(4, 10, 4, 5, "in chunks, ragged, both directions", recompute="chunk", lengths=(10, 0, 3, 5),
                  direction="bidirectional", states=True, nan=True),
    RecurrentCase(3, 10, 4, 5, "in chunks, episodes that begin at their borders too", recompute="chunk", resets="some",
                  direction="bidirectional", states=True),
    RecurrentCase(3, 4, 5, 6, "batch first", layout="batch_first", states=True, lengths=(4, 2, 3)),
    RecurrentCase(4, 5, 6, 7, "packed", layout="packed", lengths=(5, 3, 3, 1), states=True),
    RecurrentCase(4, 13, 6, 7, "packed, both directions of a stack", layout="packed", lengths=(13, 11, 4, 1), layers=2,
                  direction="bidirectional", states=True),
    RecurrentCase(3, 4, 5, 6, "packed rows of one length", layout="packed", lengths=(4, 4, 4), cotangents=("h_n",)),
    RecurrentCase(2, 1, 5, 7, "packed, T=1", layout="packed", lengths=(1, 1), states=True),
    RecurrentCase(3, 10, 4, 5, "packed, in chunks", recompute="chunk", layout="packed", lengths=(10, 6, 2),
                  direction="bidirectional", states=True),
    RecurrentCase(4, 5, 6, 7, "NaN behind the lengths", nan=True, lengths=(3, 0, 5, 1), states=True),
    RecurrentCase(2, 5, 6, 7, "NaN behind the lengths of a stack", layers=2, nan=True, lengths=(3, 4)),
    RecurrentCase(4, 6, 3, 5, "three layers of a ragged stack with episodes from the initial states", layers=3,
                  lengths=(6, 0, 2, 5), resets="some", to_initial=True, states=True),
    RecurrentCase(3, 4, 6, 20, "a stack wider than a block of units", layers=2, states=True, lengths=(2, 4, 3)),
    RecurrentCase(17, 3, 5, 4, "a stack of more rows than a tile", layers=2, bias=False, layout="batch_first"),
    RecurrentCase(3, 5, 4, 6, "a packed stack in one direction", layers=2, layout="packed", lengths=(5, 4, 1)),
    RecurrentCase(3, 6, 8, 9, "saturated gates: no inf / inf in tanh", scale=100.0, states=True),
    RecurrentCase(3, 4, 5, 6, "int32 lengths", lengths=(4, 0, 2), lengths_as="int32"),
    RecurrentCase(3, 4, 5, 6, "lengths as a list", lengths=(1, 4, 2), lengths_as="list"),
    RecurrentCase(3, 6, 5, 9, "episodes", resets="some", states=True),
    RecurrentCase(3, 6, 5, 9, "episodes from the initial states", resets="some", to_initial=True, states=True),
    RecurrentCase(3, 6, 5, 9, "episodes, reverse: borders are crossed from the other side", resets="some",
                  direction="reverse", states=True),
    RecurrentCase(4, 6, 5, 7, "episodes, both directions, ragged: borders behind a row's end, and NaN", resets="some",
                  lengths=(6, 3, 0, 4), direction="bidirectional", nan=True, states=True),
    RecurrentCase(4, 6, 5, 7, "episodes from the initial states, both directions, ragged", resets="some",
                  to_initial=True, lengths=(6, 3, 0, 4), direction="bidirectional", states=True),
    RecurrentCase(3, 5, 4, 6, "episodes in a stack, batch first", resets="some", layers=2, direction="bidirectional",
                  layout="batch_first", to_initial=True, states=True),
    RecurrentCase(1, 4, 5, 6, "episodes in so few steps that weights are not packed", resets="some", states=True),
    RecurrentCase(3, 4, 5, 6, "episodes of one step each", resets="every", direction="bidirectional", states=True),
    RecurrentCase(3, 4, 5, 6, "episodes of one step each from the initial states", resets="every", to_initial=True,
                  direction="bidirectional", states=True),
    RecurrentCase(3, 4, 5, 6, "no episode begins", resets="none", direction="bidirectional", states=True),
    RecurrentCase(3, 4, 5, 6, "an episode begins at the first step: nothing comes of the initial states",
                  resets="first", direction="bidirectional", states=True),
    RecurrentCase(2, 1, 5, 7, "T=1, an episode begins", resets="first", states=True),
    RecurrentCase(2, 1, 5, 7, "T=1, an episode begins with the initial states", resets="first", to_initial=True,
                  states=True),
    RecurrentCase(3, 5, 5, 8, "gaps between elements of resets too", resets="some", layout="strided", states=True),
    RecurrentCase(0, 3, 4, 5, "B=0 with resets", resets="every"),
]  # fmt: skip

LSTM_CASES = [
    *_EVERY,
    RecurrentCase(2, 4, 5, 8, "projection", R=3, states=True),
    RecurrentCase(3, 4, 5, 8, "projection, ragged, both directions, no bias", R=3, direction="bidirectional",
                  bias=False, lengths=(4, 0, 2), states=True),
    RecurrentCase(3, 4, 5, 6, "only c_n has a cotangent", cotangents=("c_n",), lengths=(4, 2, 1)),
    RecurrentCase(3, 4, 5, 8, "gaps between elements, projection", R=3, layout="strided", states=True,
                  lengths=(4, 1, 2)),
    RecurrentCase(3, 5, 5, 8, "episodes, projection, both directions", R=3, resets="some", direction="bidirectional",
                  states=True),
    RecurrentCase(3, 5, 5, 8, "episodes from the initial states, projection, ragged", R=3, resets="some",
                  to_initial=True, lengths=(4, 0, 5), states=True),
    RecurrentCase(3, 5, 6, 7, "NaN behind the lengths, projection, both directions", R=4, nan=True, lengths=(3, 0, 4),
                  direction="bidirectional"),
    RecurrentCase(3, 5, 5, 8, "packed, projection, both directions, no bias", R=3, direction="bidirectional",
                  bias=False, layout="packed", lengths=(5, 4, 2), states=True),
    RecurrentCase(3, 5, 5, 9, "packed, cells", cells=True, direction="bidirectional", layout="packed",
                  lengths=(5, 4, 2), states=True),
    RecurrentCase(3, 6, 5, 17, "cells", cells=True, states=True),
    RecurrentCase(2, 1, 5, 7, "cells of T=1", cells=True, states=True),
    RecurrentCase(0, 3, 4, 5, "cells, B=0", cells=True),
    RecurrentCase(4, 5, 6, 7, "cells behind the lengths are zero, whatever NaN their cotangent has there", cells=True,
                  lengths=(3, 0, 5, 1), direction="bidirectional", nan=True, states=True),
    RecurrentCase(3, 5, 4, 6, "cells of the last layer, batch first", cells=True, layers=2, layout="batch_first",
                  direction="bidirectional", lengths=(5, 0, 2), states=True),
    RecurrentCase(3, 4, 5, 8, "cells with a projection have H features", cells=True, R=3, direction="bidirectional",
                  bias=False, lengths=(4, 0, 2), states=True),
    RecurrentCase(3, 4, 5, 6, "only cells have a cotangent", cells=True, cotangents=("cells",), states=True),
    RecurrentCase(3, 4, 5, 8, "cells whose cotangent has gaps between elements", cells=True, layout="strided",
                  lengths=(4, 1, 2), states=True),
    RecurrentCase(4, 6, 5, 7, "cells of episodes: their gradients cross no border, nor are they cut at one", cells=True,
                  resets="some", lengths=(6, 3, 0, 4), direction="bidirectional", states=True),
    RecurrentCase(3, 6, 5, 7, "cells of episodes from the initial states", cells=True, resets="some", to_initial=True,
                  direction="bidirectional", states=True),
    RecurrentCase(3, 5, 5, 8, "cells of episodes, projection, ragged", cells=True, R=3, resets="some", to_initial=True,
                  lengths=(4, 0, 5), direction="bidirectional", states=True),
    RecurrentCase(3, 4, 5, 6, "cells of episodes of one step each", cells=True, resets="every", states=True,
                  direction="bidirectional"),
]  # fmt: skip

GRU_CASES = [
    *(replace(case, mode="GRU") for case in _EVERY),
    RecurrentCase(3, 4, 5, 7, "no bias: q is a product alone", mode="GRU", bias=False, direction="bidirectional",
                  lengths=(4, 0, 2), states=True),
    RecurrentCase(2, 40, 4, 8, "h carried far: z * h rounds at every step in 16 bits", mode="GRU", states=True),
]  # fmt: skip

RNN_CASES = [
    # The gradient of a saturated h0 is a product of differences 1 - h^2 that have no digits left.
    *(replace(case, mode="RNN_TANH", states=case.states and case.scale == 1) for case in _EVERY),
    RecurrentCase(3, 6, 8, 16, "relu", mode="RNN_RELU", states=True),
    RecurrentCase(3, 6, 8, 16, "relu in 16 bits: half of the units on, half off", mode="RNN_RELU", apart=True),
    RecurrentCase(4, 5, 6, 7, "relu, ragged, both directions", mode="RNN_RELU", direction="bidirectional", apart=True,
                  lengths=(3, 0, 5, 1), states=True),
    RecurrentCase(2, 5, 6, 7, "relu: NaN behind the lengths of a stack", mode="RNN_RELU", layers=2, nan=True,
                  lengths=(3, 4), bias=False),
    RecurrentCase(2, 1, 5, 7, "relu, T=1", mode="RNN_RELU"),
    RecurrentCase(3, 5, 6, 7, "relu, episodes from the initial states", mode="RNN_RELU", apart=True, resets="some",
                  to_initial=True, direction="bidirectional", states=True),
    RecurrentCase(0, 3, 4, 5, "relu, B=0", mode="RNN_RELU"),
    RecurrentCase(3, 4, 5, 6, "relu, reverse, only h_n has a cotangent", mode="RNN_RELU", direction="reverse",
                  lengths=(2, 4, 0), cotangents=("h_n",)),
]  # fmt: skip

RECURRENT_CASES = [*LSTM_CASES, *GRU_CASES, *RNN_CASES]
MODES = ("LSTM", "GRU", "RNN_TANH", "RNN_RELU")


def each_mode(*names: str) -> list[Any]:
    """backend, mode as parameters: every mode that each of these backends (by default those with operations
    of their own) offers."""
    return [
        pytest.param(*p.values, mode, id=f"{p.values[0]}-{mode.lower()}", marks=p.marks)
        for p in backend_parameters(*(names or OWN))
        for mode in MODES
        if RecurrentCase(1, 1, 1, 1, "", mode).offered(str(p.values[0]), F32)
    ]
