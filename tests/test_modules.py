"""The modules are drop-in: LSTM and LSTMCell beside torch.nn's, AttentionPool and SequenceClassifier beside
the lines of PyTorch they stand for."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import backend_parameters
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence, pad_sequence

import rnnattn

F64 = torch.float64
I, H = 5, 6
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stack": {"num_layers": 3},
    "no bias": {"bias": False},
    "batch first": {"batch_first": True},
    "bidirectional": {"bidirectional": True},
    "projection": {"proj_size": 3},
    "dropout": {"num_layers": 2, "dropout": 0.4},
    "all": {
        "num_layers": 2,
        "bias": False,
        "batch_first": True,
        "dropout": 0.25,
        "bidirectional": True,
        "proj_size": 2,
    },
}
options_ids = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@pytest.fixture(autouse=True, params=backend_parameters("reference", "cpp", "torch"))
def chosen(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test here runs on each of these; the kernels themselves are held to the cases elsewhere."""
    with rnnattn.use_backend(request.param):
        yield request.param


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def twins(**options: Any) -> tuple[nn.LSTM, rnnattn.LSTM]:
    """torch's and ours with the same float64 parameters, both drawn from the same seed."""
    torch.manual_seed(1)
    theirs = nn.LSTM(I, H, dtype=F64, **options)
    torch.manual_seed(1)
    return theirs, rnnattn.LSTM(I, H, dtype=F64, **options)


def states(module: nn.LSTM, *B: int) -> tuple[Tensor, Tensor]:
    layers = module.num_layers * (2 if module.bidirectional else 1)
    return torch.randn(layers, *B, module.proj_size or H, dtype=F64), torch.randn(layers, *B, H, dtype=F64)


def gradients(outputs: Any, module: nn.Module, *inputs: Tensor) -> tuple[Tensor, ...]:
    """With cotangents that depend on the shapes alone, so that two modules get the same."""
    flat = [outputs[0].data if isinstance(outputs[0], PackedSequence) else outputs[0], *outputs[1]]
    draw = torch.Generator().manual_seed(7)
    cotangents = [torch.randn(value.shape, generator=draw, dtype=F64) for value in flat]
    return torch.autograd.grad(flat, [*inputs, *module.parameters()], cotangents, retain_graph=True)


# --- LSTM: what it is -----------------------------------------------------------------------------


@options_ids
def test_same_parameters_from_the_same_seed(options: dict[str, Any]) -> None:
    theirs, ours = twins(**options)
    want, got = theirs.state_dict(), ours.state_dict()
    assert list(got) == list(want)
    assert all(torch.equal(got[key], want[key]) for key in want)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert repr(ours) == repr(theirs)


@options_ids
def test_state_dict_goes_both_ways(options: dict[str, Any]) -> None:
    theirs, ours = nn.LSTM(I, H, **options).eval(), rnnattn.LSTM(I, H, **options).eval()
    x = torch.randn(3, 4, I)
    assert not torch.equal(theirs(x)[0], ours(x)[0])
    ours.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    fresh = nn.LSTM(I, H, **options).eval()
    fresh.load_state_dict(ours.state_dict(), strict=True)
    assert torch.equal(fresh(x)[0], theirs(x)[0])
    assert ours.all_weights[0][0] is ours.weight_ih_l0


def test_arguments_are_positional_as_torchs() -> None:
    arguments = (I, H, 2, False, True, 0.5, True, 3, "cpu", F64)
    assert repr(rnnattn.LSTM(*arguments)) == repr(nn.LSTM(*arguments))
    assert rnnattn.LSTM(*arguments).weight_ih_l0.dtype == F64
    assert repr(rnnattn.LSTM(input_size=I, hidden_size=H)) == repr(nn.LSTM(I, H))
    assert rnnattn.LSTM(I, H, device="meta").weight_ih_l0.is_meta


@pytest.mark.parametrize("way", ["pickle", "deepcopy", "torch.save"])
def test_copies(way: str) -> None:
    _, module = twins(num_layers=2, bidirectional=True)
    if way == "pickle":
        other = pickle.loads(pickle.dumps(module))
    elif way == "deepcopy":
        other = copy.deepcopy(module)
    else:
        torch.save(module, file := io.BytesIO())
        other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    x = torch.randn(3, 2, I, dtype=F64)
    assert type(other) is rnnattn.LSTM
    assert all(a is not b and torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))
    before = module(x)[0]
    assert torch.equal(other(x)[0], before)
    with torch.no_grad():
        other.weight_hh_l0.zero_()
    assert torch.equal(module(x)[0], before)
    assert not torch.equal(other(x)[0], before)


# --- LSTM: what it computes -----------------------------------------------------------------------


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("batched", [True, False], ids=["3d", "2d"])
@options_ids
def test_forward_and_backward(options: dict[str, Any], batched: bool, given: bool) -> None:
    theirs, ours = twins(**(options | {"dropout": 0.0}))
    x = torch.randn(*((4, 3, I) if batched else (4, I)), dtype=F64, requires_grad=True)
    B = (x.shape[0 if ours.batch_first else 1],) if batched else ()
    hx = tuple(s.requires_grad_() for s in states(theirs, *B)) if given else None
    want, got = theirs(x, hx), ours(x, hx)
    close(got, want)
    inputs = (x, *(hx or ()))
    close(gradients(got, ours, *inputs), gradients(want, theirs, *inputs))


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("sorted_", [True, False], ids=["sorted", "unsorted"])
@options_ids
def test_packed(options: dict[str, Any], sorted_: bool, given: bool) -> None:
    theirs, ours = twins(**(options | {"dropout": 0.0}))
    lengths = torch.tensor([5, 4, 2, 1] if sorted_ else [2, 5, 1, 4])
    x = torch.randn(4, 5, I, dtype=F64, requires_grad=True)
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=sorted_)
    hx = tuple(s.requires_grad_() for s in states(theirs, 4)) if given else None
    want, got = theirs(packed, hx), ours(packed, hx)
    assert isinstance(got[0], PackedSequence)
    assert got[0].batch_sizes is packed.batch_sizes and got[0].sorted_indices is packed.sorted_indices
    close((got[0].data, got[1]), (want[0].data, want[1]))
    close(pad_packed_sequence(got[0], total_length=7), pad_packed_sequence(want[0], total_length=7))
    inputs = (x, *(hx or ()))
    close(gradients(got, ours, *inputs), gradients(want, theirs, *inputs))


@pytest.mark.parametrize("form", ["list", "int64", "int32", "int16"])
def test_lengths_are_packing(form: str) -> None:
    theirs, ours = twins(num_layers=2, bidirectional=True, batch_first=True)
    x, lengths = torch.randn(3, 5, I, dtype=F64), [3, 5, 1]
    packed, want_states = theirs(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
    want = pad_packed_sequence(packed, batch_first=True)[0]
    got, got_states = ours(x, lengths=lengths if form == "list" else torch.tensor(lengths, dtype=getattr(torch, form)))
    close((got, got_states), (want, want_states))


def test_lengths_of_an_unbatched_sequence() -> None:
    _, ours = twins()
    x = torch.randn(5, I, dtype=F64)
    y, (h, c) = ours(x, lengths=[3])
    want, (h3, c3) = ours(x[:3])
    close((y[:3], h, c), (want, h3, c3))
    assert y.shape == (5, H) and not y[3:].any()


@pytest.mark.parametrize("bidirectional", [False, True])
def test_dropout_draws_as_torch(bidirectional: bool) -> None:
    """In training with the same seed the same elements are dropped; in evaluation none."""
    theirs, ours = twins(num_layers=3, dropout=0.5, bidirectional=bidirectional)
    x = torch.randn(4, 3, I, dtype=F64, requires_grad=True)
    results = []
    for module in (theirs, ours):
        torch.manual_seed(5)
        outputs = module(x)
        results.append((outputs, gradients(outputs, module, x)))
    close(results[1], results[0])
    torch.manual_seed(6)
    assert not torch.allclose(ours(x)[0], results[1][0][0])
    want, got = theirs.eval()(x), ours.eval()(x)
    close(got, want)
    close(gradients(got, ours, x), gradients(want, theirs, x))


def test_certain_dropout() -> None:
    theirs, ours = twins(num_layers=2, dropout=1.0)
    x = torch.randn(4, 3, I, dtype=F64)
    close(ours(x), theirs(x))


def test_an_empty_batch(chosen: str) -> None:
    _, ours = twins(num_layers=2, bidirectional=True)
    if chosen == "torch":
        with pytest.raises(rnnattn.BackendError, match="empty batch"):
            ours(torch.zeros(4, 0, I, dtype=F64))
        return
    outputs = ours(torch.zeros(4, 0, I, dtype=F64, requires_grad=True))
    assert outputs[0].shape == (4, 0, 2 * H) and outputs[1][0].shape == (4, 0, H)
    assert all(not g.any() for g in gradients(outputs, ours))


def test_inference_mode() -> None:
    theirs, ours = twins(num_layers=2)
    x = torch.randn(4, 3, I, dtype=F64)
    with torch.inference_mode():
        got = ours(x)
        assert got[0].is_inference()
        close(got, theirs(x))


def test_functional_call() -> None:
    theirs, ours = twins(num_layers=2)
    x, others = torch.randn(4, 3, I, dtype=F64), twins(num_layers=2)[0]
    with torch.no_grad():
        parameters = {name: torch.randn_like(p) for name, p in others.named_parameters()}
    before = ours(x)
    close(torch.func.functional_call(ours, parameters, (x,)), torch.func.functional_call(theirs, parameters, (x,)))
    close(ours(x), before)


def test_replaced_parameters_are_used() -> None:
    theirs, ours = twins()
    x = torch.randn(4, 3, I, dtype=F64)
    for module in (theirs, ours):
        module.weight_hh_l0 = nn.Parameter(torch.full_like(module.weight_hh_l0, 0.1))
    close(ours(x), theirs(x))


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
def test_autocast(given: bool) -> None:
    """As nn.LSTM: 16-bit inputs (what a Linear hands on) or fp32 ones, 16-bit results, fp32 gradients."""
    model = nn.ModuleList([nn.Linear(I, I), nn.LSTM(I, H, 2), rnnattn.AttentionPool(H, "additive", batch_first=False)])
    x, hx = torch.randn(4, 3, I), (torch.randn(2, 3, H), torch.randn(2, 3, H)) if given else None
    linear, theirs, pool = model
    ours = rnnattn.LSTM(I, H, 2)
    ours.load_state_dict(theirs.state_dict())
    want = theirs(linear(x), hx)[0]
    with torch.autocast("cpu", torch.bfloat16):
        torchs = theirs(linear(x), hx)
        got, (h_n, c_n) = ours(linear(x), hx)
        from_fp32 = ours(x, hx)[0]
        pooled = pool(got)
    assert got.dtype == torchs[0].dtype == from_fp32.dtype
    assert (h_n.dtype, c_n.dtype) == (torchs[1][0].dtype, torchs[1][1].dtype)
    torch.testing.assert_close(got.float(), want, rtol=2**-5, atol=2**-6)
    pooled.float().square().sum().backward()
    for p in (*ours.parameters(), *pool.parameters(), linear.weight):
        assert p.grad.dtype == torch.float32 and p.grad.abs().max() > 0


# --- LSTMCell ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("batch", [(3,), (), (0,)], ids=["batched", "unbatched", "empty"])
@pytest.mark.parametrize("bias", [True, False])
def test_cell(batch: tuple[int, ...], bias: bool, given: bool, chosen: str) -> None:
    torch.manual_seed(1)
    theirs = nn.LSTMCell(I, H, bias, dtype=F64)
    torch.manual_seed(1)
    ours = rnnattn.LSTMCell(I, H, bias, dtype=F64)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))
    x = torch.randn(*batch, I, dtype=F64, requires_grad=True)
    hx = tuple(torch.randn(*batch, H, dtype=F64, requires_grad=True) for _ in range(2)) if given else None
    if chosen == "torch" and batch == (0,):
        with pytest.raises(rnnattn.BackendError, match="empty batch"):
            ours(x, hx)
        return
    want, got = theirs(x, hx), ours(x, hx)
    close(got, want)
    cotangents = [torch.randn_like(h) for h in want]
    inputs = (x, *(hx or ()))
    close(
        torch.autograd.grad(got, [*inputs, *ours.parameters()], cotangents),
        torch.autograd.grad(want, [*inputs, *theirs.parameters()], cotangents),
    )


def test_cell_copies() -> None:
    module = rnnattn.LSTMCell(I, H)
    x = torch.randn(2, I)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is rnnattn.LSTMCell
        assert torch.equal(other(x)[0], module(x)[0])


# --- AttentionPool ----------------------------------------------------------------------------------


def composed(pool: rnnattn.AttentionPool, x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """What the docstring says AttentionPool is equivalent to, over x [B, T, D]; every row keeps something."""
    u = x if pool.weight is None else torch.tanh(F.linear(x, pool.weight, pool.bias))
    p = (u @ pool.v).masked_fill(~keep, -torch.inf).softmax(1)
    return (p[..., None] * x).sum(1), p


POOLS: dict[str, dict[str, Any]] = {
    "linear": {},
    "additive": {"score": "additive"},
    "narrow": {"score": "additive", "attention_size": 3},
    "no bias": {"score": "additive", "attention_size": 2, "bias": False},
}
pools = pytest.mark.parametrize("options", POOLS.values(), ids=POOLS)


@pools
def test_pool(options: dict[str, Any]) -> None:
    pool = rnnattn.AttentionPool(I, **options, dtype=F64)
    x = torch.randn(3, 4, I, dtype=F64, requires_grad=True)
    keep = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0], [1, 1, 1, 1]]).bool()
    for got, kept in (
        (pool(x, return_weights=True), torch.ones_like(keep)),
        (pool(x, mask=keep, return_weights=True), keep),
        (pool(x, lengths=[4, 2, 1], return_weights=True), torch.arange(4) < torch.tensor([[4], [2], [1]])),
    ):
        want = composed(pool, x, kept)
        close(got, want)
        leaves, cotangents = [x, *pool.parameters()], [torch.randn_like(value) for value in want]
        close(torch.autograd.grad(got, leaves, cotangents), torch.autograd.grad(want, leaves, cotangents))
    close(pool(x), composed(pool, x, torch.ones_like(keep))[0])


@pools
def test_pool_forms_agree(options: dict[str, Any]) -> None:
    """Unbatched, time first and packed give what the padded batch gives."""
    pool = rnnattn.AttentionPool(I, **options, dtype=F64)
    rows = [torch.randn(n, I, dtype=F64) for n in (3, 5, 1)]
    x, lengths = pad_sequence(rows, batch_first=True), torch.tensor([3, 5, 1])
    want, weights = pool(x, lengths=lengths, return_weights=True)
    for n, row in enumerate(rows):
        pooled, p = pool(row, return_weights=True)
        close((pooled, p), (want[n], weights[n, : len(row)]))
        close(pool(x[n], mask=torch.arange(5) < len(row)), want[n])
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    close(pool(packed, return_weights=True), (want, weights))
    time_first = rnnattn.AttentionPool(I, **options, batch_first=False, dtype=F64)
    time_first.load_state_dict(pool.state_dict())
    close(time_first(x.transpose(0, 1), lengths=lengths, return_weights=True), (want, weights))


def test_pool_is_what_users_write() -> None:
    """`Linear -> softmax -> sum` and `Linear -> Tanh -> Linear`, parameters taken over; the scores' bias cancels."""
    x = torch.randn(3, 4, I, dtype=F64)
    linear = nn.Linear(I, 1, dtype=F64)
    pool = rnnattn.AttentionPool(I, dtype=F64)
    pool.load_state_dict({"v": linear.weight[0]})
    close(pool(x), (linear(x).softmax(1) * x).sum(1))
    scores = nn.Sequential(nn.Linear(I, 3), nn.Tanh(), nn.Linear(3, 1, bias=False)).to(F64)
    additive = rnnattn.AttentionPool(I, "additive", 3, dtype=F64)
    additive.load_state_dict({"v": scores[2].weight[0], "weight": scores[0].weight, "bias": scores[0].bias})
    close(additive(x), (scores(x).softmax(1) * x).sum(1))


def test_pool_repr_and_initial_values() -> None:
    assert repr(rnnattn.AttentionPool(5)) == "AttentionPool(5, score=linear)"
    pool = rnnattn.AttentionPool(100, "additive", 25, bias=False, batch_first=False)
    assert repr(pool) == "AttentionPool(100, score=additive, attention_size=25, bias=False, batch_first=False)"
    assert pool.v.abs().max() <= 0.2 and pool.weight.abs().max() <= 0.1  # 1 / sqrt(fan in)
    assert pool.v.abs().max() > 0.15 and pool.weight.abs().max() > 0.09
    other = copy.deepcopy(pool)
    x = torch.randn(4, 2, 100)
    assert torch.equal(pickle.loads(pickle.dumps(pool))(x), other(x))


# --- SequenceClassifier and nesting ---------------------------------------------------------------


@pytest.mark.parametrize("score", ["linear", "additive"])
def test_classifier(score: str) -> None:
    model = rnnattn.SequenceClassifier(3, H, I, num_embeddings=11, num_layers=2, score=score, dropout=0.5).double()
    ids, lengths = torch.randint(1, 11, (4, 6)), torch.tensor([6, 2, 1, 4])
    theirs = nn.LSTM(I, H, 2, batch_first=True, bidirectional=True, dtype=F64)
    theirs.load_state_dict(model.recurrent.state_dict())
    model.eval()
    packed, _ = theirs(pack_padded_sequence(model.embedding(ids), lengths, batch_first=True, enforce_sorted=False))
    states, _ = pad_packed_sequence(packed, batch_first=True)
    pooled, weights = composed(model.pool, states, torch.arange(6) < lengths[:, None])
    want = model.classes(pooled)
    logits, p = model(ids, lengths, return_weights=True)
    close((logits, p), (want, weights))
    close(model(ids, lengths), want)
    model.train()
    torch.manual_seed(3)
    first = model(ids, lengths)
    assert not torch.allclose(first, want)
    first.logsumexp(1).sum().backward()
    assert all(q.grad is not None and q.grad.isfinite().all() for q in model.parameters())
    assert not model.embedding.weight.grad[0].any()  # padding


def test_classifier_of_features_ignores_padding() -> None:
    model = rnnattn.SequenceClassifier(2, H, I, bidirectional=False)
    x = torch.randn(3, 5, I)
    want = model(x, [2, 5, 1])
    x[0, 2:], x[2, 1:] = torch.nan, torch.inf
    assert torch.equal(model(x, [2, 5, 1]), want)


def test_classifier_learns() -> None:
    """Which of two markers stands anywhere in a noisy sequence: from chance to certain."""
    model = rnnattn.SequenceClassifier(2, 8, 4, num_embeddings=8)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    ids, labels = torch.randint(1, 6, (32, 6)), torch.arange(32) % 2
    ids[torch.arange(32), torch.randint(0, 6, (32,))] = 6 + labels
    losses = []
    for _ in range(25):
        loss = F.cross_entropy(model(ids), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.6
    assert losses[-1] < 0.1
    assert (model(ids).argmax(1) == labels).all()


def test_nested_modules_move_and_freeze() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.ModuleDict(
                {"rnn": rnnattn.LSTM(I, H, batch_first=True), "pool": rnnattn.AttentionPool(H)}
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder["pool"](self.encoder["rnn"](x)[0])

    net, x = Net(), torch.randn(2, 4, I)
    want = net(x)
    torch.testing.assert_close(net.double()(x.double()).float(), want, rtol=1e-5, atol=1e-6)
    for p in net.encoder["rnn"].parameters():
        p.requires_grad_(False)
    net(x.double()).sum().backward()
    assert net.encoder["pool"].v.grad is not None
    assert all(p.grad is None for p in net.encoder["rnn"].parameters())
