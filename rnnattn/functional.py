"""The operations as functions: torch.nn's recurrent layers and cells, and attention pooling.

Dimension letters: B batch, T time, I input size, H hidden size, R output size (H, or the
projection size), K directions, L layers, D feature size, A attention size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rnnattn.checks import check_states
from rnnattn.pooling import run_pool
from rnnattn.stack import run_stack, run_step

SCORES = ("linear", "additive")
NONLINEARITIES = ("tanh", "relu")


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weights: Sequence[Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    resets: Tensor | None = None,
    reset_to_initial: bool = False,
    recompute: str | None = None,
    return_cells: bool = False,
) -> tuple[Tensor, ...]:
    """A stack of LSTM layers over a batch of sequences.

        i, f, o = sigmoid(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)      g = tanh(...), rows i, f, g, o
        c_t = f * c_{t-1} + i * g,    h_t = W_hr (o * tanh(c_t))

    Equivalent to `torch.lstm` with the same arguments; with `lengths`, to packing the input first
    and padding the output after; with `resets`, to running the episodes of each row one by one:

        forward   where resets[t], step t starts from s instead of h_{t-1}, c_{t-1}
        reverse   where resets[t], step t - 1 starts from s instead of h_t, c_t
        s         zeros, or with reset_to_initial h0, c0

    Args:
        input: [T, B, I], or [B, T, I] with batch_first.
        hx: h0 [L * K, B, R] and c0 [L * K, B, H].
        weights: per layer and direction w_ih [4H, I or K * R], w_hh [4H, R], with has_biases b_ih
            and b_hh [4H], with a projection w_hr [R, H]; gates in the order i, f, g, o.
        dropout: probability of zeroing an output of every layer but the last, in training.
        lengths: integers [B] on any device, each in [0, T]. Steps behind a row's length are not
            read and give zeros; a row of length 0 returns its initial state. On a device other
            than the CPU values are not read back for a check but clamped to [0, T].
        resets: bool [T, B], or [B, T] with batch_first, on the input's device: True where a row's step t
            begins an episode. No state and no gradient crosses the border between t - 1 and t, in either
            direction of any layer. In the forward direction one at t = 0 replaces hx; those at or behind a
            row's length have no effect.
        reset_to_initial: resets are to hx, to which gradients flow from each of them, not to zeros.
        recompute: "chunk" to keep, for the backward pass, the states at the borders of chunks of sqrt(T) steps alone,
            and to compute each chunk again when its turn comes: one more forward for memory of the order of
            sqrt(T). Gradients are the same, but have no gradients themselves. Not while compiling; not with
            reset_to_initial.
        return_cells: return c_t of the last layer at every step too. Not with recompute.

    Returns:
        output as `input` with K * R features, h_n [L * K, B, R], c_n [L * K, B, H].
        With return_cells also cells, as `input` with K * H features, differentiable as the others are, and zero where
        output is for the sake of a row's length.

    Raises:
        RuntimeError, ValueError, TypeError: an argument of the wrong shape, dtype, device or range.
        BackendError: the backend asked for by name cannot run this call.

    Source: torch.nn.LSTM; Hochreiter & Schmidhuber 1997.
    """
    check_states("lstm", hx, 1)
    h0, c0 = hx
    output, h_n, c_n, cells = run_stack(
        "LSTM", input, h0, c0, weights, has_biases, num_layers, dropout, training, bidirectional, batch_first, lengths,
        resets, reset_to_initial, recompute, return_cells,
    )  # fmt: skip
    assert c_n is not None
    return (output, h_n, c_n) if cells is None else (output, h_n, c_n, cells)


def gru(
    input: Tensor,
    hx: Tensor,
    weights: Sequence[Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    resets: Tensor | None = None,
    reset_to_initial: bool = False,
    recompute: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A stack of GRU layers over a batch of sequences.

        r, z = sigmoid(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)      rows r, z
        n = tanh(W_in x_t + b_in + r * (W_hn h_{t-1} + b_hn))      rows n
        h_t = (1 - z) * n + z * h_{t-1}

    Equivalent to `torch.gru` with the same arguments; with `lengths`, `resets` and `recompute` as for `lstm`.

    Args:
        hx: h0 [L * K, B, H].
        weights: per layer and direction w_ih [3H, I or K * H], w_hh [3H, H], with has_biases b_ih
            and b_hh [3H]; gates in the order r, z, n.
        The others as in `lstm`, with R = H.

    Returns:
        output as `input` with K * H features, h_n [L * K, B, H].

    Raises:
        As `lstm`.

    Source: torch.nn.GRU; Cho et al. 2014.
    """
    output, h_n, *_ = run_stack(
        "GRU", input, hx, None, weights, has_biases, num_layers, dropout, training, bidirectional, batch_first, lengths,
        resets, reset_to_initial, recompute,
    )  # fmt: skip
    return output, h_n


def rnn(
    input: Tensor,
    hx: Tensor,
    weights: Sequence[Tensor],
    nonlinearity: str = "tanh",
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    resets: Tensor | None = None,
    reset_to_initial: bool = False,
    recompute: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A stack of simple recurrent layers over a batch of sequences.

        h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)      or relu

    Equivalent to `torch.rnn_tanh` or `torch.rnn_relu` with the same arguments; with `lengths`,
    `resets` and `recompute` as for `lstm`.

    Args:
        hx: h0 [L * K, B, H].
        weights: per layer and direction w_ih [H, I or K * H], w_hh [H, H], with has_biases b_ih
            and b_hh [H].
        nonlinearity: "tanh" or "relu".
        The others as in `lstm`, with R = H.

    Returns:
        output as `input` with K * H features, h_n [L * K, B, H].

    Raises:
        ValueError: an unknown nonlinearity. The others as `lstm`.

    Source: torch.nn.RNN; Elman 1990.
    """
    output, h_n, *_ = run_stack(
        _rnn_mode(nonlinearity), input, hx, None, weights, has_biases, num_layers, dropout, training, bidirectional,
        batch_first, lengths, resets, reset_to_initial, recompute,
    )  # fmt: skip
    return output, h_n


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of `lstm`; equivalent to `torch.lstm_cell`.

    Args:
        input: [B, I]. hx: h and c, each [B, H]; c may have another dtype, and all is then in the wider one.
        w_ih, w_hh: [4H, I] and [4H, H]. b_ih, b_hh: [4H], or None.

    Returns:
        h' and c', each [B, H].

    Raises:
        RuntimeError, ValueError: an argument of the wrong shape, dtype or device.
    """
    h, c = hx
    if c.dtype != input.dtype == h.dtype == w_ih.dtype:
        dtype = torch.promote_types(input.dtype, c.dtype)
        input, h, c, w_ih, w_hh = (t.to(dtype) for t in (input, h, c, w_ih, w_hh))
        b_ih, b_hh = (None if b is None else b.to(dtype) for b in (b_ih, b_hh))
    h_n, c_n = run_step("LSTM", input, h, c, w_ih, w_hh, b_ih, b_hh)
    assert c_n is not None
    return h_n, c_n


def gru_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """One step of `gru`; equivalent to `torch.gru_cell`.

    Args:
        input: [B, I]. hx: h [B, H].
        w_ih, w_hh: [3H, I] and [3H, H]. b_ih, b_hh: [3H], or None.

    Returns:
        h' [B, H].

    Raises:
        RuntimeError, ValueError: an argument of the wrong shape, dtype or device.
    """
    return run_step("GRU", input, hx, None, w_ih, w_hh, b_ih, b_hh)[0]


def rnn_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    nonlinearity: str = "tanh",
) -> Tensor:
    """One step of `rnn`; equivalent to `torch.rnn_tanh_cell` or `torch.rnn_relu_cell`.

    Args:
        input: [B, I]. hx: h [B, H].
        w_ih, w_hh: [H, I] and [H, H]. b_ih, b_hh: [H], or None.
        nonlinearity: "tanh" or "relu".

    Returns:
        h' [B, H].

    Raises:
        RuntimeError, ValueError: an argument of the wrong shape, dtype or device.
    """
    return run_step(_rnn_mode(nonlinearity), input, hx, None, w_ih, w_hh, b_ih, b_hh)[0]


def _rnn_mode(nonlinearity: str) -> str:
    if nonlinearity not in NONLINEARITIES:
        raise ValueError(f"nonlinearity: expected one of {', '.join(NONLINEARITIES)}, got {nonlinearity!r}")
    return f"RNN_{nonlinearity.upper()}"


def attention_pool(
    input: Tensor,
    v: Tensor,
    w: Tensor | None = None,
    b: Tensor | None = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    mask: Tensor | None = None,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention pooling of a batch of sequences, in one pass over the input.

        p = softmax_t(v . x_t)  or  softmax_t(v . tanh(w x_t + b)),    pooled = sum_t p_t x_t

    Equivalent to `p = (input @ v).softmax(1); pooled = (p[:, None] @ input)[:, 0]`, or with
    `torch.tanh(F.linear(input, w, b)) @ v` as the scores.

    Args:
        input: [B, T, D].
        v: [D] for linear scores (without w), else [A].
        w, b: [A, D] and [A] for additive scores; b may be None.
        lengths: integers [B] on any device, each in [0, T]: keep the first steps of each row.
        mask: bool [B, T], True = keep. Not together with lengths.
        need_weights: return p as well.

    Returns:
        pooled [B, D], and p [B, T] or None. A row that keeps no step gives zeros.

    Raises:
        RuntimeError, ValueError, TypeError: an argument of the wrong shape, dtype, device or range.
        BackendError: the backend asked for by name cannot run this call.

    Source: Bahdanau et al. 2015 (additive scores), Yang et al. 2016 (pooling).
    """
    return run_pool(input, v, w, b, lengths, mask, need_weights)
