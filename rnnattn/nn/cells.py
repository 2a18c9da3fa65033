"""`LSTMCell`, `GRUCell` and `RNNCell`: torch.nn's cells over this package's kernels."""

from __future__ import annotations

from torch import Tensor, nn

from rnnattn import functional

States = tuple[Tensor, ...]  # h, or h and c


def _batched(
    cell: nn.RNNCellBase, kind: str, names: tuple[str, ...], input: Tensor, states: States | None
) -> tuple[Tensor, States]:
    """Input and states as [B, ...], zeros for states that are not given; checked with torch's messages
    (torch/nn/modules/rnn.py; aten/src/ATen/native/RNN.cpp, check_rnn_cell_forward_*).

    kind and names: what the messages call the cell and its states.
    """
    if input.dim() not in (1, 2):
        raise ValueError(f"{kind}: Expected input to be 1D or 2D, got {input.dim()}D instead")
    for name, state in zip(names, states or (), strict=False):
        if state.dim() not in (1, 2):
            raise ValueError(f"{kind}: Expected {name} to be 1D or 2D, got {state.dim()}D instead")
    x = input if input.dim() == 2 else input.unsqueeze(0)
    if states is None:
        states = (x.new_zeros(x.shape[0], cell.hidden_size),) * len(names)
    elif input.dim() == 1:
        states = tuple(state.unsqueeze(0) for state in states)
    if x.size(1) != cell.input_size:
        raise RuntimeError(f"input has inconsistent input_size: got {x.size(1)} expected {cell.input_size}")
    for n, state in enumerate(states):
        if state.size(0) != x.size(0):
            raise RuntimeError(f"Input batch size {x.size(0)} doesn't match hidden{n} batch size {state.size(0)}")
        if state.size(1) != cell.hidden_size:
            raise RuntimeError(
                f"hidden{n} has inconsistent hidden_size: got {state.size(1)}, expected {cell.hidden_size}"
            )
    return x, states


class LSTMCell(nn.RNNCellBase):
    """One step of an LSTM: `torch.nn.LSTMCell`.

    Constructor arguments (input_size, hidden_size, bias=True, device=None, dtype=None), parameters,
    `state_dict`, repr and errors are those of `torch.nn.LSTMCell`. Equation: `functional.lstm`.
    """

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
        if isinstance(hx, Tensor):
            raise TypeError("lstm_cell(): argument 'hx' (position 2) must be tuple of Tensors, not Tensor")
        if hx is not None and len(hx) != 2:
            raise RuntimeError("lstm_cell expects two hidden states")
        x, (h, c) = _batched(self, "LSTMCell", ("hx[0]", "hx[1]"), input, hx)
        h, c = functional.lstm_cell(x, (h, c), self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        return (h, c) if input.dim() == 2 else (h.squeeze(0), c.squeeze(0))


class GRUCell(nn.RNNCellBase):
    """One step of a GRU: `torch.nn.GRUCell`.

    Constructor arguments (input_size, hidden_size, bias=True, device=None, dtype=None), parameters,
    `state_dict`, repr and errors are those of `torch.nn.GRUCell`. Equation: `functional.gru`.
    """

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
        x, (h,) = _batched(self, "GRUCell", ("hidden",), input, None if hx is None else (hx,))
        h = functional.gru_cell(x, h, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        return h if input.dim() == 2 else h.squeeze(0)


class RNNCell(nn.RNNCellBase):
    """One step of a simple recurrent layer: `torch.nn.RNNCell`.

    Constructor arguments (input_size, hidden_size, bias=True, nonlinearity="tanh", device=None,
    dtype=None), parameters, `state_dict`, repr and errors are those of `torch.nn.RNNCell`. Equation:
    `functional.rnn`.
    """

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
        x, (h,) = _batched(self, "RNNCell", ("hidden",), input, None if hx is None else (hx,))
        if self.nonlinearity not in functional.NONLINEARITIES:
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        h = functional.rnn_cell(x, h, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, self.nonlinearity)
        return h if input.dim() == 2 else h.squeeze(0)
