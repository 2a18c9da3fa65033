"""`LSTM`, `GRU` and `RNN`: torch.nn's constructors, state_dict, forward and errors, over this package's kernels.

Not instances of nn.LSTM, nn.GRU and nn.RNN but of their base nn.RNNBase: torch.compile breaks its graph
at instances of the former, and compiles these modules whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rnnattn.checks import check_recompute, check_states, checked_resets, checked_steps
from rnnattn.functional import NONLINEARITIES
from rnnattn.nn.direct import DirectCalls
from rnnattn.nn.graphs import as_node, is_symbolic
from rnnattn.nn.layouts import run_nested, run_packed
from rnnattn.nn.regularised import Regularised
from rnnattn.packing import Packing
from rnnattn.stack import run_stack
from rnnattn.transforms import is_recorded

if TYPE_CHECKING:
    from rnnattn.nn.prepared import PreparedRecurrent

States = tuple[Tensor, ...]  # h, or h and c
Lengths = Tensor | Sequence[int] | None


class _Recurrent(DirectCalls, Regularised):
    """What the modules share. Messages are torch's, which differ between the three."""

    _names: tuple[str, ...] = ("hx",)  # of the states
    _kind: str  # as messages call the module
    _suffix = ""

    def __init__(self, mode: str, *args: Any, recompute: str | None = None, **kwargs: Any) -> None:
        check_recompute(recompute)
        super().__init__(mode, *args, recompute=recompute, **kwargs)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.recompute is None else f", recompute={self.recompute}")

    def prepare_inference(self, precision: str = "float") -> PreparedRecurrent:
        """A module for inference on a CPU, called as this one is, with a packed copy of the weights.

        It refuses to run once these weights have changed; `nn.prepared.PreparedRecurrent` says more.

        Args:
            precision: how the copy holds the matrices: "float" as they are, "bfloat16", or "int8" with a
                scale for each row. The arithmetic is in fp32 (float64 for float64 weights).

        Raises:
            RuntimeError: the module is in training mode with dropout; weights that are not on the CPU.
            TypeError: a weight that is not a parameter of the module (a parametrization or a hook makes it).
            ValueError: an unknown precision, or one other than "float" for float64 weights; zoneout or layer_norm.
            BackendError: backend cpp cannot run on this machine.
        """
        from rnnattn.nn.prepared import PreparedRecurrent

        return PreparedRecurrent(self, precision)

    def _run(
        self, input: Tensor | PackedSequence, hx: Any, lengths: Lengths, resets: Tensor | None, reset_to_initial: bool,
        return_cells: bool = False,
    ) -> Any:  # fmt: skip
        """What `forward` returns; hx as it takes it."""
        self._update_flat_weights()
        may_be_direct = self._may_be_direct(resets, return_cells)
        if may_be_direct and lengths is None and type(input) is not PackedSequence:
            results = self._directly(input, hx, self.batch_first)
            if results is not None:
                return results
        if is_symbolic(input, hx):
            return as_node(
                self, input, hx, lengths=lengths, resets=resets, reset_to_initial=reset_to_initial,
                return_cells=return_cells,
            )  # fmt: skip
        with_c = len(self._names) == 2
        hx = hx if with_c or hx is None else (hx,)
        (output, *cells), states = self._run_checked(input, hx, lengths, resets, reset_to_initial, return_cells)
        if may_be_direct:
            self._remember(self.mode, input.data if isinstance(input, PackedSequence) else input, self.hidden_size)
        return output, states if with_c else states[0], *cells

    def _may_be_direct(self, resets: Tensor | None, return_cells: bool) -> bool:
        return resets is None and not return_cells and self.recompute is None and not self._may_be_regularised()

    def _directly(self, input: Any, hx: Any, batch_first: bool, lengths: Tensor | None = None) -> Any:
        dropout = self.dropout if self.training else 0.0
        return self._call_directly(
            self.mode, input, hx, self._flat_weights, self.num_layers, dropout, self.bias, self.bidirectional,
            batch_first, False, lengths,
        )  # fmt: skip

    def _update_flat_weights(self) -> None:
        """Does what nn.RNNBase's does, which takes five times as long to find that nothing has changed."""
        own = self._parameters
        for ref, name in zip(self._flat_weight_refs, self._flat_weights_names, strict=True):
            # Not None for a weight that is no parameter: that is what a reference to a freed tensor gives.
            if ref is None or ref() is not own.get(name, self):
                return super()._update_flat_weights()

    def _run_checked(
        self, input: Tensor | PackedSequence, hx: Any, lengths: Lengths, resets: Tensor | None, reset_to_initial: bool,
        return_cells: bool = False,
    ) -> tuple[list[Any], States]:  # fmt: skip
        """The sequences, which are output and with return_cells cells, laid out as the input; and the final states.
        hx holds the initial states, or is None for zeros."""
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError(f"{self._kind}: expected no lengths with a PackedSequence, which has its own")
            if resets is not None:
                raise ValueError(f"{self._kind}: expected no resets with a PackedSequence; pad it and use lengths=")
            return run_packed(self, input, hx, return_cells)
        if isinstance(input, Tensor) and input.is_nested:  # what is no tensor has its error from dim(), as in torch.nn
            return run_nested(self, input, hx, lengths, resets, return_cells)
        if input.dim() not in (2, 3):
            raise ValueError(f"{self._kind}: Expected input to be 2D or 3D, got {input.dim()}D{self._suffix} instead")
        batched, batch_dim = input.dim() == 3, 0 if self.batch_first else 1
        x = input if batched else input.unsqueeze(batch_dim)
        if hx is not None:
            self._check_state_rank(hx, input.dim())
            if not batched:
                hx = tuple(hx[n].unsqueeze(1) for n in range(len(self._names)))
        self.check_input(x, None)
        if hx is None:
            hx = self._zero_states(x, x.shape[batch_dim])
        else:
            self._check_state_shape(hx, x, None)
            if len(self._names) == 2:
                check_states("lstm", hx, 1)
        if not batched:
            resets = checked_resets(resets, input, False)
            resets = None if resets is None else resets.unsqueeze(batch_dim)
        sequences, states = self._run_stack(x, hx, self.batch_first, lengths, resets, reset_to_initial, return_cells)
        if batched:
            return sequences, states
        return [s.squeeze(batch_dim) for s in sequences], tuple(state.squeeze(1) for state in states)

    def _run_stack(
        self, input: Tensor, hx: Any, batch_first: bool, lengths: Lengths | Packing, resets: Tensor | None,
        reset_to_initial: bool, return_cells: bool,
    ) -> tuple[list[Tensor], States]:  # fmt: skip
        h0, c0 = hx if len(hx) == 2 else (hx[0], None)
        output, h_n, c_n, cells = self._stack(
            input, h0, c0, batch_first, lengths, resets, reset_to_initial, return_cells
        )
        return [output] if cells is None else [output, cells], (h_n,) if c_n is None else (h_n, c_n)

    def _stack(
        self, input: Tensor, h0: Tensor, c0: Tensor | None, batch_first: bool, lengths: Lengths | Packing,
        resets: Tensor | None, reset_to_initial: bool, return_cells: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        may_be_direct = lengths is not None and not is_recorded() and self._direct is not None
        if may_be_direct and self._may_be_direct(resets, return_cells):
            x = input.transpose(0, 1) if batch_first and input.dim() == 3 else input
            _, _, checked = checked_steps(self._kind.lower(), x, lengths)
            results = self._directly(input, h0 if c0 is None else (h0, c0), batch_first, checked)
            if results is not None:
                output, states = results
                return output, *((states, None) if c0 is None else states), None
            lengths = lengths if isinstance(lengths, Packing) else checked
        weights: list[Tensor] = self._flat_weights  # type: ignore[assignment]
        return run_stack(
            self.mode, input, h0, c0, weights, self.bias, self.num_layers, self.dropout, self.training,
            self.bidirectional, batch_first, lengths, resets, reset_to_initial, self.recompute, return_cells,
            self._regularisation(),
        )  # fmt: skip

    def _check_state_rank(self, hx: Any, rank: int) -> None:
        ranks = [hx[n].dim() for n in range(len(self._names))]
        if ranks == [rank] * len(ranks):
            return
        got = f"{ranks[0]}-D tensor" if len(ranks) == 1 else f"({', '.join(f'{r}-D' for r in ranks)}) tensors"
        raise RuntimeError(
            f"For {'batched 3-D' if rank == 3 else 'unbatched 2-D'} input, {' and '.join(self._names)} should "
            f"also be {rank}-D but got {got}"
        )

    def _check_state_shape(self, hx: Any, input: Tensor, batch_sizes: Tensor | None) -> None:
        layers, B, R = self.get_expected_hidden_size(input, batch_sizes)
        for n, features in enumerate((R, self.hidden_size)[: len(self._names)]):
            which = "hidden" if len(self._names) == 1 else f"hidden[{n}]"
            self.check_hidden_size(hx[n], (layers, B, features), f"Expected {which} size {{}}, got {{}}")

    def _zero_states(self, input: Tensor, B: int) -> States:
        layers = self.num_layers * (2 if self.bidirectional else 1)
        h0 = input.new_zeros(layers, B, self.proj_size or self.hidden_size)
        if len(self._names) == 1:
            return (h0,)
        return h0, h0 if not self.proj_size else input.new_zeros(layers, B, self.hidden_size)


class LSTM(_Recurrent):
    """A stack of LSTM layers: `torch.nn.LSTM`, plus `lengths`, `resets` and `return_cells`.

    Constructor arguments, parameters, `state_dict`, repr and errors are those of `torch.nn.LSTM`
    (input_size, hidden_size, num_layers=1, bias=True, batch_first=False, dropout=0.0,
    bidirectional=False, proj_size=0, device=None, dtype=None). Equation: `functional.lstm`. With
    recompute="chunk", an attribute that may be set later too, training takes little memory: `functional.lstm`.
    zoneout, input_dropout, recurrent_dropout, weight_dropout, layer_norm, forget_bias: `nn.regularised`.
    """

    _names = ("hx", "cx")
    _kind = "LSTM"
    _torchs = nn.LSTM
    # nn.RNNBase's are of one state.
    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = nn.LSTM.permute_hidden  # type: ignore[assignment]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        lengths: Lengths = None,
        resets: Tensor | None = None,
        reset_to_initial: bool = False,
        return_cells: bool = False,
    ) -> (
        tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]
        | tuple[Tensor | PackedSequence, tuple[Tensor, Tensor], Tensor | PackedSequence]
    ):
        """Runs the stack.

        Args:
            input: [T, B, I], [B, T, I] with batch_first, [T, I] unbatched, a PackedSequence, or
                a nested tensor [B, j, I] of layout torch.jagged, whatever batch_first says.
            hx: (h_0 [L * K, B, R], c_0 [L * K, B, H]), without B where the input is unbatched;
                zeros by default.
            lengths: integers [B] on any device, each in [0, T]: row b ends after lengths[b] steps.
                Steps behind are not read and give zeros. Not with a PackedSequence.
            resets: bool [T, B], [B, T] with batch_first, [T] unbatched, on the input's device: True where an
                episode begins, which starts from zeros; `functional.lstm` says more. Not with a PackedSequence.
            reset_to_initial: episodes start from hx instead.
            return_cells: return c_t of the last layer at every step too. Not with recompute.

        Returns:
            output (packed or nested if the input was) with K * R features, and (h_n, c_n) shaped as hx; with
            return_cells also cells: c_t laid out as output is, with K * H features, in its dtype, differentiable, and
            zero behind a row's length.

        Raises:
            RuntimeError, ValueError, TypeError: as torch.nn.LSTM, or naming the argument.
        """
        results: tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]] = self._run(
            input, hx, lengths, resets, reset_to_initial, return_cells
        )
        return results


class _WithoutCellState(_Recurrent):
    """`forward` over the one state h, and no projection."""

    def __init__(self, mode: str, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__(mode, *args, **kwargs)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        lengths: Lengths = None,
        resets: Tensor | None = None,
        reset_to_initial: bool = False,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Runs the stack.

        Args:
            input: [T, B, I], [B, T, I] with batch_first, [T, I] unbatched, a PackedSequence, or
                a nested tensor [B, j, I] of layout torch.jagged, whatever batch_first says.
            hx: h_0 [L * K, B, H], without B where the input is unbatched; zeros by default.
            lengths, resets, reset_to_initial: as in `LSTM.forward`.

        Returns:
            output (packed or nested if the input was) with K * H features, and h_n shaped as hx.

        Raises:
            RuntimeError, ValueError, TypeError: as torch.nn's module of the same name, or naming the
                argument.
        """
        results: tuple[Tensor | PackedSequence, Tensor] = self._run(input, hx, lengths, resets, reset_to_initial)
        return results


class GRU(_WithoutCellState):
    """A stack of GRU layers: `torch.nn.GRU`, plus `lengths` and `resets`.

    Constructor arguments, parameters, `state_dict`, repr and errors are those of `torch.nn.GRU`
    (input_size, hidden_size, num_layers=1, bias=True, batch_first=False, dropout=0.0,
    bidirectional=False, device=None, dtype=None), recompute and what regularises (but forget_bias) as in `LSTM`.
    Equation: `functional.gru`.
    """

    _kind = "GRU"
    _torchs = nn.GRU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("GRU", *args, **kwargs)


class RNN(_WithoutCellState):
    """A stack of simple recurrent layers: `torch.nn.RNN`, plus `lengths` and `resets`.

    Constructor arguments, parameters, `state_dict`, repr and errors are those of `torch.nn.RNN`
    (input_size, hidden_size, num_layers=1, nonlinearity="tanh", bias=True, batch_first=False,
    dropout=0.0, bidirectional=False, device=None, dtype=None), recompute and what regularises (but forget_bias) as
    in `LSTM`. Equation: `functional.rnn`.

    Raises:
        ValueError: a nonlinearity other than "tanh" and "relu".
    """

    _kind = "RNN"
    _torchs = nn.RNN
    _suffix = " tensor"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if len(args) > 3:  # as torch: the fourth, before what the others take there
            nonlinearity, args = args[3], args[:3] + args[4:]
        else:
            nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if nonlinearity not in NONLINEARITIES:
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        super().__init__(f"RNN_{nonlinearity.upper()}", *args, **kwargs)
        self.nonlinearity = nonlinearity
