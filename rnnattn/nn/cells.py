"""`LSTMCell`, `GRUCell` and `RNNCell`: torch.nn's cells over this package's kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rnnattn import functional
from rnnattn.nn.direct import DirectCalls
from rnnattn.nn.graphs import Swapped, as_node, is_symbolic

if TYPE_CHECKING:
    from rnnattn.nn.prepared import PreparedCell

States = tuple[Tensor, ...]  # h, or h and c


class _Cell(DirectCalls, Swapped, nn.RNNCellBase):
    """What the cells share. Messages are torch's (torch/nn/modules/rnn.py; aten/src/ATen/native/RNN.cpp,
    check_rnn_cell_forward_*)."""

    _states = 1
    _state = "hidden"  # as messages call the n-th
    _kind: str  # as messages call the cell

    @property
    def _mode(self) -> str:
        """A key of `reference.CELLS`."""
        return self._kind.removesuffix("Cell")

    def prepare_inference(self, precision: str = "float") -> PreparedCell:
        """A module for inference on a CPU, called as this one is, with a packed copy of the weights.

        It refuses to run once these weights have changed; `nn.prepared.PreparedCell` says more.

        Args:
            precision: "float", "bfloat16" or "int8", as for `LSTM.prepare_inference`.

        Raises:
            RuntimeError, TypeError, ValueError, BackendError: as `LSTM.prepare_inference`.
        """
        from rnnattn.nn.prepared import PreparedCell

        return PreparedCell(self, precision)

    def _step(self, x: Tensor, states: States) -> States:
        """The states after the step; all tensors are [B, ...] and have passed the checks of `_run_checked`."""
        raise NotImplementedError

    def _run(self, input: Tensor, hx: Any) -> Any:
        """What `forward` returns; hx as it takes it."""
        mode, own = self._mode, self._parameters  # among which a parametrized weight is not
        weights = [own.get(name) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if self.bias else 2]]
        results = self._call_directly(mode, input, hx, weights, 1, 0.0, self.bias, False, False, True)
        if results is not None:
            return results
        if is_symbolic(input, hx):
            return as_node(self, input, hx)
        results = self._run_checked(input, hx)
        self._remember(mode, input, self.hidden_size)
        return results

    def _run_checked(self, input: Tensor, hx: Any) -> Any:
        if input.dim() not in (1, 2):
            raise ValueError(f"{self._kind}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        hx = hx if hx is None or self._states == 2 else (hx,)
        for n, state in enumerate(() if hx is None else hx):
            if state.dim() not in (1, 2):
                name = self._state.format(n)
                raise ValueError(f"{self._kind}: Expected {name} to be 1D or 2D, got {state.dim()}D instead")
        x = input if input.dim() == 2 else input.unsqueeze(0)
        if hx is None:
            states = (x.new_zeros(x.shape[0], self.hidden_size, layout=torch.strided),) * self._states
        elif input.dim() == 1:
            states = tuple(hx[n].unsqueeze(0) for n in range(self._states))  # hx may be one tensor, then
        elif isinstance(hx, Tensor):
            raise TypeError("lstm_cell(): argument 'hx' (position 2) must be tuple of Tensors, not Tensor")
        elif len(hx) != self._states:
            raise RuntimeError("lstm_cell expects two hidden states")
        else:
            states = tuple(hx)
        if x.size(1) != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {x.size(1)} expected {self.input_size}")
        for n, state in enumerate(states):
            if state.size(0) != x.size(0):
                raise RuntimeError(f"Input batch size {x.size(0)} doesn't match hidden{n} batch size {state.size(0)}")
            if state.size(1) != self.hidden_size:
                raise RuntimeError(
                    f"hidden{n} has inconsistent hidden_size: got {state.size(1)}, expected {self.hidden_size}"
                )
        states = self._step(x, states)
        if input.dim() == 1:
            states = tuple(state.squeeze(0) for state in states)
        return states if len(states) == 2 else states[0]


class LSTMCell(_Cell):
    """One step of an LSTM: `torch.nn.LSTMCell`.

    Constructor arguments (input_size, hidden_size, bias=True, device=None, dtype=None), parameters,
    `state_dict`, repr and errors are those of `torch.nn.LSTMCell`. Equation: `functional.lstm`.
    """

    _states = 2
    _state = "hx[{}]"
    _kind = "LSTMCell"
    _torchs = nn.LSTMCell

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, device=None, dtype=None) -> None:  # type: ignore[no-untyped-def]
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Takes one step.

        Args:
            input: [B, I], or [I] unbatched.
            hx: (h, c), each [B, H], or [H] unbatched; zeros by default.

        Returns:
            (h', c'), shaped as hx.

        Raises:
            RuntimeError, ValueError, TypeError: as torch.nn.LSTMCell, or naming the argument.
        """
        states: tuple[Tensor, Tensor] = self._run(input, hx)
        return states

    def _step(self, x: Tensor, states: States) -> States:
        h, c = states
        return functional.lstm_cell(x, (h, c), self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)


class GRUCell(_Cell):
    """One step of a GRU: `torch.nn.GRUCell`.

    Constructor arguments (input_size, hidden_size, bias=True, device=None, dtype=None), parameters,
    `state_dict`, repr and errors are those of `torch.nn.GRUCell`. Equation: `functional.gru`.
    """

    _kind = "GRUCell"
    _torchs = nn.GRUCell

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, device=None, dtype=None) -> None:  # type: ignore[no-untyped-def]
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Takes one step.

        Args:
            input: [B, I], or [I] unbatched.
            hx: h [B, H], or [H] unbatched; zeros by default.

        Returns:
            h', shaped as hx.

        Raises:
            RuntimeError, ValueError: as torch.nn.GRUCell, or naming the argument.
        """
        state: Tensor = self._run(input, hx)
        return state

    def _step(self, x: Tensor, states: States) -> States:
        return (functional.gru_cell(x, states[0], self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh),)


class RNNCell(_Cell):
    """One step of a simple recurrent layer: `torch.nn.RNNCell`.

    Constructor arguments (input_size, hidden_size, bias=True, nonlinearity="tanh", device=None,
    dtype=None), parameters, `state_dict`, repr and errors are those of `torch.nn.RNNCell`. Equation:
    `functional.rnn`.
    """

    __constants__ = (*_Cell.__constants__, "nonlinearity")  # type: ignore[assignment]
    _kind = "RNNCell"
    _torchs = nn.RNNCell

    def __init__(  # type: ignore[no-untyped-def]
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Takes one step.

        Args:
            input: [B, I], or [I] unbatched.
            hx: h [B, H], or [H] unbatched; zeros by default.

        Returns:
            h', shaped as hx.

        Raises:
            RuntimeError: an unknown nonlinearity.
            RuntimeError, ValueError: as torch.nn.RNNCell, or naming the argument.
        """
        state: Tensor = self._run(input, hx)
        return state

    @property
    def _mode(self) -> str:
        known = self.nonlinearity in functional.NONLINEARITIES  # it may have been set since
        return f"RNN_{self.nonlinearity.upper()}" if known else "unknown"

    def _step(self, x: Tensor, states: States) -> States:
        if self.nonlinearity not in functional.NONLINEARITIES:
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        weights = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        return (functional.rnn_cell(x, states[0], *weights, self.nonlinearity),)
