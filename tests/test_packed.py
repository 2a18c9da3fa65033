"""A PackedSequence goes in and out as the same rows with `lengths=`, with all derivatives; tests of torch.nn's parity
with it are those of the modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import F32, F64, backend_parameters, device_of
from tolerances import close
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import rnnattn

kinds = pytest.mark.parametrize("kind", ("LSTM", "GRU", "RNN"))
I, H = 3, 4


@pytest.fixture(params=backend_parameters("reference", "cpp", "triton"))
def chosen(request: pytest.FixtureRequest) -> Iterator[str]:
    with rnnattn.use_backend(request.param):
        yield request.param


def module(kind: str, dtype: torch.dtype = F64, **options: Any) -> Any:
    torch.manual_seed(0)
    return getattr(rnnattn, kind)(I, H, num_layers=2, bidirectional=True, dtype=dtype, **options)


def of(backend: str) -> dict[str, Any]:
    """The widest dtype that it has, and where it runs."""
    return {"dtype": F32 if backend == "triton" else F64, "device": device_of(backend)}


def alike(results: list[Any], dtype: torch.dtype) -> None:
    close(*results) if dtype == F64 else torch.testing.assert_close(*results)


def like(packed: PackedSequence, data: Tensor) -> PackedSequence:
    return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)


@pytest.mark.parametrize("lengths", ([2, 5, 3], [5, 5, 5], [1, 1, 1], [4]), ids=str)
@kinds
def test_the_same_as_with_lengths(kind: str, lengths: list[int], chosen: str) -> None:
    m, T = module(kind, **of(chosen)), max(lengths)
    x = torch.randn(T, len(lengths), I, requires_grad=True, **of(chosen))
    dy, results = torch.randn(T, len(lengths), 2 * H, **of(chosen)), []
    for packed in (True, False):
        if packed:
            y, states = m(pack_padded_sequence(x, lengths, enforce_sorted=False))
            y, _ = pad_packed_sequence(y)
        else:
            y, states = m(x, lengths=lengths)
        gradients = torch.autograd.grad(y, [x, *m.parameters()], dy)
        results.append((y.detach(), states, gradients))
    alike(results, x.dtype)


def test_what_pads_a_row_is_read_by_nobody(chosen: str) -> None:
    """Rows behind a length are filled with any of the others: NaN in one row stays in it."""
    m, x = module("LSTM", **of(chosen)), torch.randn(5, 3, I, **of(chosen))
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


@pytest.mark.parametrize("batch_sizes", ([2, 2], [2, 2, 2], [3, 1, 3], [4, 1, 0], [1, 4], [], 5, [[3, 2]]), ids=str)
def test_batch_sizes_that_do_not_fit(batch_sizes: Any, chosen: str) -> None:
    packed = PackedSequence(torch.randn(5, I, **of(chosen)), torch.tensor(batch_sizes, dtype=torch.int64))
    with pytest.raises(RuntimeError, match=r"batch_sizes: expected .* got"):
        module("LSTM", **of(chosen))(packed)


@pytest.mark.parametrize("dtype", (torch.uint8, torch.int32, torch.bool), ids=str)
def test_batch_sizes_are_int64(dtype: torch.dtype) -> None:
    """As torch.nn has it."""
    packed = PackedSequence(torch.randn(2, I, dtype=F64), torch.ones(2, dtype=dtype))
    with pytest.raises(RuntimeError, match=r"batch_sizes: expected int64 of shape .*, got torch\.\w+ of shape \[2\]"):
        module("LSTM")(packed)


@pytest.mark.parametrize("settings", ({}, {"zoneout": 0.1}, {"recompute": "chunk"}), ids=str)
def test_a_call_is_explained_once(settings: Any, chosen: str) -> None:
    packed = pack_padded_sequence(torch.randn(3, 2, I, **of(chosen)), [3, 2])
    explained = rnnattn.explain(module("LSTM", **of(chosen), **settings), packed)
    assert len(explained) == 1 and explained[0].backend == chosen


def test_gaps_between_elements(chosen: str) -> None:
    m, wide = module("GRU", **of(chosen)), torch.randn(5, 2 * I, **of(chosen))
    packed, dy = PackedSequence(wide[:, ::2], torch.tensor([3, 2])), torch.randn(4 * H, 5, **of(chosen)).t()[:, ::2]
    results = []
    for data in (packed.data, packed.data.contiguous()):
        leaf = data.detach().requires_grad_()
        y = m(like(packed, leaf))[0].data
        results.append((y.detach(), torch.autograd.grad(y, [leaf, *m.parameters()], dy)))
    alike(results, wide.dtype)


def test_torchs_own_kernels_take_packed_rows() -> None:
    """In the order of rows that torch.nn has, so that dropout between layers draws the same."""
    theirs = torch.nn.LSTM(I, H, 2, dropout=0.5)
    ours = rnnattn.LSTM(I, H, 2, dropout=0.5)
    ours.load_state_dict(theirs.state_dict())
    packed = pack_padded_sequence(torch.randn(5, 3, I), [2, 5, 3], enforce_sorted=False)
    outputs = []
    for m in (theirs, ours):
        torch.manual_seed(1)
        with rnnattn.use_backend("torch"):
            outputs.append(m(packed)[0].data)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("recompute", (None, "chunk"))
@kinds
def test_a_seed_drops_the_same_as_in_torch(kind: str, recompute: str | None, chosen: str) -> None:
    settings = {"num_layers": 2, "dropout": 0.5, "device": device_of(chosen)}
    theirs, ours = (
        getattr(torch.nn, kind)(I, H, **settings),
        getattr(rnnattn, kind)(I, H, recompute=recompute, **settings),
    )
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 3, I, device=device_of(chosen))
    packed, outputs = pack_padded_sequence(x, [2, 5, 3], enforce_sorted=False), []
    for m in (theirs, ours):
        torch.manual_seed(1)
        outputs.append(m(packed)[0].data)
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("backend", backend_parameters("cpp"))
@pytest.mark.parametrize("precision", ("float", "bfloat16", "int8"))
def test_prepared_modules(precision: str, backend: str) -> None:
    m = rnnattn.GRU(I, H, 2, bidirectional=True).eval().prepare_inference(precision)
    x, lengths = torch.randn(5, 3, I), [2, 5, 3]
    with torch.inference_mode():
        y, h = m(pack_padded_sequence(x, lengths, enforce_sorted=False))
        close((pad_packed_sequence(y)[0], h), m(x, lengths=lengths))


@pytest.mark.parametrize("backend", backend_parameters("cpp", "triton"))
def test_the_operator_checks_lengths(backend: str) -> None:
    shapes = (5, I), (1, 2, H), (H, I), (H, H)
    x, h0, *weights = (torch.zeros(shape, device=device_of(backend)) for shape in shapes)

    def run(lengths: Any, resets: Any = None) -> Any:
        return torch.ops.rnnattn.recurrent_layer(
            x, h0, None, weights, lengths, resets, False, False, "forward", "RNN_TANH", True, backend
        )

    assert run(torch.tensor([3, 2]))[0].shape == (5, H)
    for lengths in (None, torch.tensor([2, 3]), torch.tensor([3, 3]), torch.tensor([5, 0]), torch.tensor([5])):
        with pytest.raises(RuntimeError, match="lengths: expected"):
            run(lengths)
    with pytest.raises(RuntimeError, match="resets: expected none with a packed sequence"):
        run(torch.tensor([3, 2]), torch.ones(3, 2, dtype=torch.bool))
    x, h0 = x[:0], h0[:, :0]
    with pytest.raises(RuntimeError, match="lengths: expected"):
        run(torch.zeros(0, dtype=torch.int64))
    backend = "reference"
    with pytest.raises(RuntimeError, match=r"x: expected 3 dimensions .* for backend reference"):
        run(torch.tensor([3, 2]))


def test_compiled_whole() -> None:
    m, packed = module("LSTM"), pack_padded_sequence(torch.randn(3, 2, I, dtype=F64), [3, 2])
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        close(torch.compile(m, backend="aot_eager", fullgraph=True)(packed), m(packed))


def test_compiled() -> None:
    m = module("LSTM")
    packed = pack_padded_sequence(torch.randn(5, 3, I, dtype=F64), [2, 5, 3], enforce_sorted=False)
    data = packed.data.clone().requires_grad_()
    results = []
    for run in (m, torch.compile(m, backend="aot_eager")):
        y, states = run(like(packed, data))
        results.append((y.data.detach(), states, torch.autograd.grad(y.data.sum(), [data, *m.parameters()])))
    close(*results)


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
