"""One step of every recurrent cell, forward and backward, in plain PyTorch.

With a = W_ih x_t + b_ih and b = W_hh h_{t-1} + b_hh, each cut into G blocks of H rows named by index:

    LSTM      i, f, o = sigmoid(a + b)    g = tanh(a_g + b_g)                   blocks i, f, g, o
              c_t = f * c_{t-1} + i * g
              h_t = o * tanh(c_t)
    GRU       r, z = sigmoid(a + b)       n = tanh(a_n + r * q), q = b_n        blocks r, z, n
              h_t = (1 - z) * n + z * h_{t-1}
    RNN_TANH  h_t = tanh(a + b)
    RNN_RELU  h_t = max(a + b, 0)

Sources: Hochreiter & Schmidhuber 1997 with forget gates (Gers et al. 2000); Cho et al. 2014 with the
reset gate behind the product, as in cuDNN; Elman 1990. Order of blocks and biases as in torch.nn.
The modes' names are those of torch.nn.RNNBase.

All tensors are [B, ...] in the accumulation type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Step(NamedTuple):
    """What the backward of a step may read of its forward."""

    saved: Tensor | None  # [B, SH], `Cell.saved` values a unit; None where that is 0
    h: Tensor  # [B, H], h_t before a projection; read by cells that save nothing
    h_prev: Tensor  # [B, R], h_{t-1}
    c: Tensor | None  # [B, H], c_t
    c_prev: Tensor | None  # [B, H], c_{t-1}


class Cell(NamedTuple):
    """A cell's sizes and its equations."""

    blocks: int
    """G: W_ih, W_hh and the biases have G * H rows."""
    saved: int
    """S: values per unit that a step keeps for its backward."""
    has_c: bool
    """Whether there is a state c beside h."""
    shared: bool
    """Whether a and b have the same gradient, and so the two biases."""
    forward: Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None, Tensor | None]]
    """(a [B, GH], b [B, GH], h_{t-1}, c_{t-1}) -> h_t, c_t, saved [B, SH]."""
    backward: Callable[[Tensor, Tensor | None, Step], tuple[Tensor, Tensor, Tensor | None, Tensor | None]]
    """(dh_t, dc_t, step) -> da, db [B, GH], the part of dh_{t-1} that does not pass through b, dc_{t-1}."""


def _lstm_forward(a, b, h, c):  # type: ignore[no-untyped-def]
    i, f, g, o = (a + b).chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c = f * c + i * g
    return o * c.tanh(), c, torch.cat([i, f, g, o], -1)


def _lstm_backward(dh, dc, step):  # type: ignore[no-untyped-def]
    i, f, g, o = step.saved.chunk(4, -1)
    tanh_c = step.c.tanh()
    dc = dc + dh * o * (1 - tanh_c * tanh_c)
    d = torch.cat(
        [
            dc * g * i * (1 - i),
            dc * step.c_prev * f * (1 - f),
            dc * i * (1 - g * g),
            dh * tanh_c * o * (1 - o),
        ],
        -1,
    )
    return d, d, None, dc * f


def _gru_forward(a, b, h, c):  # type: ignore[no-untyped-def]
    a_r, a_z, a_n = a.chunk(3, -1)
    b_r, b_z, q = b.chunk(3, -1)
    r, z = (a_r + b_r).sigmoid(), (a_z + b_z).sigmoid()
    n = (a_n + r * q).tanh()
    return (1 - z) * n + z * h, None, torch.cat([r, z, n, q], -1)


def _gru_backward(dh, dc, step):  # type: ignore[no-untyped-def]
    r, z, n, q = step.saved.chunk(4, -1)
    d_n = dh * (1 - z) * (1 - n * n)
    d_r = d_n * q * r * (1 - r)
    d_z = dh * (step.h_prev - n) * z * (1 - z)
    return torch.cat([d_r, d_z, d_n], -1), torch.cat([d_r, d_z, d_n * r], -1), dh * z, None


def _tanh_forward(a, b, h, c):  # type: ignore[no-untyped-def]
    return (a + b).tanh(), None, None


def _tanh_backward(dh, dc, step):  # type: ignore[no-untyped-def]
    d = dh * (1 - step.h * step.h)
    return d, d, None, None


def _relu_forward(a, b, h, c):  # type: ignore[no-untyped-def]
    return (a + b).relu(), None, None


def _relu_backward(dh, dc, step):  # type: ignore[no-untyped-def]
    d = torch.where(step.h > 0, dh, 0)
    return d, d, None, None


CELLS: dict[str, Cell] = {
    "LSTM": Cell(4, 4, True, True, _lstm_forward, _lstm_backward),
    "GRU": Cell(3, 4, False, False, _gru_forward, _gru_backward),
    "RNN_TANH": Cell(1, 0, False, True, _tanh_forward, _tanh_backward),
    "RNN_RELU": Cell(1, 0, False, True, _relu_forward, _relu_backward),
}
