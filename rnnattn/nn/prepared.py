"""What `prepare_inference()` returns: a recurrent module for inference on a CPU, its weights packed once.

One step takes tens of microseconds, so that single ones count in Python: arguments that can be taken as they
are go straight to the kernels (csrc/prepared_call.cpp), the others through the checks and rearrangements of the
module itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rnnattn._version import __version__
from rnnattn.backends.cpp import build_info, native, prepared_call
from rnnattn.checks import check_recurrent, checked_resets, checked_steps
from rnnattn.nn.cells import _Cell
from rnnattn.nn.direct import states_of
from rnnattn.nn.recurrent import Lengths, States, _Recurrent
from rnnattn.nn.regularised import DROPOUTS
from rnnattn.nn.weight_watch import WeightWatch
from rnnattn.packing import Packing
from rnnattn.reference import CELLS
from rnnattn.stack import op_name
from rnnattn.transforms import want_equations, wants_grad

Outputs = tuple[Tensor, Tensor, Tensor | None]  # y, h_n, c_n

PRECISIONS = ("float", "bfloat16", "int8")


class _PackedWeights:
    """The weights of a stack in the order in which the operator reads them."""

    def __init__(
        self, weights: list[Tensor], has_biases: bool, layers: int, bidirectional: bool, mode: str, precision: str,
        batch_first: bool, is_cell: bool,
    ) -> None:  # fmt: skip
        dtype, G = weights[0].dtype, CELLS[mode].blocks
        if precision not in PRECISIONS:
            raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
        if precision != "float" and dtype == torch.float64:
            raise ValueError(f"precision: expected 'float' for float64 weights, got {precision!r}")
        packed = native().prepare_weights(weights, has_biases, layers, bidirectional, mode, precision)
        K, H, R = 2 if bidirectional else 1, weights[0].shape[0] // G, weights[1].shape[1]
        self.rest = packed, bidirectional, mode, H  # of the operator's arguments
        self._of_call = weights[0].shape[1], (layers * K, R, H), batch_first, is_cell
        self.shapes = [torch.zeros((), dtype=dtype).expand(w.shape) for w in weights]  # for checks: one number each
        self._settings = op_name(mode), G, has_biases, layers, K
        self._load()

    def _load(self) -> None:
        packed, bidirectional, mode, _ = self.rest
        self._operator = native().prepared_forward.default
        # (input, h, c) to what the module returns; to None where `run` has to check something first.
        self.call = prepared_call(packed, bidirectional, mode, self.shapes[0], *self._of_call)

    def run(
        self, x: Tensor, h0: Tensor, c0: Tensor | None, lengths: Lengths | Packing = None,
        resets: Tensor | None = None, reset_to_initial: bool = False,
    ) -> Outputs:  # fmt: skip
        """y, h_n and c_n after the checks of `functional.lstm`, and one for gradients; x is [T, B, I] or packed, resets
        has passed its own and is [T, B]."""
        op, G, has_biases, layers, K = self._settings
        if wants_grad(x, h0, c0):
            raise RuntimeError(
                f"{op}: a module from prepare_inference() has no gradients, but an input requires grad; call it "
                "under torch.inference_mode() or torch.no_grad(), or detach the input"
            )
        if want_equations(x, h0, c0):
            raise RuntimeError(
                f"{op}: a module from prepare_inference() has no tangents and is not to be mapped; call the module "
                "that it was prepared from"
            )
        _, B, lengths = checked_steps(op, x, lengths)
        check_recurrent(op, G, x, B, h0, c0, self.shapes, has_biases, layers, K)
        y, h_n, c_n = self._operator(x, h0, c0, lengths, resets, reset_to_initial, *self.rest)
        return y, h_n, None if c0 is None else c_n

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_operator", "call")
        return {name: value for name, value in self.__dict__.items() if name not in left_out} | {"layout": _layout()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if (layout := state.pop("layout")) != _layout():
            raise RuntimeError(
                f"prepared weights: expected the layout of {_layout()}, got one of {layout}; pickle the module instead "
                "and call its prepare_inference() here"
            )
        self.__dict__.update(state)
        self._load()


def _layout() -> str:
    """What the order of packed weights depends on."""
    native()
    return f"rnnattn {__version__} on {build_info()['isa']}"


class _Prepared(nn.Module):
    """What the prepared modules share. Without parameters and buffers: state_dict() is empty."""

    input_size: int
    hidden_size: int

    def __init__(
        self, module: nn.Module, names: list[str], mode: str, layers: int, bidirectional: bool, precision: str,
        batch_first: bool, is_cell: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        for name in module.__constants__:  # type: ignore[union-attr]  # input_size, hidden_size, ...
            setattr(self, name, getattr(module, name))
        weights = [_weight(module, name) for name in names]
        self.precision = precision
        self._dtype = weights[0].dtype
        self._has_c = CELLS[mode].has_c
        self._description = f"{type(module).__name__}({module.extra_repr()})"
        self._watch = WeightWatch(module, names)
        self._weights = _PackedWeights(
            weights, bool(module.bias), layers, bidirectional, mode, precision, batch_first, is_cell
        )
        super().train(False)

    def train(self, mode: bool = True) -> Any:
        """Raises RuntimeError where mode is True."""
        if mode:
            raise RuntimeError(f"{type(self).__name__}: cannot train; train the module that it was prepared from")
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """What to(), half(), cuda() and the like call: only for what they leave as it is."""
        moved = fn(torch.empty(0, dtype=self._dtype))
        if moved.dtype != self._dtype or moved.device.type != "cpu":
            raise RuntimeError(
                f"{type(self).__name__}: expected to stay in {self._dtype} on cpu, got {moved.dtype} on "
                f"{moved.device}; convert the module that it was prepared from and call prepare_inference() again"
            )
        return self

    def extra_repr(self) -> str:
        return f"{self._description}, precision={self.precision}"


def _weight(module: nn.Module, name: str) -> Tensor:
    p = module._parameters.get(name)
    if p is None:
        raise TypeError(
            f"prepare_inference: expected {name} to be a parameter of the module, but it is computed from others (by "
            "a parametrization or a hook); torch.nn.utils.parametrize.remove_parametrizations makes it one"
        )
    if p.device.type != "cpu":
        raise RuntimeError(f"prepare_inference: expected the weights on cpu, got {name} on {p.device}")
    return p.detach()


class _StackArguments(_Recurrent):
    """The module's own checks and rearrangements of arguments, around packed weights."""

    def __init__(self, module: _Recurrent, weights: _PackedWeights) -> None:
        nn.Module.__init__(self)
        for name in ("_names", "_kind", "_suffix", *module.__constants__):
            setattr(self, name, getattr(module, name))
        self._weights = weights
        self._flat_weights = weights.shapes  # type: ignore[assignment]

    def __getstate__(self) -> dict[str, Any]:  # nn.RNNBase's looks for parameters
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def _update_flat_weights(self) -> None:
        pass

    def _stack(
        self, input: Tensor, h0: Tensor, c0: Tensor | None, batch_first: bool, lengths: Lengths | Packing,
        resets: Tensor | None, reset_to_initial: bool, return_cells: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, None]:  # fmt: skip
        x = input.transpose(0, 1) if batch_first else input
        resets = checked_resets(resets, input, batch_first)
        y, h_n, c_n = self._weights.run(x, h0, c0, lengths, resets, reset_to_initial)
        return y.transpose(0, 1) if batch_first else y, h_n, c_n, None


class _CellArguments(_Cell):
    """The same for a cell."""

    def __init__(self, cell: _Cell, weights: _PackedWeights) -> None:
        nn.Module.__init__(self)
        for name in ("_states", "_state", "_kind", *cell.__constants__):
            setattr(self, name, getattr(cell, name))
        self._weights = weights

    def _step(self, x: Tensor, states: States) -> States:
        h0, c0 = states if len(states) == 2 else (states[0], None)
        _, h, c = self._weights.run(x[None], h0[None], None if c0 is None else c0[None])
        return (h[0],) if c is None else (h[0], c[0])


class PreparedRecurrent(_Prepared):
    """The module for inference on a CPU alone, as `prepare_inference` of LSTM, GRU and RNN returns it.

    It is called as the module is, and returns what the module returns in evaluation mode, up to the
    rounding of the matrices to `precision`:

        float      as they are (16-bit ones as fp32, but bf16 where the processor multiplies it)
        bfloat16   w (1 + e), |e| <= 2^-8; half the memory of fp32
        int8       w + e, |e| <= max |row| / 254: a scale for each row of w_ih and w_hh; a quarter

    Biases and projections are not rounded, and the arithmetic is that of the module (fp32 for 16 and 32
    bits). Against float64 over 100 steps with H = 256, an LSTM's or a GRU's outputs have a relative L2
    error of about 0.2 % in bfloat16 and 0.4 % in int8 with weights as they are initialised, and of 0.3 %
    and 0.9 % with matrices four times as large; it stops growing after some ten steps.

    Changes of the module's weights are not followed, they make every later call raise: see
    `WeightWatch`, which costs a call a few microseconds. Once the module is gone, nothing is watched. The
    same holds of a copy by copy.deepcopy; one that was pickled (for the same instruction set and version)
    watches nothing. There are no parameters, and state_dict() is empty. torch.autocast and `use_backend`
    have no effect; torch.compile breaks its graph here.

    Raises (and `LSTM.prepare_inference`):
        RuntimeError: to(), half() and the like to another dtype or device; train(True).
    """

    _arguments: _StackArguments

    def __init__(self, module: _Recurrent, precision: str = "float") -> None:
        if module.training and any((module.dropout, *(getattr(module, name) for name in DROPOUTS))):
            raise RuntimeError(
                "prepare_inference: expected evaluation mode, as the module has dropout, got training mode; "
                "call eval() first"
            )
        if module._regularisation() is not None:
            raise ValueError("prepare_inference: expected a module without zoneout and layer_norm")
        names: list[str] = module._flat_weights_names
        super().__init__(
            module, names, module.mode, module.num_layers, module.bidirectional, precision, module.batch_first, False
        )
        self.__dict__["_arguments"] = _StackArguments(module, self._weights)  # not as a submodule

    def forward(
        self, input: Tensor | PackedSequence, hx: Any = None, lengths: Lengths = None, resets: Tensor | None = None,
        reset_to_initial: bool = False,
    ) -> Any:  # fmt: skip
        """Runs the stack: arguments (but return_cells), results and errors are those of the module's `forward`.

        Raises:
            RuntimeError: the module's weights have changed; or grad mode is on and an input requires grad.
        """
        self._watch.check()
        if lengths is None and resets is None:
            results = self._weights.call(input, *states_of(hx, self._has_c))
            if results is not None:
                return results
        hx = hx if self._has_c or hx is None else (hx,)
        (output,), states = self._arguments._run_checked(input, hx, lengths, resets, reset_to_initial)
        return output, states if self._has_c else states[0]


class PreparedCell(_Prepared):
    """The cell for inference on a CPU alone, as `prepare_inference` of LSTMCell, GRUCell and RNNCell returns
    it; what `PreparedRecurrent` says holds."""

    _arguments: _CellArguments

    def __init__(self, cell: _Cell, precision: str = "float") -> None:
        names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if cell.bias else [])]
        super().__init__(cell, names, cell._mode, 1, False, precision, False, True)
        self.__dict__["_arguments"] = _CellArguments(cell, self._weights)  # not as a submodule

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Takes one step: arguments, results and errors are those of the cell's `forward`.

        Raises:
            RuntimeError: the cell's weights have changed; or grad mode is on and an input requires grad.
        """
        self._watch.check()
        results = self._weights.call(input, *states_of(hx, self._has_c))
        return self._arguments._run_checked(input, hx) if results is None else results


# A compiled model calls them uncompiled: the watch looks at memory. What torch.compiler.disable sets;
# calling that would import Dynamo, which takes seconds.
PreparedRecurrent.forward._torchdynamo_disable = True  # type: ignore[attr-defined]
PreparedCell.forward._torchdynamo_disable = True  # type: ignore[attr-defined]
