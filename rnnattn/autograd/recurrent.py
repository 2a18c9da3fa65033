"""The operation `rnnattn::recurrent_layer`: one recurrent layer over a sequence, in one or both directions, or a stack
of layers (`rnnattn.reference.stack`).

Shapes and equations: `rnnattn.reference.recurrent`. The operator's contract is the whole layer, so that
a backend decides by itself where the input product goes and what one launch covers. What a mode does
not have (c_n, gates, cells, dc0) is an empty tensor here. Of backends that read packed sequences x may
be one, [N, I] with lengths that fall, best on the CPU: y, gates, cells and their gradients then have N in the place of
T, B.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rnnattn import backends
from rnnattn.autocast import as_forward
from rnnattn.autograd.batched import map_one_by_one, one_by_one
from rnnattn.autograd.eager import is_eager, is_last_use
from rnnattn.autograd.equations import first_gradients, second_gradients
from rnnattn.autograd.outputs import returned, watched
from rnnattn.packing import Packing
from rnnattn.reference import (
    CELLS,
    DIRECTIONS,
    STACK,
    accumulation_dtype,
    recurrent_layer_forward,
    split_weights,
    zero_invalid,
)
from rnnattn.transforms import is_recorded, is_tracing, is_transformed, want_equations

torch.library.define(
    "rnnattn::recurrent_layer",
    "(Tensor x, Tensor h0, Tensor? c0, Tensor[] weights, Tensor? lengths, Tensor? resets, "
    "bool reset_to_initial, bool has_biases, str direction, str mode, bool save, str backend) "
    "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)",
)
_BACKWARD = (
    "(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dcells, Tensor x, Tensor h0, Tensor? c0, Tensor[] weights, "
    "Tensor? lengths, Tensor? resets, bool reset_to_initial, Tensor y, Tensor gates, Tensor cells, "
    "bool has_biases, str direction, str mode, bool needs_dx, bool needs_dweights, str backend) "
    "-> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dweights)"
)
torch.library.define("rnnattn::recurrent_layer_backward", _BACKWARD)
torch.library.define("rnnattn::recurrent_layer_gradients", _BACKWARD)  # the same, whoever looks on


def _backend(name: str, x: Tensor) -> backends.Backend:
    backend = backends.get(name)
    if x.dim() != 3 and not (x.dim() == 2 and backend.reads_packed):
        raise RuntimeError(f"x: expected 3 dimensions [T, B, I] for backend {name}, got shape {list(x.shape)}")
    return backend


def _forward(  # type: ignore[no-untyped-def]
    x, h0, c0, weights, lengths, resets, reset_to_initial, has_biases, direction, mode, save, backend
):
    y, h_n, c_n, gates, cells = _backend(backend, x).recurrent_layer_forward(
        x, h0, c0, weights, lengths, resets, reset_to_initial, has_biases, direction, mode, save
    )
    cell = CELLS[mode]
    return (
        y,
        h_n,
        c_n,
        gates if save and cell.saved else x.new_empty(0),
        cells if save and cell.has_c else x.new_empty(0),
    )


@torch.library.register_fake("rnnattn::recurrent_layer")
def _forward_fake(  # type: ignore[no-untyped-def]
    x, h0, c0, weights, lengths, resets, reset_to_initial, has_biases, direction, mode, save, backend
):
    steps = x.shape[:-1]
    K, B, R = h0.shape
    cell, H = CELLS[mode], R if c0 is None else c0.shape[-1]
    return (
        x.new_empty(*steps, K * R),
        x.new_empty(K, B, R),
        x.new_empty((K, B, H) if cell.has_c else 0),
        x.new_empty((K, *steps, cell.saved * H) if save and cell.saved else 0),
        x.new_empty(K, *steps, H, dtype=accumulation_dtype(x.dtype)) if save and cell.has_c else x.new_empty(0),
    )


def _backward(  # type: ignore[no-untyped-def]
    dy, dh_n, dc_n, dcells, x, h0, c0, weights, lengths, resets, reset_to_initial, y, gates, cells, has_biases,
    direction, mode, needs_dx, needs_dweights, backend, overwrites_gates=False,
):  # fmt: skip
    """overwrites_gates: the backend may leave anything in them."""
    dx, dh0, dc0, dweights = _backend(backend, x).recurrent_layer_backward(
        dy, dh_n, dc_n, dcells, x, h0, c0, weights, lengths, resets, reset_to_initial, y, gates, cells, has_biases,
        direction, mode, needs_dx, needs_dweights, overwrites_gates,
    )  # fmt: skip
    return dx if needs_dx else x.new_empty(0), dh0, dc0, dweights if needs_dweights else []


@torch.library.register_fake("rnnattn::recurrent_layer_backward")
def _backward_fake(  # type: ignore[no-untyped-def]
    dy, dh_n, dc_n, dcells, x, h0, c0, weights, lengths, resets, reset_to_initial, y, gates, cells, has_biases,
    direction, mode, needs_dx, needs_dweights, backend,
):  # fmt: skip
    dweights = []
    if needs_dweights:
        for w in split_weights(weights, has_biases, h0.shape[0]):
            grown = [w.w_ih, w.w_hh, w.b_ih, None if CELLS[mode].shared else w.b_hh, w.w_hr]
            dweights += [x.new_empty(p.shape) for p in grown if p is not None]
    dx = x.new_empty(x.shape if needs_dx else 0)
    return dx, x.new_empty(h0.shape), x.new_empty(0 if c0 is None else c0.shape), dweights


torch.library.impl("rnnattn::recurrent_layer", "CompositeExplicitAutograd", _forward)
torch.library.impl("rnnattn::recurrent_layer_backward", "CompositeExplicitAutograd", _backward)


class RecurrentLayer(torch.autograd.Function):
    """forward(x, h0, c0, lengths, resets, reset_to_initial, has_biases, direction, mode, backend, *weights)."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        x, h0, c0, lengths, resets, reset_to_initial, has_biases, direction, mode, backend, *weights
    ):
        run = _forward if is_eager(x) else torch.ops.rnnattn.recurrent_layer
        return run(
            x, h0, c0, list(weights), lengths, resets, reset_to_initial, has_biases, direction, mode, True, backend
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, h0, c0, lengths, resets, reset_to_initial, has_biases, direction, mode, backend, *weights = inputs
        y, _, c_n, gates, cells = output
        if c0 is None:
            ctx.mark_non_differentiable(c_n, gates, cells)
        else:
            ctx.mark_non_differentiable(gates)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, h0, c0, lengths, resets, watched(ctx, y, x), gates, cells, *weights)
        ctx.settings = reset_to_initial, has_biases, direction, mode, backend

    @staticmethod
    @as_forward
    def backward(ctx: Any, dy, dh_n, dc_n, _dgates, dcells):  # type: ignore[no-untyped-def]
        needs = ctx.needs_input_grad
        gradients = _gradients(ctx, (dy, dh_n, dc_n, dcells), needs[0], any(needs[10:]), own_gates=True)
        return *gradients[:3], *[None] * 7, *gradients[3]


def _differentiable_backward(*arguments, own_gates=False):  # type: ignore[no-untyped-def]
    """What `rnnattn::recurrent_layer_backward` gives, so that whoever looks on can differentiate or map it."""
    cotangents, inputs = arguments[:4], arguments[4:]
    (x, h0, c0, weights, lengths, resets, reset_to_initial, _, _, _, has_biases, direction, mode, _, needs_dweights,
     _) = inputs  # fmt: skip
    if want_equations(*cotangents, x, h0, c0, *weights):
        forward = _equations(lengths, resets, reset_to_initial, has_biases, direction, mode)
        dx, dh0, dc0, *dweights = first_gradients(forward, (x, h0, c0, *weights), cotangents)
        own = [dweights[n] for n in _own(len(weights), has_biases, direction, mode)]
        return dx, dh0, x.new_empty(0) if dc0 is None else dc0, own if needs_dweights else []
    if torch.is_grad_enabled() and is_transformed():
        dx, dh0, dc0, *dweights = LayerGradients.apply(*arguments[:7], *arguments[8:], *weights)
        return dx, dh0, dc0, dweights
    # A gradient that is itself to be differentiated is the operator's, of which autograd knows the gradient.
    if not torch.is_grad_enabled() and all(is_eager(t) for t in (x, *cotangents) if t is not None):
        return _backward(*arguments, overwrites_gates=own_gates and is_last_use())  # type: ignore[misc]
    return torch.ops.rnnattn.recurrent_layer_backward(*arguments)


def _equations(lengths: Tensor | None, *settings: Any) -> Any:
    """The outputs of the reference that have cotangents, as a function of its differentiable inputs."""

    def padded(x: Tensor, lengths: Tensor | None, h0: Tensor, c0: Tensor | None, weights: Any) -> tuple[Tensor, ...]:
        y, h_n, c_n, _, cells = recurrent_layer_forward(x, h0, c0, list(weights), lengths, *settings)
        return y, h_n, c_n, cells if c0 is None else zero_invalid(cells, lengths)

    def forward(x: Tensor, h0: Tensor, c0: Tensor | None, *weights: Tensor) -> tuple[Tensor, ...]:
        if x.dim() == 3:
            return padded(x, lengths, h0, c0, weights)
        assert lengths is not None
        packing = Packing.of_lengths(lengths, len(x))
        y, h_n, c_n, cells = padded(packing.padded(x), lengths.to(x.device), h0, c0, weights)
        if c0 is not None:
            cells = packing.packed(cells.movedim(0, 2)).movedim(1, 0)
        return packing.packed(y), h_n, c_n, cells

    return forward


def _own(weights: int, has_biases: bool, direction: str, mode: str) -> list[int]:
    """Those of a layer's weights that have a gradient of their own: b_hh's is b_ih's where the cell shares it."""
    least = 4 if has_biases else 2
    each = least if direction == STACK else weights // len(DIRECTIONS[direction])
    return [n for n in range(weights) if not (has_biases and CELLS[mode].shared and n % each == 3)]


def of_each_weight(own: list[Tensor], weights: int, has_biases: bool, direction: str, mode: str) -> list[Tensor | None]:
    """A gradient for each of a layer's weights: b_ih's and b_hh's may be the same numbers, each its own to write to."""
    found = dict(zip(_own(weights, has_biases, direction, mode), own, strict=True))
    return [found[n] if n in found else found[n - 1].clone() for n in range(weights)]


def _gradients(  # type: ignore[no-untyped-def]
    ctx: Any, cotangents, needs_dx: bool, needs_dweights: bool, own_gates: bool = False
) -> tuple[Tensor | None, Tensor, Tensor | None, list[Tensor | None]]:
    """dx, dh0, dc0 and one gradient per weight. own_gates: nobody has `gates` but this graph."""
    x, h0, c0, lengths, resets, y, gates, cells, *weights = ctx.saved_tensors
    reset_to_initial, has_biases, direction, mode, backend = ctx.settings
    inputs = x, h0, c0, weights, lengths, resets, reset_to_initial
    y = returned(ctx, y, lambda: _forward(*inputs, has_biases, direction, mode, False, backend)[0])
    arguments = (
        *cotangents, *inputs, y, gates, cells, has_biases, direction, mode, needs_dx, needs_dweights, backend,
    )  # fmt: skip
    dx, dh0, dc0, dweights = _differentiable_backward(*arguments, own_gates=own_gates)
    dx, dc0 = dx if needs_dx else None, None if c0 is None else dc0
    if not needs_dweights:
        return dx, dh0, dc0, [None] * len(weights)
    return dx, dh0, dc0, of_each_weight(dweights, len(weights), has_biases, direction, mode)


# The operators called directly (an exported graph, opcheck) differentiate by the same rule.
def _setup_op_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, h0, c0, weights, *rest, save, backend = inputs
    if not save:
        raise RuntimeError("rnnattn::recurrent_layer: gradients need save=True, got save=False")
    RecurrentLayer.setup_context(ctx, (x, h0, c0, *rest, backend, *weights), output)


def _op_backward(ctx: Any, dy, dh_n, dc_n, _dgates, dcells):  # type: ignore[no-untyped-def]
    needs = ctx.needs_input_grad
    dx, dh0, dc0, dweights = _gradients(ctx, (dy, dh_n, dc_n, dcells), needs[0], any(needs[3]))
    return dx, dh0, dc0, dweights, *[None] * 8


def _setup_backward_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    *cotangents, x, h0, c0, weights, lengths, resets, reset_to_initial = inputs[:11]
    settings = inputs[14:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*cotangents, lengths, resets, x, h0, c0, *weights)
    ctx.settings = reset_to_initial, *settings[:5]


def _double_backward(ctx: Any, ddx, ddh0, ddc0, ddweights):  # type: ignore[no-untyped-def]
    """y, gates and cells are functions of the other inputs here: no gradient is theirs."""
    dy, dh_n, dc_n, dcells, lengths, resets, *inputs = ctx.saved_tensors
    reset_to_initial, has_biases, direction, mode, needs_dx, needs_dweights = ctx.settings
    seconds: list[Tensor | None] = [ddx if needs_dx else None, ddh0, None if inputs[2] is None else ddc0]
    seconds += [None] * len(inputs[3:])
    if needs_dweights:
        for n, dd in zip(_own(len(inputs[3:]), has_biases, direction, mode), ddweights, strict=True):
            seconds[3 + n] = dd
    forward = _equations(lengths, resets, reset_to_initial, has_biases, direction, mode)
    (dx, dh0, dc0, *dweights), of_cotangents = second_gradients(forward, inputs, (dy, dh_n, dc_n, dcells), seconds)
    return *of_cotangents, dx, dh0, dc0, dweights, *[None] * 12


map_one_by_one("rnnattn::recurrent_layer_backward")
for _key in ("CompositeImplicitAutograd", "Batched", "FuncTorchBatched"):
    torch.library.impl("rnnattn::recurrent_layer_gradients", _key, _differentiable_backward)


class LayerGradients(torch.autograd.Function):
    """`rnnattn::recurrent_layer_backward` with its weights last, for `torch.func`, which asks operators for no
    gradient."""

    @staticmethod
    def forward(*arguments):  # type: ignore[no-untyped-def]
        dx, dh0, dc0, dweights = torch.ops.rnnattn.recurrent_layer_backward(
            *arguments[:7], list(arguments[19:]), *arguments[7:19]
        )
        return dx, dh0, dc0, *dweights

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _setup_backward_context(ctx, (*inputs[:7], inputs[19:], *inputs[7:19]), output)

    @staticmethod
    def backward(ctx: Any, ddx, ddh0, ddc0, *ddweights):  # type: ignore[no-untyped-def]
        *gradients, dweights = _double_backward(ctx, ddx, ddh0, ddc0, ddweights)[:8]
        return *gradients, *[None] * 12, *dweights

    vmap = staticmethod(one_by_one(lambda *arguments: LayerGradients.apply(*arguments)))


torch.library.register_autograd("rnnattn::recurrent_layer", _op_backward, setup_context=_setup_op_context)
torch.library.register_autograd(
    "rnnattn::recurrent_layer_backward", _double_backward, setup_context=_setup_backward_context
)


def recurrent_layer(
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
    with_cells: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """y, h_n, c_n and, where they are wanted, cells of one layer; see `rnnattn.reference.recurrent_layer_forward` for
    the shapes. At steps behind a row's length nothing is to be read in cells, and no gradient goes there."""
    states = (h0,) if c0 is None else (h0, c0)
    cells: Tensor | None
    wants = torch.is_grad_enabled() and (is_transformed() or any(t.requires_grad for t in (x, *states, *weights)))
    if want_equations(x, *states, *weights):
        y, h_n, c_n, _, cells = recurrent_layer_forward(
            x, h0, c0, weights, lengths, resets, reset_to_initial, has_biases, direction, mode
        )
    elif wants and not is_recorded():  # torch.compile goes wrong with Functions inside of torch.func
        y, h_n, c_n, _, cells = RecurrentLayer.apply(
            x, h0, c0, lengths, resets, reset_to_initial, has_biases, direction, mode, backend, *weights
        )
    elif is_eager(x):
        run = backends.get(backend).recurrent_layer_forward
        y, h_n, c_n, _, cells = run(
            x, h0, c0, weights, lengths, resets, reset_to_initial, has_biases, direction, mode, with_cells
        )
    else:
        save = wants or with_cells or is_tracing()  # a trace is for both, whatever is wanted now
        y, h_n, c_n, _, cells = torch.ops.rnnattn.recurrent_layer(
            x, h0, c0, weights, lengths, resets, reset_to_initial, has_biases, direction, mode, save, backend
        )
    return y, h_n, None if c0 is None else c_n, cells if with_cells else None
