"""`LSTMCell`: torch.nn.LSTMCell over this package's kernels."""

from __future__ import annotations

from torch import Tensor, nn

from rnnattn import functional


class LSTMCell(nn.RNNCellBase):
    """One step of an LSTM: `torch.nn.LSTMCell`.

    Constructor arguments (input_size, hidden_size, bias=True, device=None, dtype=None), parameters,
    `state_dict`, repr and errors are those of `torch.nn.LSTMCell`.
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
            RuntimeError, ValueError: as torch.nn.LSTMCell, or naming the argument.
        """
        if input.dim() not in (1, 2):
            raise ValueError(f"LSTMCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
        if isinstance(hx, Tensor):
            raise TypeError("lstm_cell(): argument 'hx' (position 2) must be tuple of Tensors, not Tensor")
        if hx is not None and len(hx) != 2:
            raise RuntimeError("lstm_cell expects two hidden states")
        for index, state in enumerate(hx or ()):
            if state.dim() not in (1, 2):
                raise ValueError(f"LSTMCell: Expected hx[{index}] to be 1D or 2D, got {state.dim()}D instead")
        batched = input.dim() == 2
        x = input if batched else input.unsqueeze(0)
        if hx is None:
            zeros = x.new_zeros(x.shape[0], self.hidden_size)
            hx = zeros, zeros
        elif not batched:
            hx = hx[0].unsqueeze(0), hx[1].unsqueeze(0)
        self._check(x, hx)
        h, c = functional.lstm_cell(x, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        return (h, c) if batched else (h.squeeze(0), c.squeeze(0))

    def _check(self, x: Tensor, hx: tuple[Tensor, Tensor]) -> None:
        """torch's messages for shapes (aten/src/ATen/native/RNN.cpp, check_rnn_cell_forward_*)."""
        if x.shape[1] != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {x.shape[1]} expected {self.input_size}")
        for index, state in enumerate(hx):
            if state.shape[0] != x.shape[0]:
                raise RuntimeError(
                    f"Input batch size {x.shape[0]} doesn't match hidden{index} batch size {state.shape[0]}"
                )
            if state.shape[1] != self.hidden_size:
                raise RuntimeError(
                    f"hidden{index} has inconsistent hidden_size: got {state.shape[1]}, expected {self.hidden_size}"
                )
