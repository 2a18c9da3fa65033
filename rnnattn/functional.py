"""The operations as functions: argument checks, choice of backend, stacking of layers.

Dimension letters: B batch, T time, I input size, H hidden size, R output size (H, or the
projection size), K directions, L layers, D feature size, A attention size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rnnattn import autograd, backends
from rnnattn.backends import Call
from rnnattn.checks import check_lstm, check_pool, checked_lengths, checked_mask

SCORES = ("linear", "additive")


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
) -> tuple[Tensor, Tensor, Tensor]:
    """A stack of LSTM layers over a batch of sequences.

    Equivalent to `torch.lstm` with the same arguments; with `lengths`, to packing the input first
    and padding the output after.

    Args:
        input: [T, B, I], or [B, T, I] with batch_first.
        hx: h0 [L * K, B, R] and c0 [L * K, B, H].
        weights: per layer and direction w_ih [4H, I or K * R], w_hh [4H, R], with has_biases b_ih
            and b_hh [4H], with a projection w_hr [R, H]; gates in the order i, f, g, o.
        dropout: probability of zeroing an output of every layer but the last, in training.
        lengths: integers [B] on any device, each in [0, T]. Steps behind a row's length are not
            read and give zeros; a row of length 0 returns its initial state. On a device other
            than the CPU values are not read back for a check but clamped to [0, T].

    Returns:
        output as `input` with K * R features, h_n [L * K, B, R], c_n [L * K, B, H].

    Raises:
        RuntimeError, ValueError, TypeError: an argument of the wrong shape, dtype, device or range.
        BackendError: the backend asked for by name cannot run this call.

    Source: torch.nn.LSTM; equations in `rnnattn.reference.lstm`.
    """
    h0, c0 = hx
    low = _autocast_dtype(input)
    if low is not None:
        with torch.autocast(input.device.type, enabled=False):
            return lstm(
                _lowered(input, low), (_lowered(h0, low), _lowered(c0, low)), [_lowered(w, low) for w in weights],
                has_biases, num_layers, dropout, training, bidirectional, batch_first, lengths,
            )  # fmt: skip
    weights = list(weights)
    x = input.transpose(0, 1) if batch_first else input
    K = 2 if bidirectional else 1
    check_lstm(x, h0, c0, weights, has_biases, num_layers, K)
    lengths = checked_lengths(lengths, x.shape[1], x.shape[0], x.device)
    call = lstm_call(
        x, weights, c0.shape[-1], h0.shape[-1], num_layers, K, lengths is not None, _wants_grad(x, h0, c0, *weights)
    )
    backend, _ = backends.select(call)
    if backend == "torch":
        y, h_n, c_n = backends.TORCH.lstm(
            x, h0, c0, weights, has_biases, num_layers, dropout, training, bidirectional, lengths
        )
    else:
        y, h_n, c_n = _stack(x, h0, c0, weights, has_biases, num_layers, dropout, training, K, lengths, backend)
    return y.transpose(0, 1) if batch_first else y, h_n, c_n


def _stack(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: list[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    K: int,
    lengths: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    direction = "bidirectional" if K == 2 else "forward"
    per_layer = len(weights) // num_layers
    h_n, c_n = [], []
    for layer in range(num_layers):
        if layer > 0 and dropout > 0 and training:
            x = F.dropout(x, dropout)
        states = slice(layer * K, (layer + 1) * K)
        layer_weights = weights[layer * per_layer : (layer + 1) * per_layer]
        x, h, c = autograd.lstm_layer(x, h0[states], c0[states], layer_weights, lengths, has_biases, direction, backend)
        h_n.append(h)
        c_n.append(c)
    if num_layers == 1:
        return x, h_n[0], c_n[0]
    return x, torch.cat(h_n), torch.cat(c_n)


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM; equivalent to `torch.lstm_cell`.

    Args:
        input: [B, I]. hx: h and c, each [B, H].
        w_ih, w_hh: [4H, I] and [4H, H]. b_ih, b_hh: [4H], or both None.

    Returns:
        h' and c', each [B, H].

    Raises:
        RuntimeError, ValueError: an argument of the wrong shape, dtype or device.
    """
    if (b_ih is None) != (b_hh is None):
        raise ValueError("lstm_cell: expected b_ih and b_hh both given or both None")
    biases = [] if b_ih is None or b_hh is None else [b_ih, b_hh]
    h, c = hx
    _, h_n, c_n = lstm(input[None], (h[None], c[None]), [w_ih, w_hh, *biases], has_biases=bool(biases))
    return h_n[0], c_n[0]


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
    low = _autocast_dtype(input)
    if low is not None:
        w, b = (None if p is None else _lowered(p, low) for p in (w, b))
        with torch.autocast(input.device.type, enabled=False):
            return attention_pool(
                _lowered(input, low), _lowered(v, low), w, b, lengths=lengths, mask=mask, need_weights=need_weights
            )
    check_pool(input, v, w, b)
    B, T, _ = input.shape
    if lengths is not None and mask is not None:
        raise ValueError("attention_pool: expected lengths or mask, got both")
    lengths = checked_lengths(lengths, B, T, input.device)
    checked_mask(mask, (B, T), input.device)
    grad = _wants_grad(input, v, *[p for p in (w, b) if p is not None])
    backend, _ = backends.select(pool_call(input, w, lengths is not None or mask is not None, grad))
    if backend == "torch":
        pooled, p = backends.TORCH.attention_pool(input, v, w, b, lengths, mask)
        return pooled, p if need_weights else None
    return autograd.attention_pool(input, v, w, b, lengths, mask, need_weights, backend)


def lstm_call(
    x: Tensor, weights: list[Tensor], H: int, R: int, num_layers: int, K: int, ragged: bool, grad: bool
) -> Call:
    """What `backends.select` needs to know of an LSTM call; x is [T, B, I]."""
    T, B, I = x.shape
    return Call(
        "lstm", x.device.type, x.dtype, B, T, I, H, num_layers, K, R if R != H else 0, ragged, grad,
        torch.compiler.is_compiling(),
    )  # fmt: skip


def pool_call(x: Tensor, w: Tensor | None, ragged: bool, grad: bool) -> Call:
    """What `backends.select` needs to know of a pooling call; x is [B, T, D]."""
    B, T, D = x.shape
    A = 0 if w is None else w.shape[0]
    compiling = torch.compiler.is_compiling()
    return Call("attention_pool", x.device.type, x.dtype, B, T, D, A, ragged=ragged, grad=grad, compiling=compiling)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast runs torch's own recurrent layers in; None where it is off."""
    if not torch._C._is_any_autocast_enabled():
        return None
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _lowered(t: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast casts: floating tensors but float64."""
    return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t


def _wants_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
