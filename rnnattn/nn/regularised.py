"""What regularises `LSTM`, `GRU` and `RNN`: keyword arguments of their constructors, all off by default.

    zoneout            h_t = k * h_{t-1} + (1 - k) * h'_t with k drawn for every unit of every step, 1 with this
                       probability; in evaluation k is its mean. LSTM: of h and of c, or a pair for the two.
                       (Krueger et al. 2017)
    input_dropout      elements of a layer's input are dropped in all steps of a row, or in none, in every layer
    recurrent_dropout  likewise of h_{t-1}, where W_hh multiplies it (both: Gal & Ghahramani 2016)
    weight_dropout     elements of W_hh are dropped, others for every call (DropConnect: Wan et al. 2013, Merity et
                       al. 2018)
    layer_norm         W_ih x_t and W_hh h_{t-1} are normalised over all their rows, each with a gain and its bias as
                       the shift, and LSTM's c_t before tanh (Ba et al. 2016). Parameters in each layer and direction:
                       norm_ih_l0 and norm_hh_l0 [GH] and, LSTM, norm_c_l0 and, with biases, norm_c_bias_l0 [H]
    forget_bias        LSTM: what the two biases of the forget gate add up to in the beginning, all of it in bias_ih
                       (Jozefowicz et al. 2015)

What is kept of a dropout is divided by its probability, as in torch.nn.Dropout. Equations: `reference.regularised`.
"""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from rnnattn.nn.graphs import Swapped
from rnnattn.regularised import Norms, Regularisation

DROPOUTS = ("input_dropout", "recurrent_dropout", "weight_dropout")


class Regularised(Swapped, nn.RNNBase):
    """Base of the modules that may be regularised so. The settings are attributes, which may be set later too,
    but layer_norm and forget_bias."""

    zoneout: float | tuple[float, float] = 0.0
    input_dropout: float = 0.0
    recurrent_dropout: float = 0.0
    weight_dropout: float = 0.0
    layer_norm: bool = False
    forget_bias: float | None = None
    recompute: str | None = None  # zoneout, recurrent_dropout and layer_norm exclude it

    def __init__(
        self, mode: str, *args: Any, zoneout: float | tuple[float, float] = 0.0, input_dropout: float = 0.0,
        recurrent_dropout: float = 0.0, weight_dropout: float = 0.0, layer_norm: bool = False,
        forget_bias: float | None = None, recompute: str | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(mode, *args, **kwargs)
        self.zoneout, self.layer_norm, self.forget_bias = zoneout, layer_norm, forget_bias
        self.input_dropout, self.recurrent_dropout = input_dropout, recurrent_dropout
        self.weight_dropout, self.recompute = weight_dropout, recompute
        self._check_regularisation()
        if layer_norm:
            weight: Any = self.weight_ih_l0
            for suffix in self._suffixes():
                for name, size in self._norm_sizes().items():
                    self.register_parameter(name + suffix, nn.Parameter(weight.new_empty(size)))
        self._reset_regularisation()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._reset_regularisation()

    def _reset_regularisation(self) -> None:
        with torch.no_grad():
            for suffix in self._suffixes():
                for name in self._norm_sizes() if self.layer_norm else ():
                    getattr(self, name + suffix).fill_(0 if name == "norm_c_bias" else 1)
                if self.forget_bias is not None:
                    forget = slice(self.hidden_size, 2 * self.hidden_size)
                    getattr(self, "bias_ih" + suffix)[forget] = self.forget_bias
                    getattr(self, "bias_hh" + suffix)[forget] = 0

    def extra_repr(self) -> str:
        return super().extra_repr() + "".join(f", {name}={getattr(self, name)}" for name in self._regularising())

    def _regularising(self) -> list[str]:
        """The names of the arguments that are not at their defaults."""
        names = ("zoneout", *DROPOUTS, "layer_norm", "forget_bias")
        return [name for name in names if getattr(self, name) not in (vars(Regularised)[name], (0.0, 0.0))]

    def _beyond_torch(self) -> list[str]:
        names = self._regularising()
        return [] if names == ["forget_bias"] else names

    def _suffixes(self) -> list[str]:
        """Of the parameters' names, for each direction of each layer."""
        ends = ("", "_reverse") if self.bidirectional else ("",)
        return [f"_l{layer}{end}" for layer in range(self.num_layers) for end in ends]

    def _norm_sizes(self) -> dict[str, int]:
        weight: Any = self.weight_ih_l0
        rows, H = weight.shape[0], self.hidden_size
        sizes = {"norm_ih": rows, "norm_hh": rows}
        if self.mode == "LSTM":
            sizes |= {"norm_c": H} | ({"norm_c_bias": H} if self.bias else {})
        return sizes

    def _may_be_regularised(self) -> bool:
        """Whether `_regularisation` is worth asking; a direct call waits for this."""
        if self.layer_norm or (self.zoneout and self.zoneout != (0.0, 0.0)):
            return True
        return self.training and bool(self.input_dropout or self.recurrent_dropout or self.weight_dropout)

    def _regularisation(self) -> Regularisation | None:
        """The settings of a call now, None where the plain layers are the same.

        Raises:
            ValueError: as the constructor, of what was set since.
        """
        if not self._may_be_regularised():
            return None
        zoneout = self._check_regularisation()
        drops = {name: getattr(self, name) if self.training else 0.0 for name in DROPOUTS}
        if not (self.layer_norm or any(zoneout) or any(drops.values())):
            return None
        norms = tuple(self._norms(suffix) for suffix in self._suffixes()) if self.layer_norm else ()
        return Regularisation(self.training, zoneout, norms=norms, **drops)

    def _norms(self, suffix: str) -> Norms:
        weight: Any = self.weight_ih_l0
        found: dict[str, Tensor] = {}
        for name, size in self._norm_sizes().items():
            p = getattr(self, name + suffix, None)
            if not isinstance(p, Tensor) or p.shape != (size,) or p.device != weight.device:
                got = f"shape {list(p.shape)} on {p.device}" if isinstance(p, Tensor) else p
                raise RuntimeError(
                    f"{name}{suffix}: expected shape [{size}] on {weight.device} with layer_norm, got {got}"
                )
            found[name] = p
        return Norms(found["norm_ih"], found["norm_hh"], found.get("norm_c"), found.get("norm_c_bias"))

    def _check_regularisation(self) -> tuple[float, float]:
        """zoneout of h and of c.

        Raises:
            ValueError: not a probability, or together with what excludes it. TypeError: no number.
        """
        for name in DROPOUTS:
            _check_probability(name, getattr(self, name))
        pair = self.zoneout
        if isinstance(pair, tuple | list):
            if self.mode != "LSTM" or len(pair) != 2:
                expected = "a number, or a pair for h and c" if self.mode == "LSTM" else "a number"
                raise ValueError(f"zoneout: expected {expected}, got {pair}")
        else:
            pair = (pair, pair if self.mode == "LSTM" else 0.0)
        for p in pair:
            _check_probability("zoneout", p)
        scan = [n for n, on in (("zoneout", any(pair)), ("recurrent_dropout", self.recurrent_dropout),
                                ("layer_norm", self.layer_norm)) if on]  # fmt: skip
        if scan and self.proj_size:
            raise ValueError(f"{scan[0]}: expected proj_size=0 with it, got {self.proj_size}")
        if scan and self.recompute:
            raise ValueError(f"{scan[0]}: expected recompute=None with it, got {self.recompute!r}")
        if self.forget_bias is not None:
            _check_number("forget_bias", self.forget_bias)
        if self.forget_bias is not None and (self.mode != "LSTM" or not self.bias):
            missing = "biases" if self.mode == "LSTM" else "a forget gate"
            raise ValueError(f"forget_bias: expected None without {missing}, got {self.forget_bias}")
        return float(pair[0]), float(pair[1])


def _check_probability(name: str, p: Any) -> None:
    _check_number(name, p)
    if not 0 <= p <= 1:
        raise ValueError(f"{name}: expected a probability from 0 to 1, got {p}")


def _check_number(name: str, p: Any) -> None:
    if isinstance(p, bool) or not isinstance(p, Real):
        raise TypeError(f"{name}: expected a number, got {type(p).__name__}")
