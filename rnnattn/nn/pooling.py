"""`AttentionPool`: softmax attention pooling over a sequence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from rnnattn import functional
from rnnattn.nn.graphs import as_node, is_symbolic
from rnnattn.nn.nested import like, padded


class AttentionPool(nn.Module):
    """Pools a sequence to one vector by learned softmax attention, in one pass over the sequence.

        linear:    p = softmax_t(v . x_t)
        additive:  p = softmax_t(v . tanh(W x_t + b))
        pooled = sum_t p_t x_t

    Equivalent to `p = nn.Linear(D, 1)(x).softmax(1); pooled = (p * x).sum(1)`, or with
    `nn.Sequential(nn.Linear(D, A), nn.Tanh(), nn.Linear(A, 1, bias=False))` for the scores. A bias
    on the scores would cancel in the softmax, so there is none.

    Args:
        input_size: D.
        score: "linear" or "additive".
        attention_size: A, for additive scores; D by default.
        bias: whether the additive score has the bias b.
        batch_first: [B, T, D] (the default) or [T, B, D] input.

    Parameters:
        v [D] (linear) or [A] (additive), weight W [A, D], bias b [A].

    Raises:
        ValueError: an unknown score, or a size that is not positive.
    """

    def __init__(
        self,
        input_size: int,
        score: str = "linear",
        attention_size: int | None = None,
        bias: bool = True,
        batch_first: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if score not in functional.SCORES:
            raise ValueError(f"score: expected one of {', '.join(functional.SCORES)}, got {score!r}")
        if score == "linear" and attention_size is not None:
            raise ValueError(f"attention_size: expected None with linear scores, got {attention_size}")
        attention_size = input_size if attention_size is None else attention_size
        for name, size in (("input_size", input_size), ("attention_size", attention_size)):
            if size <= 0:
                raise ValueError(f"{name}: expected a positive size, got {size}")
        self.input_size, self.score, self.batch_first = input_size, score, batch_first
        self.attention_size = attention_size if score == "additive" else None
        new = {"device": device, "dtype": dtype}
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        self.v = nn.Parameter(torch.empty(attention_size, **new))
        if score == "additive":
            self.weight = nn.Parameter(torch.empty(attention_size, input_size, **new))
            if bias:
                self.bias = nn.Parameter(torch.empty(attention_size, **new))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(fan in), as nn.Linear."""
        for p in self.parameters():
            bound = 1 / math.sqrt(self.input_size if p is not self.v else p.numel())
            nn.init.uniform_(p, -bound, bound)

    def forward(
        self,
        input: Tensor | PackedSequence,
        lengths: Tensor | Sequence[int] | None = None,
        mask: Tensor | None = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Pools each row.

        Args:
            input: [B, T, D] ([T, B, D] without batch_first), [T, D] unbatched, a PackedSequence, or a nested
                tensor [B, j, D] of layout torch.jagged, whatever batch_first says.
            lengths: integers [B] on any device, each in [0, T]: keep the first steps of each row.
            mask: bool [B, T] whatever batch_first says ([T] unbatched), True = keep.
            return_weights: also return the attention weights.

        Returns:
            pooled [B, D] ([D] unbatched), and with return_weights the weights [B, T] ([T], nested [B, j]).
            A row that keeps no step gives zeros.

        Raises:
            RuntimeError, ValueError, TypeError: an argument of the wrong shape, dtype or range.
        """
        if is_symbolic(input):
            node: Tensor = as_node(self, input, lengths=lengths, mask=mask, return_weights=return_weights)
            return node
        if isinstance(input, PackedSequence):
            if lengths is not None or mask is not None:
                raise ValueError("AttentionPool: expected no lengths or mask with a PackedSequence")
            x, lengths = pad_packed_sequence(input, batch_first=True)
        elif isinstance(input, Tensor) and input.is_nested:
            x, lengths = padded("AttentionPool", input, lengths=lengths, mask=mask)
        elif input.dim() == 2:
            mask = None if mask is None else mask.unsqueeze(0)
            x = input.unsqueeze(0)
        elif input.dim() == 3:
            x = input if self.batch_first else input.transpose(0, 1)
        else:
            raise ValueError(f"AttentionPool: Expected input to be 2D or 3D, got {input.dim()}D instead")
        if x.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {x.shape[-1]}"
            )
        pooled, weights = functional.attention_pool(
            x, self.v, self.weight, self.bias, lengths=lengths, mask=mask, need_weights=return_weights
        )
        if isinstance(input, Tensor) and input.is_nested:
            weights = None if weights is None else like(input, weights)
        elif isinstance(input, Tensor) and input.dim() == 2:
            pooled, weights = pooled.squeeze(0), None if weights is None else weights.squeeze(0)
        return pooled if weights is None else (pooled, weights)

    def extra_repr(self) -> str:
        size = "" if self.attention_size is None else f", attention_size={self.attention_size}"
        bias = ", bias=False" if self.score == "additive" and self.bias is None else ""
        return f"{self.input_size}, score={self.score}{size}{bias}" + (
            "" if self.batch_first else ", batch_first=False"
        )
