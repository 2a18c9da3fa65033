"""The scan of one direction of a recurrent layer with what regularises it, in plain PyTorch: the specification.

At step t, with a_t = the input product and the rest as in `cells`:

    b = N(W_hh (m * h_{t-1}); g_hh) + b_hh                    m: locked dropout on the state
    h', c' = the cell's h_t, c_t of a_t, b, h_{t-1}, c_{t-1}
    h' = o * tanh(N(c'; g_c) + b_c)                           LSTM with layer norm; c' itself is handed on as it is
    h_t = k_h * h_{t-1} + (1 - k_h) * h'                      zoneout, and c_t likewise

N(v; g) = g * (v - mean(v)) / sqrt(var(v) + 1e-5) over all of v (the G blocks of b together), or v without g.
k is 1 where the mask `keep` is True, else 0; without a mask it is the number `zoneout`, its mean.

Sources: zoneout, Krueger et al. 2017, equation 5 (h' comes of c', not of the kept c_t); layer norm, Ba et al. 2016,
equations 20-22, for every cell as there for the LSTM, its shift being the bias; m, Gal & Ghahramani 2016.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rnnattn.reference.cells import CELLS
from rnnattn.reference.layout import scan_resets, valid_steps, zero_invalid

NORM_EPS = 1e-5  # as torch.nn.LayerNorm's


def regularised_scan_forward(
    a: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    w_hh: Tensor,
    b_hh: Tensor | None,
    norm_hh: Tensor | None,
    norm_c: Tensor | None,
    bias_c: Tensor | None,
    h_mask: Tensor | None,
    keep_h: Tensor | None,
    keep_c: Tensor | None,
    zoneout_h: float,
    zoneout_c: float,
    lengths: Tensor | None,
    resets: Tensor | None,
    reset_to_initial: bool,
    reverse: bool,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One direction over a sequence; differentiable by autograd.

    Args:
        a: [T, B, GH], the input product with b_ih, in the accumulation type.
        h0, c0: [B, H]; c0 is None for a cell without c.
        w_hh, b_hh: [GH, H], [GH].
        norm_hh, norm_c, bias_c: [GH], [H], [H]: the gains g_hh, g_c and the shift b_c.
        h_mask: [B, H] in the accumulation type.
        keep_h, keep_c: bool [T, B, H], True where zoneout keeps the state before.
        zoneout_h, zoneout_c: what stands for the masks where there are none.
        lengths, resets, reset_to_initial, mode: as in `recurrent_layer_forward`.

    Returns:
        y [T, B, H], h_n [B, H], c_n [B, H] in h0's dtype, and cells [T, B, H] in the accumulation type: c_t, as y
        zero at invalid steps. c_n and cells are empty for a cell without c.
    """
    cell, (T, _, GH), H, acc, dtype = CELLS[mode], a.shape, h0.shape[-1], a.dtype, h0.dtype
    w_hh = w_hh.to(acc)
    b_hh, norm_hh, norm_c, bias_c = (None if p is None else p.to(acc) for p in (b_hh, norm_hh, norm_c, bias_c))
    h, c = h0, None if c0 is None else c0.to(acc)
    valid = None if lengths is None else valid_steps(lengths, T)[..., None]
    reset = scan_resets(resets, reset_to_initial, h, c, lengths, reverse)
    a = zero_invalid(a, lengths)
    y, cells = [h] * T, [h] * T
    for t in reversed(range(T)) if reverse else range(T):
        if reset is not None:
            h, c = reset.states(t, h, c)
        h_acc = h.to(acc)
        b = F.linear(h_acc if h_mask is None else h_acc * h_mask, w_hh)
        if norm_hh is not None:
            b = F.layer_norm(b, (GH,), norm_hh, eps=NORM_EPS)
        h_t, c_t, saved = cell.forward(a[t], b if b_hh is None else b + b_hh, h_acc, c)
        if norm_c is not None and c_t is not None and saved is not None:
            h_t = saved[..., 3 * H :] * F.layer_norm(c_t, (H,), norm_c, bias_c, NORM_EPS).tanh()
        h_t = kept(h_acc, h_t, None if keep_h is None else keep_h[t], zoneout_h).to(dtype)
        y[t] = h_t if valid is None else torch.where(valid[t], h_t, 0)
        h = h_t if valid is None else torch.where(valid[t], h_t, h)
        if c is not None and c_t is not None:
            c_t = kept(c, c_t, None if keep_c is None else keep_c[t], zoneout_c)
            cells[t] = c_t if valid is None else torch.where(valid[t], c_t, 0)
            c = c_t if valid is None else torch.where(valid[t], c_t, c)
    if c is None:
        return torch.stack(y), h, h.new_empty(0), a.new_empty(0)
    return torch.stack(y), h, c.to(dtype), torch.stack(cells)


def kept(before: Tensor, after: Tensor, keep: Tensor | None, zoneout: float) -> Tensor:
    """k * before + (1 - k) * after."""
    if keep is not None:
        return torch.where(keep, before, after)
    return after if zoneout == 0 else zoneout * before + (1 - zoneout) * after
