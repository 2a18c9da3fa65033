"""torch.autocast and GradScaler, on the CPU and, where there is one, on a GPU: the dtype asked for stays, gradients are
fp32, and casts are made once a call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import BF16, F16, F32, F64, OWN, backend_parameters, device_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import rnnattn

I, H = 4, 5
kinds = pytest.mark.parametrize("kind", ("LSTM", "GRU", "RNN"))
dtypes = pytest.mark.parametrize("dtype", (BF16, F16), ids=("bf16", "fp16"))


@pytest.fixture(params=backend_parameters(*OWN))
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the backend runs, which is chosen."""
    torch.manual_seed(0)
    with rnnattn.use_backend(request.param):
        yield device_of(request.param).type


def each(states: Any) -> tuple[Tensor, ...]:
    return states if isinstance(states, tuple) else (states,)


@dtypes
@pytest.mark.parametrize("given", (False, True), ids=("zeros", "hx"))
@kinds
def test_results_are_of_that_dtype(kind: str, given: bool, dtype: torch.dtype, device: str) -> None:
    """As nn.LSTM's: for 16-bit inputs, which are what a Linear hands on, and for fp32 ones."""
    linear, pool = nn.Linear(I, I).to(device), rnnattn.AttentionPool(H, "additive", batch_first=False).to(device)
    theirs, ours = getattr(nn, kind)(I, H, 2).to(device), getattr(rnnattn, kind)(I, H, 2).to(device)
    ours.load_state_dict(theirs.state_dict())
    x, hx = torch.randn(4, 3, I, device=device), None
    if given:
        states = tuple(torch.randn(2, 3, H, device=device) for _ in range(2))
        hx = states if kind == "LSTM" else states[0]
    want = theirs(linear(x), hx)[0]
    with torch.autocast(device, dtype):
        got, finals = ours(linear(x), hx)
        from_fp32 = ours(x, hx)[0]
        pooled = pool(got)
    assert {t.dtype for t in (got, from_fp32, pooled, *each(finals))} == {dtype}
    torch.testing.assert_close(got.float(), want, rtol=2**-5, atol=2**-6)
    pooled.float().square().sum().backward()
    for p in (*ours.parameters(), *pool.parameters(), linear.weight):
        assert p.grad.dtype == F32 and p.grad.abs().max() > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="its CPU kernel")
def test_torchs_lstm_does_the_same() -> None:
    with torch.autocast("cpu", BF16):
        assert nn.LSTM(I, H, 2)(torch.randn(4, 3, I))[0].dtype == BF16


@dtypes
@kinds
def test_float64_stays(kind: str, dtype: torch.dtype) -> None:
    """As autocast leaves it everywhere."""
    module, x = getattr(rnnattn, kind)(I, H).double(), torch.randn(4, 3, I, dtype=F64)
    with torch.autocast("cpu", dtype):
        assert module(x)[0].dtype == F64


class Casts(TorchDispatchMode):
    """Counts the tensors that are cast, by their shape."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._to_copy.default:
            self.shapes[tuple(args[0].shape)] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", backend_parameters("cpp", "triton", "cuda"))
@kinds
def test_casts_are_made_once_a_call(kind: str, backend: str) -> None:
    device = device_of(backend).type
    module, found = getattr(rnnattn, kind)(I, H).to(device), []
    for T in (2, 9):
        with rnnattn.use_backend(backend), torch.autocast(device, BF16), Casts() as casts:
            module(torch.randn(T, 3, I, device=device))[0].float().sum().backward()
        found.append(casts.shapes)
    shapes = [tuple(p.shape) for p in module.parameters()]
    assert all(found[0][shape] == found[1][shape] for shape in shapes) and found[0].total() == found[1].total()
    assert found[0][tuple(module.weight_hh_l0.shape)] >= 1


@pytest.mark.parametrize("backend", backend_parameters("cpp", "triton", "cuda"))
@pytest.mark.parametrize("settings", ({}, {"proj_size": 3}, {"num_layers": 2}), ids=str)
def test_gradients_asked_for_within_are_of_the_forwards_type(settings: dict[str, Any], backend: str) -> None:
    device = device_of(backend).type
    module = rnnattn.LSTM(I, H, **settings).to(device)
    pool = rnnattn.AttentionPool(settings.get("proj_size", H), "additive", batch_first=False).to(device)
    x = torch.randn(1, 3, I, device=device, requires_grad=True)
    hx = tuple(torch.randn_like(t).requires_grad_() for t in module(x)[1])
    leaves, results = [x, *hx, *module.parameters(), *pool.parameters()], []
    with rnnattn.use_backend(backend):
        for within in (False, True, True):
            loss = pool(module(x, hx)[0]).square().sum()
            with torch.autocast(device, BF16, enabled=within):
                results.append(torch.autograd.grad(loss, leaves))
    for got in results[1:]:
        torch.testing.assert_close(got, results[0], rtol=1e-5, atol=1e-6)


@kinds
def test_a_scaled_training_step(kind: str, device: str) -> None:
    """An infinite gradient leaves the step out and halves the scale; after that the weights move."""
    module = getattr(rnnattn, kind)(I, H).to(device)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    start = [p.detach().clone() for p in module.parameters()]
    for step in range(2):
        x = torch.randn(4, 3, I, device=device)
        with torch.autocast(device, F16):
            loss = module(x if step else x * torch.inf)[0].float().square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer), scaler.update()
        changed = [not torch.equal(p, q) for p, q in zip(module.parameters(), start, strict=True)]
        assert scaler.get_scale() == 512 and all(changed) == any(changed) == bool(step)
