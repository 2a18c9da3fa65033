"""torchrl and FlashRNN as peers on a GPU, where they are installed.

Both run one direction of a batch without lengths, on the parameters of a torch.nn module, so that gradients are those
of the same tensors. torchrl's Triton kernels take fp32 (products in TF32, if torch's switches say so); of FlashRNN only
the LSTM is asked, as torch's GRU and RNN keep their gates and biases in other forms.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import RecurrentCase
from benchmarks.extras import optional
from benchmarks.measure import Peer

PACKAGES = ("torchrl", "flashrnn")
TRITON_HEAD = 64  # the widest head that FlashRNN's Triton kernel takes; here a layer is one head


def missing() -> list[str]:
    """The packages that are not installed."""
    return [package for package in PACKAGES if importlib.util.find_spec(package) is None]


def sequence_peers(case: RecurrentCase, module: nn.RNNBase, x: Tensor) -> list[Peer]:
    """Peers that run the module on x [T, B, I] and can do what the case asks for."""
    if case.bidirectional or case.ragged:
        return []
    absent = missing()
    peers = []
    if "torchrl" not in absent and case.dtype == "fp32" and case.op in ("lstm", "gru"):
        peers.append(_peer("torchrl", "Triton", lambda: _torchrl(module, x)))
    if "flashrnn" not in absent and case.op == "lstm":
        backends = ["cuda_fused", "cuda", *(["triton_fused"] if case.H <= TRITON_HEAD else [])]
        peers += [_peer("FlashRNN", backend, functools.partial(_flashrnn, module, x, backend)) for backend in backends]
    return peers


def _peer(name: str, kernel: str, new_forward: Callable[[], Callable[[], Tensor]]) -> Peer:
    forward = functools.cache(new_forward)  # made when it is first called, so that a failure is the peer's
    return Peer(name, lambda: kernel, lambda: forward()())


def _torchrl(module: nn.RNNBase, x: Tensor) -> Callable[[], Tensor]:
    """Its module over a torch.nn module with the same parameters, which wants the batch first."""
    modules, TensorDict = optional("torchrl.modules"), optional("tensordict").TensorDict
    T, B, _ = x.shape
    kind = type(module).__name__
    sizes = module.input_size, module.hidden_size, module.num_layers
    theirs = getattr(nn, kind)(*sizes, batch_first=True, device="meta")
    for name, parameter in module.named_parameters():
        setattr(theirs, name, parameter)
    states = ["h", "c"] if kind == "LSTM" else ["h"]
    layer = getattr(modules, f"{kind}Module")(
        **{kind.lower(): theirs},
        in_keys=["x", *states],
        out_keys=["y", *(("next", state) for state in states)],
        recurrent_backend="triton",
        recurrent_matmul_precision="tf32" if _takes_tf32() else "ieee",
        default_recurrent_mode=True,
    )
    starts = torch.zeros(B, T, 1, dtype=torch.bool, device=x.device)

    def forward() -> Tensor:
        y: Tensor = layer(TensorDict({"x": x.transpose(0, 1), "is_init": starts}, [B, T]))["y"]
        return y.transpose(0, 1)

    return forward


def _flashrnn(module: nn.RNNBase, x: Tensor, backend: str) -> Callable[[], Tensor]:
    """Its function per layer; torch's product with W_ih, whose result it takes, is part of the time.

    Its shapes, with N = 1 head: input [B, T, 4, N, H], weights [4, N, H, H], bias [4, N, H], states [2, B, T, N, H].
    Gates are in torch's order.
    """
    flashrnn = optional("flashrnn").flashrnn
    T, B, _ = x.shape
    H, dtype = module.hidden_size, str(x.dtype).removeprefix("torch.")
    parameters: dict[str, Any] = dict(module.named_parameters())

    def forward() -> Tensor:
        y = x
        for layer in range(module.num_layers):
            w_ih, w_hh, b_ih, b_hh = (
                parameters[f"{name}_l{layer}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            gates = F.linear(y, w_ih).view(T, B, 4, 1, H).transpose(0, 1)
            weights, bias = w_hh.view(4, 1, H, H), (b_ih + b_hh).view(4, 1, H)
            states, _ = flashrnn(gates, weights, bias, function="lstm", backend=backend, dtype=dtype)
            y = states[0].squeeze(2).transpose(0, 1)
        return y

    return forward


def _takes_tf32() -> bool:
    rnn: Any = torch.backends.cudnn.rnn
    return bool(rnn.fp32_precision == "tf32")
