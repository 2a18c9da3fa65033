"""`LSTM`: torch.nn.LSTM's constructor, state_dict, forward and errors, over this package's kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from rnnattn import functional

State = tuple[Tensor, Tensor]


class LSTM(nn.RNNBase):
    """A stack of LSTM layers: `torch.nn.LSTM`, plus `lengths`.

    Constructor arguments, parameters, `state_dict`, repr and errors are those of `torch.nn.LSTM`
    (input_size, hidden_size, num_layers=1, bias=True, batch_first=False, dropout=0.0,
    bidirectional=False, proj_size=0, device=None, dtype=None).

    Not an instance of nn.LSTM but of its base nn.RNNBase: torch.compile breaks its graph at
    instances of nn.LSTM, and compiles this module whole.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor | PackedSequence, State]:
        """Runs the stack.

        Args:
            input: [T, B, I], [B, T, I] with batch_first, [T, I] unbatched, or a PackedSequence.
            hx: (h_0 [L * K, B, R], c_0 [L * K, B, H]), without B where the input is unbatched;
                zeros by default.
            lengths: integers [B] on any device, each in [0, T]: row b ends after lengths[b] steps.
                Steps behind are not read and give zeros. Not with a PackedSequence.

        Returns:
            output (packed if the input was) with K * R features, and (h_n, c_n) shaped as hx.

        Raises:
            RuntimeError, ValueError, TypeError: as torch.nn.LSTM, or naming the argument.
        """
        self._update_flat_weights()
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError("LSTM: expected no lengths with a PackedSequence, which has its own")
            return self._forward_packed(input, hx)
        if input.dim() not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        if input.dim() == 2:
            return self._forward_unbatched(input, hx, lengths)
        if hx is not None:
            self._check_state_rank(hx, 3, "batched 3-D")
        hx = self._checked_state(input, hx)
        output, h_n, c_n = self._run(input, hx, self.batch_first, lengths)
        return output, (h_n, c_n)

    def _run(
        self, input: Tensor, hx: State, batch_first: bool, lengths: Tensor | Sequence[int] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if len(hx) != 2:
            raise RuntimeError("lstm expects two hidden states")
        weights: list[Tensor] = self._flat_weights  # type: ignore[assignment]
        return functional.lstm(
            input, hx, weights, self.bias, self.num_layers, self.dropout, self.training,
            self.bidirectional, batch_first, lengths,
        )  # fmt: skip

    def _forward_unbatched(
        self, input: Tensor, hx: State | None, lengths: Tensor | Sequence[int] | None
    ) -> tuple[Tensor, State]:
        if hx is not None:
            self._check_state_rank(hx, 2, "unbatched 2-D")
            hx = hx[0].unsqueeze(1), hx[1].unsqueeze(1)
        batch_dim = 0 if self.batch_first else 1
        input = input.unsqueeze(batch_dim)
        output, h_n, c_n = self._run(input, self._checked_state(input, hx), self.batch_first, lengths)
        return output.squeeze(batch_dim), (h_n.squeeze(1), c_n.squeeze(1))

    def _forward_packed(self, packed: PackedSequence, hx: State | None) -> tuple[PackedSequence, State]:
        """Runs in the packed order, so that only the caller's states change places."""
        data, batch_sizes, order, back = packed
        self.check_input(data, batch_sizes)
        if hx is not None and order is not None:
            hx = hx[0].index_select(1, order), hx[1].index_select(1, order)
        in_order = PackedSequence(data, batch_sizes, None, None)
        input, lengths = pad_packed_sequence(in_order)
        if hx is None:
            hx = self._zero_state(input, input.shape[1])
        else:
            self._check_state_shape(hx, data, batch_sizes)
        output, h_n, c_n = self._run(input, hx, False, lengths)
        output_data = pack_padded_sequence(output, lengths).data
        if back is not None:
            h_n, c_n = h_n.index_select(1, back), c_n.index_select(1, back)
        return PackedSequence(output_data, batch_sizes, order, back), (h_n, c_n)

    def _checked_state(self, input: Tensor, hx: State | None) -> State:
        self.check_input(input, None)
        if hx is None:
            return self._zero_state(input, input.shape[0 if self.batch_first else 1])
        self._check_state_shape(hx, input, None)
        return hx

    def _check_state_shape(self, hx: State, input: Tensor, batch_sizes: Tensor | None) -> None:
        layers, B, R = self.get_expected_hidden_size(input, batch_sizes)
        self.check_hidden_size(hx[0], (layers, B, R), "Expected hidden[0] size {}, got {}")
        self.check_hidden_size(hx[1], (layers, B, self.hidden_size), "Expected hidden[1] size {}, got {}")

    @staticmethod
    def _check_state_rank(hx: State, rank: int, kind: str) -> None:
        if hx[0].dim() != rank or hx[1].dim() != rank:
            raise RuntimeError(
                f"For {kind} input, hx and cx should also be {rank}-D "
                f"but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
            )

    def _zero_state(self, input: Tensor, B: int) -> State:
        layers = self.num_layers * (2 if self.bidirectional else 1)
        h0 = input.new_zeros(layers, B, self.proj_size or self.hidden_size)
        return h0, h0 if not self.proj_size else input.new_zeros(layers, B, self.hidden_size)
