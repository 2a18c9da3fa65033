"""The forward scan of a recurrent layer in one launch: W_hh stays in the programs, h_t travels.

A group of SLICES programs scans a tile of BATCH rows in one direction. Each owns UNITS hidden units with all their
gates, holds the rows of W_hh for them from the first step to the last, and their cell states. A step is

    gates^T [M, BATCH] = W [M, H] . h_{t-1}^T [H, BATCH] + what the input product gave,    M = UNITS x blocks of gates

(the weights to the left, so that 16 units give a tensor core its 64 rows), the cell on it (equations: step_forward),
and h_t into `states`, where the others of the group read it for the step after: behind a barrier of the group, or
where one program has all units without leaving the program. Nothing is written twice, so nobody waits to write.

Rows of W_hh and of `states` are `width` long, H made a multiple of 16, so that they are read 16 bytes at a time.
`states` holds y with a slot before and one behind it for the initial states: step t reads slot t, or t + 2 where
time runs backwards, or the initial slot where a row begins or an episode does.

The K of a launch are directions, or the layers of a stack (`weights_x`): a program then holds the rows of W_ih, too,
and multiplies y_t of the layer below when its group has arrived, while its own waits: T + K - 1 steps for K layers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rnnattn.kernels.grid_barrier import arrive, wait
from rnnattn.kernels.math import dot, sigmoid, tanh
from rnnattn.kernels.sequence_products import hold_rows, product
from rnnattn.kernels.sequence_rows import at_slot, at_step, before_scan, row_of_step, rows_of_tile


@triton.jit
def _inputs(gates_x, slots, n, steps, reverse, row_length, offsets, length, inside, B):
    """What the input product gave the n-th step, of the last one for those behind it."""
    n = tl.minimum(n, steps - 1)
    t = tl.maximum(tl.where(reverse, steps - 1 - n, n), 0)
    if slots is not None:
        inside = inside & (t < length)[None, :]
    return tl.load(gates_x + at_step(slots, t, row_length, B) + offsets, inside, 0.0)


@triton.jit
def _four(tile, UNITS: tl.constexpr, BATCH: tl.constexpr):
    """The blocks of a tile [4 UNITS, BATCH]."""
    even, odd = tl.split(tl.permute(tl.reshape(tile, (2, 2, UNITS, BATCH)), (2, 3, 0, 1)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit(do_not_specialize=["T", "B", "first_group"], do_not_specialize_on_alignment=["lengths", "slots"])
def _forward_kernel(
    gates_x,  # [N, K GH] fp32; of a stack [N, GH], the first layer's
    weights,  # [K, GH, width]
    weights_x,  # [K - 1, GH, width], W_ih of a stack's further layers, or None
    bias,  # [K, SH] fp32 (RNN: [K, H]), or None
    states,  # in and out [B + N + B, K, width]
    c0,  # [K, B, H] fp32, or None
    lengths,  # [B] int64, or None
    order,  # [B] int64, rows by falling length, or None
    slots,  # [T + 2] int64 of packed rows, or None
    resets,  # [K, T, B] bool, or None
    gates,  # out [K, N, SH], or None
    cells,  # out [K, N, H] fp32, or None
    h_n,  # out [K, B, H]
    c_n,  # out [K, B, H], or None
    counters,  # [tiles K] int32, zero, or None where nobody waits
    T,
    B,
    H,
    width,
    first_group,
    MODE: tl.constexpr,
    K: tl.constexpr,
    REVERSE: tl.constexpr,
    TO_INITIAL: tl.constexpr,
    UNITS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    AHEAD: tl.constexpr,
    APART: tl.constexpr,
    BATCH: tl.constexpr,
    SLICES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    BLOCKS: tl.constexpr = 1 if MODE == "RNN_TANH" or MODE == "RNN_RELU" else 4
    GATES: tl.constexpr = 3 if MODE == "GRU" else BLOCKS
    group = first_group + tl.program_id(0) // SLICES
    k, tile, first_unit = group % K, group // K, tl.program_id(0) % SLICES * UNITS
    STACKED: tl.constexpr = weights_x is not None
    K_X: tl.constexpr = 1 if STACKED else K  # that gates_x has
    reverse = REVERSE | (k == 1)
    if STACKED:
        reverse = k < 0

    row, present, length, steps = rows_of_tile(order, lengths, tile, T, B, BATCH)
    unit = first_unit + tl.arange(0, UNITS)
    inside = (unit < H)[:, None] & present[None, :]
    # Lines of the tile of gates. A GRU's are r, z, what r is multiplied by (hidden product and its bias) and what is
    # added to that (input product and its bias), so that one product and one sum serve all four.
    line = tl.arange(0, BLOCKS * UNITS)
    gate, line_unit = line // UNITS, first_unit + line % UNITS
    line_there = line_unit < H
    hidden, fed, saved = line_there, line_there, line_there
    of_input, of_saved = gate, gate
    if MODE == "GRU":
        hidden, fed, saved = line_there & (gate < 3), line_there & (gate != 2), line_there & (gate != 3)
        of_input, of_saved = tl.where(gate == 3, 2, gate), tl.where(gate == 2, 3, gate)
    column = gate * H + line_unit

    weights += k * GATES * H * width
    w = hold_rows(weights, column.to(tl.int64), hidden, width, CHUNK, CHUNKS)
    if STACKED:
        weights_x += (k - 1) * GATES * H * width
        line_x = (of_input * H + line_unit).to(tl.int64)
        w_x = hold_rows(weights_x, line_x, fed & (k > 0), width, CHUNK, CHUNKS)
    if bias is not None:
        bias_tile = tl.load(bias + k * BLOCKS * H + column, line_there, 0.0)[:, None]

    # Offsets in a step take 32 bits, steps 64.
    own = (row * K + k) * width
    first_slot = tl.where(reverse, T + 1, 0)
    of_scan = before_scan(slots, k, T, B)
    at_state = (row[None, :] + k * B) * H + unit[:, None]  # in [K, B, H]
    at_h = states + at_slot(slots, first_slot, K * width, B) + own[None, :] + unit[:, None]
    h = tl.load(at_h, inside, 0.0).to(tl.float32)  # of the own units, where a row has got
    c_first = tl.load(c0 + at_state, inside, 0.0) if MODE == "LSTM" else tl.zeros_like(h)
    c = c_first
    instead_h, instead_c = (h, c_first) if TO_INITIAL else (tl.zeros_like(h), tl.zeros_like(h))
    if counters is not None:
        counters += group

    at_input = ((row * K_X + k) * (GATES * H))[None, :] + (of_input * H + line_unit)[:, None]
    fed_there, saved_there = fed[:, None] & present[None, :], saved[:, None] & present[None, :]
    if STACKED:
        fed_there = fed_there & (k == 0)
    inputs = K_X * GATES * H
    a_next = _inputs(gates_x, slots, 0, steps, reverse, inputs, at_input, length, fed_there, B)
    for n in range(0, steps):
        t = tl.where(reverse, steps - 1 - n, n)
        step = row_of_step(slots, of_scan, t, B)  # in [K, N]
        a = a_next
        # Under way for a whole step.
        a_next = _inputs(gates_x, slots, n + 1, steps, reverse, inputs, at_input, length, fed_there, B)
        if bias is not None:
            a += bias_tile
        valid, stored, stored_gates = present, inside, saved_there
        if lengths is not None:
            valid = t < length
        if slots is not None:  # which have no other rows
            stored, stored_gates = inside & valid[None, :], saved_there & valid[None, :]
        started = h
        if resets is not None:
            anew = tl.load(resets + step + row, present, 0) != 0
            started = tl.where(anew[None, :], instead_h, h)
        if STACKED:  # noqa: SIM102  (when compiled, the other at run time)
            if k > 0:
                wait(counters - 1, (n + 1) * SLICES)
                at = at_slot(slots, t + 1, K * width, B) + own - width
                a += product(
                    w_x, states, at, None, width, BLOCKS * UNITS, BATCH, CHUNK, CHUNKS, AHEAD, APART, PRECISION
                )
        if SLICES == 1:
            b = tl.zeros((BLOCKS * UNITS, BATCH), tl.float32)
            b = dot(w[0], started.to(states.dtype.element_ty), b, PRECISION)
        else:
            before, readable = tl.where(reverse, t + 2, t), None
            # Backwards a row begins at its own last step.
            if lengths is not None and not STACKED and (REVERSE or K == 2):
                before = tl.where(reverse & (t + 1 >= length), first_slot, before)
            if resets is not None:
                if TO_INITIAL:
                    before = tl.where(anew, first_slot, before)
                else:
                    readable = anew == 0
            at = at_slot(slots, before, K * width, B) + own
            wait(counters, n * SLICES)
            b = product(w, states, at, readable, width, BLOCKS * UNITS, BATCH, CHUNK, CHUNKS, AHEAD, APART, PRECISION)
        # Functions of the gates where the product left them: split, they would be moved and computed several times.
        activated = a + b
        if MODE == "RNN_TANH":
            state = tanh(activated)
        elif MODE == "RNN_RELU":
            state = tl.where(activated < 0, 0.0, activated)  # keeps NaN
        elif MODE == "LSTM":
            activated = tl.where((gate == 2)[:, None], tanh(activated), sigmoid(activated))
            s_0, s_1, s_2, s_3 = _four(activated, UNITS, BATCH)
            c_started = c
            if resets is not None:
                c_started = tl.where(anew[None, :], instead_c, c)
            c_after = s_1 * c_started + s_0 * s_2
            state = s_3 * tanh(c_after)
            c = tl.where(valid[None, :], c_after, c)
        else:
            activated = tl.where((gate < 2)[:, None], sigmoid(activated), activated)
            s_0, s_1, s_3, a_n = _four(activated, UNITS, BATCH)
            s_2 = tanh(a_n + s_0 * s_3)
            state = (1.0 - s_1) * s_2 + s_1 * started
        state = state.to(states.dtype.element_ty)
        at_y = states + at_slot(slots, t + 1, K * width, B) + own[None, :] + unit[:, None]
        tl.store(at_y, tl.where(valid[None, :], state, 0.0), stored)
        if SLICES > 1 or STACKED:
            arrive(counters)
        h = tl.where(valid[None, :], state.to(tl.float32), h)
        if gates is not None:
            at_gates = gates + step * (4 * H) + (row * (4 * H))[None, :]
            values = tl.where(valid[None, :], activated, 0.0).to(gates.dtype.element_ty)
            tl.store(at_gates + (of_saved * H + line_unit)[:, None], values, stored_gates)
            if MODE == "GRU":
                tl.store(at_gates + 2 * H + unit[:, None], tl.where(valid[None, :], s_2, 0.0), stored)
        if cells is not None:
            tl.store(cells + step * H + (row * H)[None, :] + unit[:, None], c, stored)
    tl.store(h_n + at_state, h.to(h_n.dtype.element_ty), inside)
    if MODE == "LSTM":
        tl.store(c_n + at_state, c.to(c_n.dtype.element_ty), inside)
        c = tl.where(reverse, c_first, c)  # what rows have before they begin, or after they end
    if slots is not None:
        T = steps
    for n in range(0, T - steps):  # steps of no row here
        t = steps + n
        step = row_of_step(slots, of_scan, t, B)
        at_y = states + at_slot(slots, t + 1, K * width, B) + own[None, :] + unit[:, None]
        tl.store(at_y, tl.zeros((UNITS, BATCH), states.dtype.element_ty), inside)
        if gates is not None:
            at_gates = gates + step * (4 * H) + (row * (4 * H))[None, :] + column[:, None]
            nothing = tl.zeros((BLOCKS * UNITS, BATCH), gates.dtype.element_ty)
            tl.store(at_gates, nothing, line_there[:, None] & present[None, :])
        if cells is not None:
            tl.store(cells + step * H + (row * H)[None, :] + unit[:, None], c, inside)


def sequence_forward(
    mode: str,
    gates_x: Tensor,  # [N, K GH] fp32; of a stack [N, GH]
    weights: Tensor,  # [K, GH, width], zero behind the first H columns
    weights_x: Tensor | None,  # [K - 1, GH, width], likewise: W_ih of layers above the first, where K are layers
    bias: Tensor | None,  # [K, SH] fp32 (RNN: [K, H]); GRU: of r, of z, b_hn, b_in
    states: Tensor,  # [B + N + B, K, width], zero likewise; in: h0, forwards in the first slot, backwards in the last
    c0: Tensor | None,  # [K, B, H] fp32, LSTM
    lengths: Tensor | None,  # int64 [B]
    order: Tensor | None,  # int64 [B], with lengths: rows by falling length; packed ones are in that order
    slots: Tensor | None,  # int64 [T + 2] of packed rows: where those of each slot begin in states
    resets: Tensor | None,  # bool [K, T, B], what `scan_resets` says of each direction
    to_initial: bool,
    reverse: bool,  # of a lone direction
    gates: Tensor | None,  # out [K, N, SH]
    cells: Tensor | None,  # out [K, N, H] fp32
    h_n: Tensor,  # out [K, B, H]
    c_n: Tensor | None,  # out [K, B, H], LSTM
    units: int,
    chunk: int,
    chunks: int,
    ahead: int,  # chunks of h on their way at once
    apart: bool,  # whether their products are added up by themselves, as those of warp groups had better be
    batch_tile: int,
    warps: int,
    registers: int,  # that the assembler is to take for a thread; 0 for as many as it likes
    resident: int,  # groups in one launch; of a stack whole ones
    precision: str,
) -> None:
    """A layer, or a stack of them. All tensors are contiguous; N rows are T steps of B, or packed ones.

    At steps behind a row's length y and gates are zero, cells what the row has there, and its h_n and c_n those of its
    own end. Packed rows have no such steps, and no resets.
    """
    (K, B, H), width = h_n.shape, weights.shape[-1]
    if h_n.numel() == 0:
        return
    T = len(gates_x) // B if slots is None else len(slots) - 2
    slices, tiles = triton.cdiv(H, units), triton.cdiv(B, batch_tile)
    together = slices > 1 or weights_x is not None
    counters = torch.zeros(K * tiles, dtype=torch.int32, device=h_n.device) if together else None
    for first in range(0, K * tiles, resident):
        _forward_kernel[(min(resident, K * tiles - first) * slices,)](
            gates_x, weights, weights_x, bias, states, c0, lengths, order, slots, resets, gates, cells, h_n, c_n,
            counters, T, B, H, width, first, MODE=mode, K=K, REVERSE=reverse, TO_INITIAL=to_initial, UNITS=units,
            CHUNK=chunk, CHUNKS=chunks, AHEAD=ahead, APART=apart, BATCH=batch_tile, SLICES=slices, PRECISION=precision,
            num_warps=warps, num_stages=1, maxnreg=registers or None, launch_cooperative_grid=together,
        )  # fmt: skip


__all__ = ["sequence_forward"]
