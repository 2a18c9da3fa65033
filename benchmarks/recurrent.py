"""rnnattn's LSTM, GRU and RNN against torch.nn's over the same parameters and the same padded batch."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnattn
from benchmarks import gpu_peers, runtimes
from benchmarks.cases import DTYPES, RecurrentCase, ragged_lengths
from benchmarks.measure import Experiment, Peer
from benchmarks.results import ONEDNN_OFF
from benchmarks.timing import Context

MODULES: dict[str, Callable[..., nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
without_onednn: Context = functools.partial(
    torch.backends.mkldnn.flags, enabled=False, deterministic=None, allow_tf32=None, fp32_precision=None
)


def experiment(case: RecurrentCase, device: torch.device) -> Experiment:
    """x is [T, B, I]. A ragged batch starts and ends padded on all sides: torch.nn packs and pads, or runs it padded.

    Nothing flows back from behind a row's length, so that all sides have the same gradients.
    """
    torch.manual_seed(0)
    dtype = DTYPES[case.dtype]
    theirs = MODULES[case.op](case.I, case.H, case.layers, bidirectional=case.bidirectional).to(device, dtype)
    ours = rnnattn.swap(theirs).model
    exact = copy.deepcopy(theirs).double()
    x = torch.randn(case.T, case.B, case.I, device=device, dtype=dtype, requires_grad=True)
    exact_x = x.detach().double().requires_grad_()
    dy = torch.randn(case.T, case.B, case.H * (2 if case.bidirectional else 1), device=device, dtype=dtype)
    name = f"torch.nn.{type(theirs).__name__}"
    padded_kernel = functools.partial(torch_kernel, lambda: ours(x))
    if not case.ragged:
        return Experiment(
            ours=lambda: _padded(ours, x),
            peers=[
                *torch_peers(name, padded_kernel, lambda: _padded(theirs, x), device),
                *_others(case, theirs, x, None),
            ],
            inputs=[x, *theirs.parameters()],
            dy=dy,
            exact=lambda: _padded(exact, exact_x),
            exact_inputs=[exact_x, *exact.parameters()],
            modules=(ours, theirs),
            prepared=_prepared(case, ours, x),
        )
    lengths = ragged_lengths(case.B, case.T, device)
    on_cpu = lengths.cpu()
    valid = (torch.arange(case.T, device=device)[:, None] < lengths)[..., None]

    def with_lengths() -> Tensor:
        return ours(x, lengths=lengths)[0]  # type: ignore[no-any-return]

    packed_kernel = functools.partial(torch_kernel, with_lengths)
    return Experiment(
        ours=with_lengths,
        peers=[
            *torch_peers(f"{name}, packed", packed_kernel, lambda: _packed(theirs, x, on_cpu), device),
            *torch_peers(f"{name}, padded", padded_kernel, lambda: _padded(theirs, x), device, lambda y: y * valid),
            *_others(case, theirs, x, on_cpu),
        ],
        inputs=[x, *theirs.parameters()],
        dy=dy * valid,
        exact=lambda: _packed(exact, exact_x, on_cpu),
        exact_inputs=[exact_x, *exact.parameters()],
        modules=(ours, theirs),
        prepared=_prepared(case, ours, x, lengths=lengths),
    )


def torch_peers(
    name: str,
    kernel: Callable[[], str],
    forward: Callable[[], Tensor],
    device: torch.device,
    seen: Callable[[Tensor], Tensor] = lambda y: y,
) -> list[Peer]:
    """torch.nn as it is and, on a CPU, without oneDNN."""
    peers = [Peer(name, kernel, forward, seen=seen)]
    if device.type == "cpu":
        peers.append(Peer(name, lambda: kernel() + ONEDNN_OFF, forward, without_onednn, seen=seen))
    return peers


def torch_kernel(ours: Callable[[], object]) -> str:
    """What torch.nn runs for the call that `ours` makes of our modules."""
    with rnnattn.use_backend("torch"):
        return rnnattn.explain(ours)[0].kernel


def _prepared(case: RecurrentCase, ours: nn.RNNBase, x: Tensor, **settings: Tensor) -> Callable[[], Tensor] | None:
    if case.dtype != "fp32" or x.is_cuda:  # the peers that pack their weights beforehand are there in fp32
        return None
    try:
        prepared = ours.eval().prepare_inference()
    except rnnattn.BackendError:
        return None
    return lambda: prepared(x, **settings)[0]


def _others(case: RecurrentCase, module: nn.RNNBase, x: Tensor, lengths: Tensor | None) -> list[Peer]:
    """The peers besides torch.nn that are installed and can run the case."""
    if x.is_cuda:
        return gpu_peers.sequence_peers(case, module, x)
    return runtimes.sequence_peers(module, x, lengths) if case.dtype == "fp32" else []


def _padded(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)[0]  # type: ignore[no-any-return]


def _packed(module: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
    """[T, B, K * H], zeros behind each row's length."""
    packed, _ = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
    return pad_packed_sequence(packed, total_length=x.shape[0])[0]
