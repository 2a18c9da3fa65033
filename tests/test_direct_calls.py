"""Calls that go directly to the C++ kernels give what others give, and leave to them what is not plain."""

from __future__ import annotations

import contextlib
import copy
import pickle
import re
from typing import Any

import pytest
import torch
from cases import BF16, F32, F64, backend_parameters
from tolerances import close
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils.rnn import pack_padded_sequence

import rnnattn
from rnnattn import backends
from rnnattn.nn import direct

pytestmark = pytest.mark.parametrize("backend", backend_parameters("cpp"))
I, H = 5, 6
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("LSTM", {}),
    "lstm, batch_first": ("LSTM", {"batch_first": True}),
    "lstm, both directions": ("LSTM", {"bidirectional": True}),
    "lstm, projection": ("LSTM", {"proj_size": 4, "bidirectional": True, "bias": False}),
    "lstm, projection and biases": ("LSTM", {"proj_size": 4}),
    "gru": ("GRU", {"bidirectional": True}),
    "gru, no bias": ("GRU", {"bias": False, "batch_first": True}),
    "rnn": ("RNN", {"bidirectional": True, "batch_first": True}),
    "rnn, relu": ("RNN", {"nonlinearity": "relu"}),
    "stack": ("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 3}),
    "gru stack": ("GRU", {"num_layers": 3, "batch_first": True, "bias": False}),
    "lstm cell": ("LSTMCell", {}),
    "lstm cell, no bias": ("LSTMCell", {"bias": False}),
    "gru cell": ("GRUCell", {}),
    "rnn cell, relu": ("RNNCell", {"nonlinearity": "relu"}),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


@pytest.fixture(autouse=True)
def taken(monkeypatch: pytest.MonkeyPatch, backend: str) -> list[bool]:
    """Of every call that was tried directly, whether it was taken."""
    seen: list[bool] = []
    run = direct.call_layer()

    def spy(*arguments: Any) -> Any:
        results = run(*arguments)
        seen.append(results is not None)
        return results

    monkeypatch.setattr(direct, "call_layer", lambda: spy)
    return seen


def flat(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else [t for part in results for t in flat(part)]


def twins(name: str, dtype: torch.dtype = F64) -> tuple[Any, Any]:
    """torch's and ours with the same parameters."""
    kind, options = LAYERS[name]
    theirs, ours = (getattr(package, kind)(I, H, dtype=dtype, **options) for package in (nn, rnnattn))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def arguments(module: Any, T: int = 3, B: int = 2, given: bool = True, grad: bool = False) -> list[Any]:
    """x, and initial states if given, as the module takes them."""
    dtype = next(module.parameters()).dtype
    cell = isinstance(module, nn.RNNCellBase)
    shape = (B,) if cell else (B, T) if module.batch_first else (T, B)
    x = torch.randn(*shape, I, dtype=dtype, requires_grad=grad)
    if not given:
        return [x]
    K = () if cell else (module.num_layers * (1 + module.bidirectional),)
    h = torch.randn(*K, B, getattr(module, "proj_size", 0) or H, dtype=dtype, requires_grad=grad)
    if "LSTM" not in type(module).__name__:
        return [x, h]
    return [x, (h, torch.randn(*K, B, H, dtype=dtype, requires_grad=grad))]


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@each_layer
def test_results_and_gradients_are_torchs(name: str, given: bool, T: int, taken: list[bool]) -> None:
    theirs, ours = twins(name)
    ours(*arguments(ours, T))
    for frozen in ((), ("weight_ih",), ("weight", "bias")):
        for grad in (False, True):
            for p, q in zip(theirs.named_parameters(), ours.parameters(), strict=True):
                p[1].requires_grad_(not p[0].startswith(frozen or "none")), q.requires_grad_(p[1].requires_grad)
            given_arguments = arguments(ours, T, given=given, grad=grad)
            want, got = flat(theirs(*given_arguments)), flat(ours(*given_arguments))
            close(got, want)
            assert [t.requires_grad for t in got] == [t.requires_grad for t in want]
            if not want[0].requires_grad:
                continue
            inputs = flat(given_arguments) if grad else []
            wanted = [[*inputs, *(p for p in m.parameters() if p.requires_grad)] for m in (theirs, ours)]
            for which in (slice(0, None), slice(0, 1), slice(-1, None)):  # of the outputs that have a gradient
                cotangents = [torch.randn_like(t) for t in want[which]]
                d_want, d_got = (
                    torch.autograd.grad(outputs[which], inputs, cotangents, retain_graph=True, allow_unused=True)
                    for outputs, inputs in zip((want, got), wanted, strict=True)
                )
                for w, g, p in zip(d_want, d_got, wanted[0], strict=True):
                    close(torch.zeros_like(p) if g is None else g, torch.zeros_like(p) if w is None else w)
    assert taken == [True] * 6


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@each_layer
def test_one_row_without_a_batch(name: str, given: bool, taken: list[bool]) -> None:
    theirs, ours = twins(name)
    for _ in range(2):
        x, *hx = arguments(ours, B=1, given=given, grad=True)
        rows = 0 if x.dim() == 2 or ours.batch_first else 1
        states = [h.select(0 if x.dim() == 2 else 1, 0) for h in flat(hx)]
        call = [x.select(rows, 0), *([tuple(states)] if len(states) == 2 else states)]
        want, got = flat(theirs(*call)), flat(ours(*call))
        close(got, want)
        cotangents, inputs = [torch.randn_like(t) for t in want], [x, *flat(hx)]
        close(
            torch.autograd.grad(got, [*inputs, *ours.parameters()], cotangents),
            torch.autograd.grad(want, [*inputs, *theirs.parameters()], cotangents),
        )
    assert taken == [True]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", [name for name in LAYERS if "cell" not in name])
def test_rows_of_different_lengths(name: str, packed: bool, taken: list[bool]) -> None:
    """Bit for bit what the long way gives."""
    _, ours = twins(name)
    lengths, results = torch.tensor([2, 4, 3]), []
    x, *hx = arguments(ours, T=4, B=3, grad=True)
    if not packed:
        lengths[2] = 0
    for _ in range(3):
        if packed:
            given = pack_padded_sequence(x, lengths, ours.batch_first, enforce_sorted=False)
            y, states = ours(given, *hx)
            outputs = [y.data, *flat(states)]
        else:
            outputs = flat(ours(x, *hx, lengths=lengths))
        loss = sum(t.square().sum() for t in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, [x, *flat(hx), *ours.parameters()])])
        with torch.no_grad():
            assert torch.equal(flat(ours(x, *hx, lengths=lengths))[0], flat(ours(x, *hx, lengths=lengths.tolist()))[0])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    assert taken == [True] * 8
    for wrong in ([2, 4, 5], [2, -1, 3], [2, 4], torch.tensor([2.0, 4.0, 3.0])):
        with pytest.raises((TypeError, ValueError), match="lengths: expected"):
            ours(x, *hx, lengths=wrong)


@pytest.mark.parametrize("low", [BF16, torch.float16])
@each_layer
def test_autocast(name: str, low: torch.dtype, taken: list[bool]) -> None:
    """Bit for bit what the long way gives, for inputs of its type and of fp32; float64 is left to that."""
    _, ours = twins(name, F32)
    with torch.autocast("cpu", low):
        ours(*arguments(ours))
        for cast in (False, True):
            x, *hx = arguments(ours, grad=True)
            call, results = [x.to(low) if cast else x, *hx], []
            for direct_is_set in (True, False):
                ours._direct = ours._direct if direct_is_set else None
                outputs = flat(ours(*call))
                assert all(t.dtype == low for t in outputs)
                loss = sum(t.float().square().sum() for t in outputs)
                results.append([*outputs, *torch.autograd.grad(loss, [x, *flat(hx), *ours.parameters()])])
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        assert taken == [True] * 2
        with pytest.raises(RuntimeError):
            ours(x.double(), *hx)
    assert flat(ours(*arguments(ours)))[0].dtype == F32


def test_autocast_casts_weights_once_while_it_lasts(taken: list[bool]) -> None:
    """As torch's layers; and a cast that was made without gradients is of no use with them."""
    cell, x = rnnattn.GRUCell(I, H), torch.randn(3, I)
    with torch.autocast("cpu", BF16):
        with torch.no_grad():
            cell(x), cell(x)
        h = None
        for _ in range(3):
            h = cell(x, h)
        nodes, seen = [h.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is not None and node not in seen:
                seen.add(node)
                nodes += [other for other, _ in node.next_functions]
        accumulated = [node for node in seen if node.name().endswith("AccumulateGrad")]
        casts = [node for node in seen if node.name().startswith("ToCopy")]
        h.float().sum().backward()
    assert len(accumulated) == 4 and all(p.grad.abs().sum() > 0 for p in cell.parameters())
    assert len(casts) <= 4 * 3 and taken == [True] * 4


@pytest.mark.parametrize("dropout", [0.5, 1, 0.0])
@pytest.mark.parametrize("name", ["stack", "gru stack"])
def test_a_seed_drops_the_same(name: str, dropout: float, taken: list[bool]) -> None:
    theirs, ours = twins(name)
    results = []
    for module in (ours, ours, theirs):
        module.dropout = dropout
        torch.manual_seed(4)
        x, *hx = given = arguments(module, T=5, B=3, grad=True)
        outputs = flat(module(*given))
        results.append([*outputs, *torch.autograd.grad(sum(t.square().sum() for t in outputs), flat(given))])
    close(results[1], results[0]), close(results[1], results[2])
    assert taken == [True]
    for module in (theirs, ours):
        module.eval()
    close(flat(ours(x, *hx)), flat(theirs(x, *hx)))
    assert taken == [True, True]


@pytest.mark.parametrize("dropout", [1.5, -0.5, float("nan"), "0.5", None])
def test_a_dropout_that_is_none(dropout: Any, taken: list[bool]) -> None:
    """It raises what torch.nn's raises."""
    theirs, ours = twins("stack")
    x, *hx = arguments(ours)
    ours(x, *hx)
    theirs.dropout = ours.dropout = dropout
    with pytest.raises((TypeError, RuntimeError)) as expected:
        theirs(x, *hx)
    number = isinstance(dropout, float)
    with pytest.raises(expected.type, match=re.escape(str(expected.value)) if number else None):
        ours(x, *hx)
    assert taken == [False]


@pytest.mark.parametrize("dtype", [F32, BF16])
@each_layer
def test_a_direct_call_is_bit_equal_to_the_long_way(name: str, dtype: torch.dtype, taken: list[bool]) -> None:
    _, ours = twins(name, dtype)
    given_arguments = arguments(ours, grad=True)
    inputs = [*flat(given_arguments), *ours.parameters()]
    results = []
    for _ in range(2):
        got = flat(ours(*given_arguments))
        results.append([*got, *torch.autograd.grad(sum(t.float().square().sum() for t in got), inputs)])
    assert taken == [True]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@each_layer
def test_a_graph_can_be_run_twice(name: str, taken: list[bool]) -> None:
    _, ours = twins(name)
    for _ in range(2):
        loss = sum(t.square().sum() for t in flat(ours(*arguments(ours, grad=True))))
    first = torch.autograd.grad(loss, list(ours.parameters()), retain_graph=True)
    assert all(
        torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, list(ours.parameters())), strict=True)
    )
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, list(ours.parameters()))
    assert taken == [True]


@each_layer
def test_states_can_be_written_in_place(name: str, taken: list[bool]) -> None:
    """An output is the caller's, and no view; but y is kept for the backward, as torch keeps it."""
    theirs, ours = twins(name)
    given_arguments = arguments(ours, grad=True)
    ours(*given_arguments)
    results = [flat(module(*given_arguments)) for module in (theirs, ours)]
    assert not any(t._is_view() for t in results[1])
    first = 0 if "cell" in name else 1
    for h in results[1][first:]:
        h.mul_(0.5)
    losses = [sum((f * t).sum() for t in r[first:]) for f, r in zip((0.5, 1), results, strict=True)]
    close(*(torch.autograd.grad(loss, flat(given_arguments)) for loss in losses))
    assert taken == [True]


@each_layer
def test_changes_between_forward_and_backward_are_refused(name: str, taken: list[bool]) -> None:
    _, ours = twins(name)
    for _ in range(2):
        results = flat(ours(*arguments(ours)))
    with torch.no_grad():
        ours.get_parameter(next(iter(ours.state_dict()))).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        results[0].sum().backward()
    assert taken == [True]


@each_layer
def test_gradients_of_gradients_go_through_the_operator(name: str, taken: list[bool]) -> None:
    _, ours = twins(name)
    given_arguments = arguments(ours, grad=True)
    wanted, gradients = [*flat(given_arguments), *ours.parameters()], []
    for _ in range(2):
        (first, *_) = results = flat(ours(*given_arguments))
        d = torch.autograd.grad(sum(t.sum() for t in results), wanted, create_graph=True)
        second = torch.autograd.grad(sum(t.square().sum() for t in d), wanted)
        gradients.append([*(t.detach() for t in d), *second])
        assert first.grad_fn is not None
    assert taken == [True]
    close(*gradients)


@each_layer
def test_what_is_wrong_is_refused_as_before(name: str, taken: list[bool]) -> None:
    _, ours = twins(name)
    x, *hx = arguments(ours)
    wrong: list[list[Any]] = [
        [x, (None, None)],
        [x, (flat(hx)[0], None)],
        [x[..., 1:]],
        [x[None]],
        [x.to(F32), *hx],
        ["x"],
        [None],
        [x, *hx, 1, 2, 3, 4, 5],
    ]
    h = flat(hx)
    for states in (
        [h[0][..., 1:], *h[1:]],
        [h[0][..., :1, :], *h[1:]],
        [h[0].to(F32), *h[1:]],
        h * 3,
        h[:1] * (3 - len(h)),
    ):
        wrong.append([x, states[0] if len(states) == 1 else tuple(states)])

    def answer(arguments: list[Any]) -> str:
        try:
            ours(*arguments)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "right"

    before = [answer(a) for a in wrong]
    assert all(a != "right" for a in before)
    ours(x, *hx)
    ours(x, *hx)
    assert [answer(a) for a in wrong] == before
    assert True in taken


def test_what_is_not_plain_goes_the_long_way(taken: list[bool]) -> None:
    module = rnnattn.LSTM(I, H)
    x = torch.randn(3, 2, I)
    y, _ = module(x)
    assert taken == []
    module(x)
    assert taken == [True]
    taken.clear()
    for what in (x[:, :0], torch.complex(x, x).conj().imag, x.as_subclass(type("Sub", (Tensor,), {}))):
        module(what)
    with rnnattn.use_backend("reference"):
        torch.testing.assert_close(module(x)[0], y)
    with backends.recording() as calls:
        module(x)
    assert [chosen.backend for _, chosen in calls] == ["cpp"]
    assert taken and True not in taken
    assert module(x, lengths=[3, 2])[0].shape == y.shape
    module(x)
    torch.func.vmap(lambda t: t * 2)(x)
    assert torch.equal(module(x)[0], y)
    assert taken[-1]  # a transform that has ended leaves nothing behind


def test_a_tangent_is_not_lost(taken: list[bool]) -> None:
    module = rnnattn.LSTM(I, H)
    x = torch.randn(3, 2, I)
    module(x), module(x)
    prepared = module.eval().prepare_inference()
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        taken.clear()
        for run in (module, prepared):
            with contextlib.suppress(RuntimeError) if run is prepared else contextlib.nullcontext():
                assert torch.autograd.forward_ad.unpack_dual(run(dual)[0]).tangent is not None
    assert taken == [False]


def test_saved_tensor_hooks_see_what_is_saved(taken: list[bool]) -> None:
    module = rnnattn.LSTM(I, H, dtype=F64)
    x = torch.randn(3, 2, I, dtype=F64, requires_grad=True)
    (want,) = torch.autograd.grad(module(x)[0].square().sum(), x)
    packed = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = module(x)[0]
    assert taken == [False] and any(t is x for t in packed) and any(t is module.weight_hh_l0 for t in packed)
    close(torch.autograd.grad(y.square().sum(), x)[0], want)


@pytest.mark.parametrize("change", ["contiguous", "another order"])
@each_layer
def test_what_hooks_give_back_may_lie_otherwise(name: str, change: str, taken: list[bool]) -> None:
    theirs, ours = twins(name)
    given_arguments = arguments(ours, grad=True)
    ours(*given_arguments)

    def unpack(t: Tensor) -> Tensor:
        if change == "contiguous":
            return t.contiguous()
        return t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))

    gradients = []
    for module in (theirs, ours):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            y = flat(module(*given_arguments))[0]
        gradients.append(torch.autograd.grad(y.square().sum(), flat(given_arguments), allow_unused=True)[:1])
    close(*gradients)
    assert taken == [False]


@each_layer
def test_cotangents_of_other_kinds_go_through_the_operator(name: str, taken: list[bool]) -> None:
    theirs, ours = twins(name)
    given_arguments = arguments(ours, grad=True)
    ours(*given_arguments)
    want, got = (flat(module(*given_arguments))[0] for module in (theirs, ours))
    negative = torch._neg_view(torch.randn_like(want))
    assert negative.is_neg()
    close(*(torch.autograd.grad(y, given_arguments[0], negative, retain_graph=True) for y in (got, want)))
    with FakeTensorMode(allow_non_fake_inputs=True):
        (dx,) = torch.autograd.grad(got, given_arguments[0], torch.ones(want.shape, dtype=F64))
    assert isinstance(dx, FakeTensor) and dx.shape == given_arguments[0].shape
    assert taken == [True]


@each_layer
def test_no_two_gradients_share_memory(name: str, taken: list[bool]) -> None:
    _, ours = twins(name)
    for _ in range(2):  # the long way too
        y = flat(ours(*arguments(ours)))[0]
        gradients = torch.autograd.grad(y.sum(), list(ours.parameters()))
        assert len({d.untyped_storage().data_ptr() for d in gradients}) == len(gradients)
    assert taken == [True]


def test_storage_that_was_freed_is_refused(taken: list[bool]) -> None:
    def freed(*shape: int) -> Tensor:
        t = torch.randn(shape)
        t.untyped_storage().resize_(0)
        return t

    module = rnnattn.LSTM(I, H)
    x, state = torch.randn(3, 2, I, requires_grad=True), torch.randn(1, 2, H)
    with torch.no_grad():
        prepared = rnnattn.LSTM(I, H).eval().prepare_inference()
    for called in (module, prepared, module, prepared):  # the second time each goes directly
        with pytest.raises(RuntimeError, match="x: expected a tensor with data"):
            called(freed(3, 2, I))
        # Before a call goes directly, torch says so of the layer's part of the states.
        with pytest.raises(RuntimeError, match=r"h0: expected a tensor with data|storage of size 0"):
            called(x.detach(), (freed(1, 2, H), state))
        with pytest.raises(RuntimeError, match=r"c0: expected a tensor with data|storage of size 0"):
            called(x.detach(), (state, freed(1, 2, H)))
        called(x.detach())
    y = module(x)[0]
    y.detach().untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="y: expected a tensor with data"):
        y.backward(torch.ones(3, 2, H))
    module.weight_hh_l0.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="weights: expected a tensor with data"):
        module(x)


def test_a_nonlinearity_that_there_is_not_is_refused(taken: list[bool]) -> None:
    cell = rnnattn.RNNCell(I, H)
    x = torch.randn(2, I)
    cell(x), cell(x)
    for wrong in ("Tanh", None):
        cell.nonlinearity = wrong
        with pytest.raises(RuntimeError, match=f"Unknown nonlinearity: {wrong}"):
            cell(x)


@each_layer
def test_a_module_that_was_called_can_be_copied(name: str, taken: list[bool]) -> None:
    _, ours = twins(name)
    given_arguments = arguments(ours)
    for _ in range(2):
        want = flat(ours(*given_arguments))
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        taken.clear()
        assert all(torch.equal(a, b) for a, b in zip(flat(other(*given_arguments)), want, strict=True))
        assert taken == [True]
