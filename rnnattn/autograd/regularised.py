"""The operation `rnnattn::regularised_scan`: one direction of a recurrent layer with zoneout, dropout and layer norm.

Shapes and equations: `rnnattn.reference.regularised`. The masks are arguments, drawn by whoever calls, so that
a seed gives the same numbers on every backend. What a mode does not have is an empty tensor here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rnnattn import backends
from rnnattn.autocast import as_forward
from rnnattn.autograd.batched import map_one_by_one, one_by_one
from rnnattn.autograd.eager import is_eager
from rnnattn.autograd.equations import first_gradients, second_gradients
from rnnattn.autograd.outputs import returned, watched
from rnnattn.reference import CELLS, regularised_scan_forward
from rnnattn.transforms import is_recorded, is_tracing, is_transformed, want_equations

_INPUTS = (
    "Tensor a, Tensor h0, Tensor? c0, Tensor w_hh, Tensor? b_hh, Tensor? norm_hh, Tensor? norm_c, Tensor? bias_c, "
    "Tensor? h_mask, Tensor? keep_h, Tensor? keep_c, float zoneout_h, float zoneout_c, Tensor? lengths, "
    "Tensor? resets, bool reset_to_initial, bool reverse, str mode"
)
_DIFFERENTIABLE = 8  # the first inputs
_WEIGHTS = slice(3, 8)  # of these
_NUMBER = 18  # of all

torch.library.define(
    "rnnattn::regularised_scan",
    f"({_INPUTS}, bool save, str backend) "
    "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor cells, Tensor gates, Tensor hidden, Tensor rstd)",
)
torch.library.define(
    "rnnattn::regularised_scan_backward",
    f"(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dcells, {_INPUTS}, Tensor y, Tensor cells, Tensor gates, "
    "Tensor hidden, Tensor rstd, bool needs_dweights, str backend) -> Tensor[]",
)


def _forward(*arguments):  # type: ignore[no-untyped-def]
    *inputs, save, backend = arguments
    return backends.get(backend).regularised_scan_forward(*inputs, save)


@torch.library.register_fake("rnnattn::regularised_scan")
def _forward_fake(*arguments):  # type: ignore[no-untyped-def]
    a, h0, _, _, _, norm_hh, *_, mode, save, backend = arguments
    T, B, GH = a.shape
    H, save, has_c = h0.shape[-1], save and backend != "reference", CELLS[mode].has_c
    saved = max(CELLS[mode].saved, 1)
    return (
        h0.new_empty(T, B, H),
        h0.new_empty(B, H),
        h0.new_empty((B, H) if has_c else 0),
        a.new_empty((T, B, H) if has_c else 0),
        h0.new_empty((T, B, saved * H) if save else 0),
        h0.new_empty((T, B, GH) if save and norm_hh is not None else 0),
        a.new_empty((T, B) if save and norm_hh is not None else 0),
    )


def _backward(*arguments):  # type: ignore[no-untyped-def]
    gradients = backends.get(arguments[-1]).regularised_scan_backward(*arguments[:-1])
    return [arguments[4].new_empty(0) if d is None else d for d in gradients]


@torch.library.register_fake("rnnattn::regularised_scan_backward")
def _backward_fake(*arguments):  # type: ignore[no-untyped-def]
    inputs, needs_dweights = list(arguments[4 : 4 + _DIFFERENTIABLE]), arguments[-2]
    if not needs_dweights:
        inputs[_WEIGHTS] = [None] * 5
    return [inputs[0].new_empty(0 if t is None else t.shape) for t in inputs]


torch.library.impl("rnnattn::regularised_scan", "CompositeExplicitAutograd", _forward)
torch.library.impl("rnnattn::regularised_scan_backward", "CompositeExplicitAutograd", _backward)
map_one_by_one("rnnattn::regularised_scan_backward")


class RegularisedScan(torch.autograd.Function):
    """forward(the inputs of the operator, backend)."""

    @staticmethod
    def forward(*arguments):  # type: ignore[no-untyped-def]
        run = _forward if is_eager(arguments[0]) else torch.ops.rnnattn.regularised_scan
        return run(*arguments[:-1], True, arguments[-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *inputs, backend = inputs  # type: ignore[assignment]
        has_c = CELLS[inputs[-1]].has_c
        ctx.mark_non_differentiable(*(output[4:] if has_c else output[2:]))
        ctx.set_materialize_grads(False)
        y, _, _, *saved = output
        tensors = [t for t in inputs if isinstance(t, Tensor)]
        ctx.save_for_backward(*tensors, watched(ctx, y, inputs[0]), *saved)
        ctx.settings = [None if isinstance(t, Tensor) else (t,) for t in inputs], backend

    @staticmethod
    @as_forward
    def backward(ctx: Any, dy, dh_n, dc_n, dcells, *_):  # type: ignore[no-untyped-def]
        return *_gradients(ctx, (dy, dh_n, dc_n, dcells)), None


def _gradients(ctx: Any, cotangents: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """One for each input of the operator."""
    given, backend = ctx.settings
    tensors = list(ctx.saved_tensors)
    inputs = [tensors.pop(0) if t is None else t[0] for t in given]
    leaves, settings = inputs[:_DIFFERENTIABLE], inputs[_DIFFERENTIABLE:]
    tensors[0] = returned(ctx, tensors[0], lambda: _forward(*inputs, False, backend)[0])
    needs: list[bool] = list(ctx.needs_input_grad[:_DIFFERENTIABLE])
    needs_dweights = any(needs[_WEIGHTS])
    gradients: Sequence[Tensor | None]
    if want_equations(*cotangents, *leaves) or (torch.is_grad_enabled() and backend == "reference"):
        gradients = first_gradients(_equations(settings), leaves, cotangents)
    else:
        run = ScanGradients.apply if torch.is_grad_enabled() else _run_backward
        gradients = run(*cotangents, *inputs, *tensors, needs_dweights, backend)
    wanted = [t is not None and need for t, need in zip(leaves, needs, strict=True)]
    return [*(d if want else None for d, want in zip(gradients, wanted, strict=True)), *[None] * len(settings)]


def _run_backward(*arguments):  # type: ignore[no-untyped-def]
    by_hand = all(is_eager(t) for t in (arguments[4], *arguments[:4]) if t is not None)
    run: Any = _backward if by_hand else torch.ops.rnnattn.regularised_scan_backward
    return run(*arguments)


def _equations(settings: list[Any]) -> Any:
    """The outputs of the reference that have cotangents, as a function of its differentiable inputs."""

    def forward(*values: Tensor | None) -> tuple[Tensor, ...]:
        return regularised_scan_forward(*values, *settings)  # type: ignore[arg-type]

    return forward


class ScanGradients(torch.autograd.Function):
    """`rnnattn::regularised_scan_backward` that can be differentiated, by the equations."""

    @staticmethod
    def forward(*arguments):  # type: ignore[no-untyped-def]
        return tuple(_run_backward(*arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        given = inputs[: 4 + _NUMBER]
        ctx.save_for_backward(*(t if isinstance(t, Tensor) else None for t in given))
        ctx.settings = [None if isinstance(t, Tensor) else t for t in given], inputs[-2]

    @staticmethod
    def backward(ctx: Any, *seconds):  # type: ignore[no-untyped-def]
        """y and what else was saved are functions of the other inputs here: no gradient is theirs."""
        settings, needs_dweights = ctx.settings
        given = [s if t is None else t for t, s in zip(ctx.saved_tensors, settings, strict=True)]
        leaves, asked = given[4 : 4 + _DIFFERENTIABLE], list(seconds)
        if not needs_dweights:
            asked[_WEIGHTS] = [None] * 5
        forward = _equations(given[4 + _DIFFERENTIABLE :])
        of_leaves, of_cotangents = second_gradients(forward, leaves, given[:4], asked)
        return *of_cotangents, *of_leaves, *[None] * (_NUMBER - _DIFFERENTIABLE + 7)

    vmap = staticmethod(one_by_one(lambda *arguments: ScanGradients.apply(*arguments)))


# The operator called directly (an exported graph, a compiled call) differentiates by the same rule.
def _setup_op_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *inputs, save, backend = inputs  # type: ignore[assignment]
    if not save:
        raise RuntimeError("rnnattn::regularised_scan: gradients need save=True, got save=False")
    RegularisedScan.setup_context(ctx, (*inputs, backend), output)


def _op_backward(ctx: Any, dy, dh_n, dc_n, dcells, *_):  # type: ignore[no-untyped-def]
    return *_gradients(ctx, (dy, dh_n, dc_n, dcells)), None, None


torch.library.register_autograd("rnnattn::regularised_scan", _op_backward, setup_context=_setup_op_context)


def regularised_scan(*arguments: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """y, h_n, c_n and cells; arguments: those of `rnnattn.reference.regularised_scan_forward`, then the backend."""
    *inputs, backend = arguments
    leaves, mode = inputs[:_DIFFERENTIABLE], inputs[-1]
    wants = torch.is_grad_enabled() and (is_transformed() or any(t is not None and t.requires_grad for t in leaves))
    if want_equations(*leaves):
        outputs = regularised_scan_forward(*inputs)
    elif wants and not is_recorded():
        outputs = RegularisedScan.apply(*inputs, backend)
    else:
        run = _forward if not wants and is_eager(leaves[0]) else torch.ops.rnnattn.regularised_scan
        outputs = run(*inputs, wants or is_tracing(), backend)  # a trace is for both, whatever is wanted now
    y, h_n, c_n, cells, *_ = outputs
    return (y, h_n, c_n, cells) if CELLS[mode].has_c else (y, h_n, None, None)
