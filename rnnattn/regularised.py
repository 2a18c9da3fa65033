"""What regularises a recurrent layer, around its scan: masks that are drawn once a call, and the input product.

`nn.regularised` says what the settings mean, `reference.regularised` has the equations of the scan.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rnnattn import autograd
from rnnattn.reference import (
    CELLS,
    DIRECTIONS,
    NORM_EPS,
    LayerWeights,
    accumulation_dtype,
    split_weights,
    zero_invalid,
)


@dataclass(frozen=True)
class Norms:
    """The parameters of one scan's layer norms, G H or H numbers each."""

    ih: Tensor  # gain of the input product
    hh: Tensor  # gain of the hidden product
    c: Tensor | None  # gain of c; LSTM
    c_bias: Tensor | None  # shift of c; LSTM with biases


@dataclass(frozen=True)
class Regularisation:
    """The settings of one call of a stack. The three dropouts are 0 in evaluation; zoneout is not."""

    training: bool
    zoneout: tuple[float, float] = (0.0, 0.0)  # of h, of c
    input_dropout: float = 0.0
    recurrent_dropout: float = 0.0
    weight_dropout: float = 0.0
    norms: tuple[Norms, ...] = ()  # of each direction of each layer

    @property
    def of_scan(self) -> bool:
        """Whether the steps themselves are others than the plain layer's."""
        return any(self.zoneout) or self.recurrent_dropout > 0 or bool(self.norms)

    def dropped(self, x: Tensor, weights: list[Tensor], K: int) -> tuple[Tensor, list[Tensor]]:
        """A layer's input [T, B, I], a mask for all of its steps, and its weights, of which w_hh has lost some."""
        if self.input_dropout:
            x = x * F.dropout(x.new_ones(x.shape[1:]), self.input_dropout)
        if self.weight_dropout:
            each = len(weights) // K
            weights = [F.dropout(w, self.weight_dropout) if n % each == 1 else w for n, w in enumerate(weights)]
        return x, weights


def regularised_layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    lengths: Tensor | None,
    resets: Tensor | None,
    reset_to_initial: bool,
    has_biases: bool,
    direction: str,
    mode: str,
    backend: str,
    with_cells: bool,
    regularisation: Regularisation,
    layer: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """y, h_n, c_n and, with_cells, cells [K, T, B, H] of the layer of that index.

    The other arguments are those of `rnnattn.reference.recurrent_layer_forward`, without a projection.
    """
    T, B, H, K = *x.shape[:2], h0.shape[-1], h0.shape[0]
    r, acc, has_c = regularisation, accumulation_dtype(x.dtype), CELLS[mode].has_c
    x, scans = zero_invalid(x, lengths), []
    for k, (w, reverse) in enumerate(zip(split_weights(weights, has_biases, K), DIRECTIONS[direction], strict=True)):
        norms = r.norms[layer * K + k] if r.norms else None
        h_mask = None
        if r.recurrent_dropout:
            h_mask = F.dropout(torch.ones(B, H, dtype=acc, device=x.device), r.recurrent_dropout)
        keeps = [
            torch.rand(T, B, H, dtype=torch.float32, device=x.device) < p if r.training and p > 0 else None
            for p in (r.zoneout if has_c else r.zoneout[:1])
        ]
        gains = (None, None, None) if norms is None else (norms.hh, norms.c, norms.c_bias)
        scan = autograd.regularised_scan(
            _input_product(x, w, norms), h0[k], None if c0 is None else c0[k], w.w_hh, w.b_hh, *gains, h_mask, keeps[0],
            keeps[1] if has_c else None, *r.zoneout, lengths, resets, reset_to_initial, reverse, mode, backend,
        )  # fmt: skip
        scans.append(scan)
    y, h_n, c_n, cells = zip(*scans, strict=True)
    return (
        torch.cat(y, -1),
        torch.stack(h_n),
        torch.stack(c_n) if has_c else None,
        torch.stack(cells) if with_cells else None,
    )


def _input_product(x: Tensor, w: LayerWeights, norms: Norms | None) -> Tensor:
    """[T, B, GH] in the accumulation type: with W_ih and b_ih, normalised in between where there are norms."""
    acc = accumulation_dtype(x.dtype)
    b_ih = None if w.b_ih is None else w.b_ih.to(acc)
    # A GPU multiplies 16-bit numbers at their own rate; a CPU gives their sums in 16 bits, and takes longer.
    a = F.linear(x, w.w_ih).to(acc) if x.is_cuda else F.linear(x.to(acc), w.w_ih.to(acc))
    if norms is not None:
        a = F.layer_norm(a, a.shape[-1:], norms.ih.to(acc), eps=NORM_EPS)
    return a if b_ih is None else a + b_ih
