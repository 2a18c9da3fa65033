"""rnnattn.LSTM against torch.nn.LSTM over the same parameters and the same padded batch."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnattn
from benchmarks.cases import DTYPES, LSTMCase, ragged_lengths
from benchmarks.measure import Experiment, Peer


def experiment(case: LSTMCase, device: torch.device) -> Experiment:
    """x is [T, B, I]. A ragged batch starts and ends padded on both sides: torch.nn packs and pads."""
    torch.manual_seed(0)
    dtype = DTYPES[case.dtype]
    theirs = nn.LSTM(case.I, case.H, case.layers, bidirectional=case.bidirectional).to(device, dtype)
    ours = rnnattn.swap(theirs).model
    exact = copy.deepcopy(theirs).double()
    x = torch.randn(case.T, case.B, case.I, device=device, dtype=dtype, requires_grad=True)
    exact_x = x.detach().double().requires_grad_()
    dy = torch.randn(case.T, case.B, case.H * (2 if case.bidirectional else 1), device=device, dtype=dtype)
    lengths = ragged_lengths(case.B, case.T, device) if case.ragged else None
    baseline = "torch.nn.LSTM, packed" if case.ragged else "torch.nn.LSTM"
    lengths_on_cpu = None if lengths is None else lengths.cpu()

    def forward() -> Tensor:
        return ours(x, lengths=lengths)[0]  # type: ignore[no-any-return]

    def kernel() -> str:
        with rnnattn.use_backend("torch"):
            return rnnattn.explain(forward)[0].kernel

    return Experiment(
        ours=forward,
        peers=[Peer(baseline, kernel, lambda: _torch_forward(theirs, x, lengths_on_cpu))],
        inputs=[x, *theirs.parameters()],
        dy=dy,
        exact=lambda: _torch_forward(exact, exact_x, lengths_on_cpu),
        exact_inputs=[exact_x, *exact.parameters()],
        modules=(ours, theirs),
    )


def _torch_forward(lstm: nn.LSTM, x: Tensor, lengths: Tensor | None) -> Tensor:
    """[T, B, K * H], zeros behind each row's length."""
    if lengths is None:
        return lstm(x)[0]  # type: ignore[no-any-return]
    packed, _ = lstm(pack_padded_sequence(x, lengths, enforce_sorted=False))
    return pad_packed_sequence(packed, total_length=x.shape[0])[0]
