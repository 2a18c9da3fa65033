"""A PackedSequence goes in and out as the same rows with `lengths=`, with all derivatives; tests of torch.nn's parity
with it are those of the modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import F32, F64, backend_parameters
from tolerances import close
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import rnnattn

kinds = pytest.mark.parametrize("kind", ("LSTM", "GRU", "RNN"))
I, H = 3, 4


@pytest.fixture(params=backend_parameters("reference", "cpp"))
def chosen(request: pytest.FixtureRequest) -> Iterator[str]:
    with rnnattn.use_backend(request.param):
        yield request.param


def module(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return getattr(rnnattn, kind)(I, H, num_layers=2, bidirectional=True, dtype=F64, **options)


def like(packed: PackedSequence, data: Tensor) -> PackedSequence:
    return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)


@pytest.mark.parametrize("lengths", ([2, 5, 3], [5, 5, 5], [1, 1, 1], [4]), ids=str)
@kinds
def test_the_same_as_with_lengths(kind: str, lengths: list[int], chosen: str) -> None:
    m, T = module(kind), max(lengths)
    x = torch.randn(T, len(lengths), I, dtype=F64, requires_grad=True)
    dy, results = torch.randn(T, len(lengths), 2 * H, dtype=F64), []
    for packed in (True, False):
        if packed:
            y, states = m(pack_padded_sequence(x, lengths, enforce_sorted=False))
            y, _ = pad_packed_sequence(y)
        else:
            y, states = m(x, lengths=lengths)
        gradients = torch.autograd.grad(y, [x, *m.parameters()], dy)
        results.append((y.detach(), states, gradients))
    close(*results)


def test_what_pads_a_row_is_read_by_nobody(chosen: str) -> None:
    """Rows behind a length are filled with any of the others: NaN in one row stays in it."""
    m = module("LSTM")
    x = torch.randn(5, 3, I, dtype=F64)
    x[:, 1] = torch.nan
    packed = pack_padded_sequence(x, torch.tensor([2, 5, 3]), enforce_sorted=False)
    data = packed.data.clone().requires_grad_()
    y, _ = pad_packed_sequence(m(like(packed, data))[0])
    assert y[:, 1].isnan().all() and not y[:, [0, 2]].isnan().any()
    (gradient,) = torch.autograd.grad(y[:, [0, 2]].sum(), data)
    padded, _ = pad_packed_sequence(like(packed, gradient))
    assert not padded[:, [0, 2]].isnan().any()


@pytest.mark.parametrize("backend", backend_parameters("cpp"))
@kinds
def test_derivatives(kind: str, backend: str) -> None:
    m = module(kind)
    packed = pack_padded_sequence(torch.randn(3, 2, I, dtype=F64), [2, 3], enforce_sorted=False)

    def layers(data: Tensor) -> Tensor:
        output: Tensor = m(like(packed, data))[0].data
        return output

    data = packed.data.clone().requires_grad_()
    assert torch.autograd.gradcheck(layers, data, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(layers, data)
    twice = torch.stack([packed.data, packed.data.flip(0)])
    close(torch.func.vmap(layers)(twice), torch.stack([layers(one) for one in twice]))
    close(torch.func.jacrev(layers)(packed.data), torch.func.jacfwd(layers)(packed.data))


@pytest.mark.parametrize("backend", backend_parameters("cpp"))
def test_what_maps_or_differentiates_the_gradient_alone(backend: str) -> None:
    m = module("LSTM")
    packed = pack_padded_sequence(torch.randn(3, 2, I, dtype=F64), [2, 3], enforce_sorted=False)
    data = packed.data.clone().requires_grad_()
    y = m(like(packed, data))[0].data

    def gradient(dy: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(y, data, dy, retain_graph=True)
        return found

    dy, tangent = torch.randn(2, *y.shape, dtype=F64)
    close(torch.func.vmap(gradient)(torch.stack([dy, tangent])), torch.stack([gradient(dy), gradient(tangent)]))
    with forward_ad.dual_level():
        found = gradient(forward_ad.make_dual(dy, tangent))
        close(forward_ad.unpack_dual(found).tangent, gradient(tangent))


def test_with_another_default_device() -> None:
    m, packed = module("GRU"), pack_padded_sequence(torch.randn(3, 2, I, dtype=F64), [3, 2])
    want = m(packed)[0].data
    torch.set_default_device("meta")
    try:
        close(m(packed)[0].data, want)
    finally:
        torch.set_default_device(None)


def test_on_the_meta_device() -> None:
    packed = pack_padded_sequence(torch.randn(3, 2, I, dtype=F64), [3, 2])
    y, _ = module("LSTM").to("meta")(like(packed, packed.data.to("meta")))
    assert y.data.shape == (5, 2 * H) and y.data.is_meta


def test_under_autocast() -> None:
    m = rnnattn.GRU(I, H)
    packed = pack_padded_sequence(torch.randn(3, 2, I), [2, 3], enforce_sorted=False)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = m(packed)
    assert y.data.dtype == torch.bfloat16
    y.data.sum().backward()
    assert all(p.grad.dtype == F32 for p in m.parameters())
