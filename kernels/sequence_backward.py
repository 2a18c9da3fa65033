"""The backward scan of a recurrent layer in one launch: the gradients of all pre-activations, from the last step on.

Groups and programs as in `sequence_forward`. A program owns UNITS hidden units: the rows of W_hh^T for them stay in
it, [UNITS, GH]; the gradients db of the step after travel, and

    dh^T [UNITS, BATCH] = W_hh^T [UNITS, GH] . db^T [GH, BATCH]

Few units and a long sum: PARTS parts of it are multiplied side by side and added up. Equations: step_backward.
In a stack (`weights_x`) W_ih^T da_t of the layer above adds to the gradient of y_t, when its group has arrived.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rnnattn.kernels.grid_barrier import arrive, wait
from rnnattn.kernels.math import tanh
from rnnattn.kernels.sequence_products import hold_columns, product_of_parts
from rnnattn.kernels.sequence_rows import at_step, before_scan, row_of_step, rows_of_tile


@triton.jit
def _cut(d, gathered, anew, GATHERS: tl.constexpr):
    """What the step before a reset gets of the gradient d of its state, nothing, and what the initial state gets."""
    if GATHERS:
        gathered += tl.where(anew[None, :], d, 0.0)
    return tl.where(anew[None, :], 0.0, d), gathered


@triton.jit
def _at(slots, t, own, row_length, length, B):
    """Where step t's gradients of the rows are; row 0, which may be read, for a row without that step."""
    at = at_step(slots, t, row_length, B) + own
    if slots is not None:
        at = tl.where(t < length, at, 0)
    return at


@triton.jit
def _there(product, slots, t, length):
    """A product of step t's gradients, with zeros for rows without that step, as padded rows have them there."""
    if slots is not None:
        product = tl.where((t < length)[None, :], product, 0.0)
    return product


@triton.jit(do_not_specialize=["T", "B", "first_group"], do_not_specialize_on_alignment=["lengths", "slots"])
def _backward_kernel(
    dy,  # [N, K H], or None
    dcells,  # [K, N, H] fp32, not read behind lengths, or None
    weights,  # [K, GH, width]
    weights_x,  # [K - 1, GH, width], W_ih of a stack's further layers, or None
    y,  # [N, K H], RNN
    h_prev,  # [K, N, H], GRU
    gates,  # [K, N, SH], or None
    cells,  # [K, N, H] fp32, or None
    c0,  # [K, B, H] fp32, or None
    lengths,  # [B] int64, or None
    order,  # [B] int64, or None
    slots,  # [T + 2] int64 of packed rows, or None
    resets,  # [K, T, B] bool, or None
    dh,  # in and out [K, B, H] fp32: gradient of h_n; of h0
    dc,  # in and out [K, B, H] fp32, or None
    da,  # out [N, K, row]
    db,  # out [N, K, row], GRU; else da
    counters,  # [tiles K] int32, zero, or None where nobody waits
    T,
    B,
    H,
    width,
    row_length,
    first_group,
    MODE: tl.constexpr,
    K: tl.constexpr,
    REVERSE: tl.constexpr,
    TO_INITIAL: tl.constexpr,
    UNITS: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    AHEAD: tl.constexpr,
    BATCH: tl.constexpr,
    SLICES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    GATES: tl.constexpr = 4 if MODE == "LSTM" else 3 if MODE == "GRU" else 1
    GH = GATES * H
    group = first_group + tl.program_id(0) // SLICES
    k, tile, first_unit = group % K, group // K, tl.program_id(0) % SLICES * UNITS
    STACKED: tl.constexpr = weights_x is not None
    reverse = REVERSE | (k == 1)
    if STACKED:
        reverse = k < 0

    row, present, length, steps = rows_of_tile(order, lengths, tile, T, B, BATCH)
    unit = first_unit + tl.arange(0, UNITS)
    inside = (unit < H)[:, None] & present[None, :]

    weights += k.to(tl.int64) * GH * width
    w = hold_columns(weights, unit, H, GH, width, PARTS, CHUNK, CHUNKS)
    if STACKED:
        above = k < K - 1
        weights_x += k.to(tl.int64) * GH * width
        w_x = hold_columns(weights_x, tl.where(above, unit, H), H, GH, width, PARTS, CHUNK, CHUNKS)

    of_scan = before_scan(slots, k, T, B)
    own = (row * K + k) * row_length
    at_d = own[None, :] + unit[:, None]
    at_row = (row * H)[None, :] + unit[:, None]  # in a step of [K, N, H]
    at_output = ((row * K + k) * H)[None, :] + unit[:, None]  # in one of [N, K H]
    at_state = ((row + k * B) * H)[None, :] + unit[:, None]
    around = tl.load(dh + at_state, inside, 0.0)  # of the state before, what does not pass through the product
    nothing = tl.zeros((UNITS, BATCH), tl.float32)
    dh_initial, dc_initial, dc_next, c_first = nothing, nothing, nothing, nothing
    if MODE == "LSTM":
        dc_next = tl.load(dc + at_state, inside, 0.0)
        c_first = tl.load(c0 + at_state, inside, 0.0)
    instead_c = c_first if TO_INITIAL else nothing
    if counters is not None:
        counters += group

    for n in range(0, steps):
        t = tl.where(reverse, n, steps - 1 - n)
        step = row_of_step(slots, of_scan, t, B)
        after = tl.where(reverse, t - 1, t + 1)
        valid, there = present, inside
        if lengths is not None:
            valid = t < length
        if slots is not None:  # which have no other rows
            there = inside & valid[None, :]
        # What this step reads of the forward, before it waits.
        d_y = nothing
        if dy is not None:
            d_y = tl.load(dy + at_step(slots, t, K * H, B) + at_output, inside & valid[None, :], 0.0).to(tl.float32)
        if MODE == "RNN_TANH" or MODE == "RNN_RELU":
            state = tl.load(y + at_step(slots, t, K * H, B) + at_output, there, 0.0).to(tl.float32)
        else:
            at_gates = gates + step * (4 * H) + (row * (4 * H))[None, :] + unit[:, None]
            s_0 = tl.load(at_gates, there, 0.0).to(tl.float32)
            s_1 = tl.load(at_gates + H, there, 0.0).to(tl.float32)
            s_2 = tl.load(at_gates + 2 * H, there, 0.0).to(tl.float32)
            s_3 = tl.load(at_gates + 3 * H, there, 0.0).to(tl.float32)
        if MODE == "LSTM":
            here = tl.load(cells + step * H + at_row, there, 0.0)
            step_before = tl.where(reverse, step + B, step - B)
            first = tl.where(reverse, t == T - 1, t == 0)
            if slots is not None:
                step_before = row_of_step(slots, of_scan, tl.where(reverse, t + 1, t - 1), B)
                first = tl.where(reverse, t + 1 >= length, t == 0)[None, :]
            before = tl.where(first, c_first, tl.load(cells + step_before * H + at_row, there & (first == 0), 0.0))
            if resets is not None:
                anew = tl.load(resets + step + row, present, 0) != 0
                before = tl.where(anew[None, :], instead_c, before)
        if MODE == "GRU":
            before = tl.load(h_prev + step * H + at_row, there, 0.0).to(tl.float32)

        if STACKED:  # noqa: SIM102  (when compiled, the other at run time)
            if above:
                wait(counters + 1, (n + 1) * SLICES)
                at = _at(slots, t, own, K * row_length, length, B) + row_length
                d_y += product_of_parts(w_x, da, at, GH, UNITS, BATCH, PARTS, CHUNK, CHUNKS, AHEAD, PRECISION)
        d_h = around
        if n > 0:
            if SLICES > 1:
                wait(counters, n * SLICES)
            else:
                tl.debug_barrier()
            at = _at(slots, after, own, K * row_length, length, B)
            product = product_of_parts(w, db, at, GH, UNITS, BATCH, PARTS, CHUNK, CHUNKS, AHEAD, PRECISION)
            d_h += _there(product, slots, after, length)
            if resets is not None:
                cut = tl.load(resets + (k * T + after).to(tl.int64) * B + row, present, 0) != 0
                d_h, dh_initial = _cut(d_h, dh_initial, cut, TO_INITIAL)
                dc_next, dc_initial = _cut(dc_next, dc_initial, cut, TO_INITIAL)
        dh_t = d_h + d_y
        if MODE == "RNN_TANH":
            d_0, around = dh_t * (1.0 - state * state), nothing
        elif MODE == "RNN_RELU":
            d_0, around = tl.where(state > 0, dh_t, 0.0), nothing
        elif MODE == "LSTM":
            if dcells is not None:
                dc_next += tl.load(dcells + step * H + at_row, inside & valid[None, :], 0.0)
            tanh_c = tanh(here)
            dc_t = dc_next + dh_t * s_3 * (1.0 - tanh_c * tanh_c)
            d_0 = dc_t * s_2 * s_0 * (1.0 - s_0)
            d_1 = dc_t * before * s_1 * (1.0 - s_1)
            d_2 = dc_t * s_0 * (1.0 - s_2 * s_2)
            d_3 = dh_t * tanh_c * s_3 * (1.0 - s_3)
            dc_next, around = tl.where(valid[None, :], dc_t * s_1, dc_next), nothing
        else:
            d_2 = dh_t * (1.0 - s_1) * (1.0 - s_2 * s_2)
            d_0 = d_2 * s_3 * s_0 * (1.0 - s_0)
            d_1 = dh_t * (before - s_2) * s_1 * (1.0 - s_1)
            around = dh_t * s_1
        around = tl.where(valid[None, :], around, d_h)
        at_t = at_step(slots, t, K * row_length, B) + at_d
        tl.store(da + at_t, tl.where(valid[None, :], d_0, 0.0), there)
        if GATES > 1:
            tl.store(da + at_t + H, tl.where(valid[None, :], d_1, 0.0), there)
            tl.store(da + at_t + 2 * H, tl.where(valid[None, :], d_2, 0.0), there)
        if MODE == "LSTM":
            tl.store(da + at_t + 3 * H, tl.where(valid[None, :], d_3, 0.0), there)
        if MODE == "GRU":
            tl.store(db + at_t, tl.where(valid[None, :], d_0, 0.0), there)
            tl.store(db + at_t + H, tl.where(valid[None, :], d_1, 0.0), there)
            tl.store(db + at_t + 2 * H, tl.where(valid[None, :], d_2 * s_0, 0.0), there)
        if SLICES > 1 or STACKED:
            arrive(counters)
    if steps > 0:
        last = tl.where(reverse, steps - 1, 0)
        if SLICES > 1:
            wait(counters, steps * SLICES)
        else:
            tl.debug_barrier()
        at = _at(slots, last, own, K * row_length, length, B)
        product = product_of_parts(w, db, at, GH, UNITS, BATCH, PARTS, CHUNK, CHUNKS, AHEAD, PRECISION)
        around += _there(product, slots, last, length)
        if resets is not None:
            cut = tl.load(resets + (k * T + last).to(tl.int64) * B + row, present, 0) != 0
            around, dh_initial = _cut(around, dh_initial, cut, TO_INITIAL)
            dc_next, dc_initial = _cut(dc_next, dc_initial, cut, TO_INITIAL)
    tl.store(dh + at_state, around + dh_initial, inside)
    if MODE == "LSTM":
        tl.store(dc + at_state, dc_next + dc_initial, inside)
    if slots is not None:
        T = steps
    for n in range(0, T - steps):  # steps of no row here
        at_t = at_step(slots, steps + n, K * row_length, B) + at_d
        for block in tl.static_range(GATES):
            tl.store(da + at_t + block * H, nothing.to(da.dtype.element_ty), inside)
            if MODE == "GRU":
                tl.store(db + at_t + block * H, nothing.to(db.dtype.element_ty), inside)


def sequence_backward(
    mode: str,
    dy: Tensor | None,  # [N, K H]
    dcells: Tensor | None,  # [K, N, H] fp32, LSTM; not read behind lengths
    weights: Tensor,  # [K, GH, width]
    weights_x: Tensor | None,  # [K - 1, GH, width], W_ih of layers above the first, where K are layers
    y: Tensor | None,  # [N, K H], RNN
    h_prev: Tensor | None,  # [K, N, H], what each step started from; GRU
    gates: Tensor | None,  # [K, N, SH]
    cells: Tensor | None,  # [K, N, H] fp32
    c0: Tensor | None,  # [K, B, H] fp32
    lengths: Tensor | None,  # int64 [B]
    order: Tensor | None,  # int64 [B]
    slots: Tensor | None,  # int64 [T + 2] of packed rows, as in `sequence_forward`
    resets: Tensor | None,  # bool [K, T, B]
    to_initial: bool,
    reverse: bool,
    dh: Tensor,  # in and out [K, B, H] fp32: the gradient of h_n, then of h0
    dc: Tensor | None,  # in and out [K, B, H] fp32, LSTM
    da: Tensor,  # out [N, K, row], the gradient of the input product in the first GH of a row; zero behind lengths
    db: Tensor | None,  # out [N, K, row], of the hidden product where that is another; GRU
    units: int,
    parts: int,
    chunk: int,
    chunks: int,
    ahead: int,  # chunks of db on their way at once
    batch_tile: int,
    warps: int,
    registers: int,  # that the assembler is to take for a thread; 0 for as many as it likes
    resident: int,  # groups in one launch; of a stack whole ones
    precision: str,
) -> None:
    """A layer, or a stack of them. All tensors are contiguous; N rows are T steps of B, or packed ones."""
    K, B, H = dh.shape
    if dh.numel() == 0:
        return
    T = len(da) // B if slots is None else len(slots) - 2
    slices, tiles = triton.cdiv(H, units), triton.cdiv(B, batch_tile)
    together = slices > 1 or weights_x is not None
    counters = torch.zeros(K * tiles, dtype=torch.int32, device=dh.device) if together else None
    for first in range(0, K * tiles, resident):
        _backward_kernel[(min(resident, K * tiles - first) * slices,)](
            dy, dcells, weights, weights_x, y, h_prev, gates, cells, c0, lengths, order, slots, resets, dh, dc,
            da, da if db is None else db, counters, T, B, H, weights.shape[-1], da.shape[-1], first, MODE=mode, K=K,
            REVERSE=reverse, TO_INITIAL=to_initial, UNITS=units, PARTS=parts, CHUNK=chunk, CHUNKS=chunks, AHEAD=ahead,
            BATCH=batch_tile, SLICES=slices, PRECISION=precision, num_warps=warps, num_stages=1,
            maxnreg=registers or None, launch_cooperative_grid=together,
        )  # fmt: skip


__all__ = ["sequence_backward"]
