"""What a backend is: the operations it offers, and its word on where it can run them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run here, or cannot run this call."""


@dataclass(frozen=True)
class Call:
    """What is known of a call before it runs; `select` and `explain` decide from this alone.

    op is "lstm", "gru", "rnn" or "attention_pool"; hidden is H (recurrent) or A (additive pooling, 0
    for linear); features is I or D.
    """

    op: str
    device: str
    dtype: torch.dtype
    B: int
    T: int
    features: int
    hidden: int
    layers: int = 1
    directions: int = 1
    projection: int = 0
    ragged: bool = False
    grad: bool = False
    compiling: bool = False
    resets: bool = False
    in_chunks: bool = False  # computed again in the backward pass
    cells: bool = False  # c_t of every step is wanted
    dropout: bool = False  # between layers
    regularised: bool = False  # by zoneout, locked dropout, dropped weights or layer norm
    traced: bool = False  # into a graph that is to run elsewhere

    @property
    def recurrent(self) -> bool:
        return self.op != "attention_pool"


class Backend:
    """Base of all backends. Every tensor an operation returns is contiguous and owned by the caller.

    Shapes and meaning of arguments and results are those of the functions of the same name in
    `rnnattn.reference`; `save`, `needs_*` and `need_weights` allow None for what is not wanted.
    """

    name: str
    reads_packed = False  # x of a layer may be packed rows [N, I], lengths then fall; so are y, gates and cells

    def unavailable(self) -> str | None:
        """Why this backend cannot run anything on this machine, or None."""
        return None

    def unsupported(self, call: Call) -> str | None:
        """Why this backend cannot run this call, or None."""
        raise NotImplementedError

    def kernel(self, call: Call) -> str:
        """The kernel that would run this call, in words."""
        return self.name

    def stacks(self, call: Call) -> bool:
        """Whether the layers of the call run as one operation (`reference.stack`), not one after the other."""
        return False

    def step_us(self, call: Call) -> float | None:
        """Microseconds that a model of the kernel expects of one step of one layer, forward; None without a model."""
        return None

    def recurrent_layer_forward(
        self,
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
        save: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        raise NotImplementedError

    def recurrent_layer_backward(
        self,
        dy: Tensor | None,
        dh_n: Tensor | None,
        dc_n: Tensor | None,
        dcells: Tensor | None,
        x: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        weights: list[Tensor],
        lengths: Tensor | None,
        resets: Tensor | None,
        reset_to_initial: bool,
        y: Tensor,
        gates: Tensor,
        cells: Tensor,
        has_biases: bool,
        direction: str,
        mode: str,
        needs_dx: bool,
        needs_dweights: bool,
        overwrites_gates: bool = False,
    ) -> tuple[Tensor | None, Tensor, Tensor, list[Tensor] | None]:
        raise NotImplementedError

    def regularised_scan_forward(
        self, *inputs_and_save: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """y, h_n, c_n, cells of the reference for its inputs, and what the backward needs: gates [T, B, SH] in h0's
        dtype, the cell's saved values (RNN: h'), and with norm_hh hidden [T, B, GH], the normalised hidden product, and
        rstd [T, B], one over its standard deviation. Empty without save, or where there is no such thing."""
        raise NotImplementedError

    def regularised_scan_backward(
        self,
        dy: Tensor | None,
        dh_n: Tensor | None,
        dc_n: Tensor | None,
        dcells: Tensor | None,
        *inputs_and_results: Any,
    ) -> list[Tensor | None]:
        """A gradient for each of the inputs a to bias_c.

        inputs_and_results: the inputs of the forward without save, then y, cells, gates, hidden, rstd, and whether the
        gradients of w_hh to bias_c are wanted, which else may be None.
        """
        raise NotImplementedError

    def attention_pool_forward(
        self,
        x: Tensor,
        v: Tensor,
        w: Tensor | None,
        b: Tensor | None,
        lengths: Tensor | None,
        mask: Tensor | None,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        raise NotImplementedError

    def attention_pool_backward(
        self,
        d_pooled: Tensor | None,
        d_weights: Tensor | None,
        x: Tensor,
        v: Tensor,
        w: Tensor | None,
        b: Tensor | None,
        lengths: Tensor | None,
        mask: Tensor | None,
        pooled: Tensor,
        lse: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        raise NotImplementedError
