"""Memory that the C++ engine keeps for the next call: reused, limited, given back, safe among threads and in forks."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import rnnattn
from rnnattn import backends

_reason = backends.unavailable("cpp")
pytestmark = pytest.mark.skipif(_reason is not None, reason=f"backend cpp: {_reason}")

MIB = 1 << 20
T, B, H = 32, 64, 128
GATES = 4 * 4 * T * B * H  # bytes that an LSTM saves, 4 MiB


def train(T: int = T, seed: int = 0) -> list[torch.Tensor]:
    """The gradients of a step whose gates are large."""
    torch.manual_seed(seed)
    lstm = rnnattn.LSTM(H, H)
    x = torch.randn(T, B, H, requires_grad=True)
    with rnnattn.use_backend("cpp"):
        y, _ = lstm(x)
    return list(torch.autograd.grad(y, [x, *lstm.parameters()], torch.randn_like(y)))


@pytest.fixture(autouse=True)
def empty() -> Iterator[None]:
    """Nothing is kept yet; and memory is not filled with NaN, as in all other tests, or nothing would be kept."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    gc.collect()
    rnnattn.empty_cache()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True


def test_memory_is_kept_and_given_back():
    train()
    assert rnnattn.empty_cache() >= GATES
    assert rnnattn.empty_cache() == 0


def test_memory_is_used_again():
    train()
    kept = rnnattn.empty_cache()
    for _ in range(5):
        train()
    assert rnnattn.empty_cache() == kept


def test_results_do_not_depend_on_what_was_in_the_memory():
    expected = train()
    for length in (T, T + 3, T):  # others leave their numbers there
        train(length, seed=1)
    torch.testing.assert_close(train(), expected, rtol=0, atol=0)


def test_memory_in_use_is_not_given_to_another_call():
    lstm = rnnattn.LSTM(H, H)
    x = torch.randn(T, B, H, requires_grad=True)
    inputs = [x, *lstm.parameters()]
    with rnnattn.use_backend("cpp"):
        outputs = [lstm(x)[0] for _ in range(3)]  # the same gates, three times
    dy = torch.randn_like(outputs[0])
    gradients = [torch.autograd.grad(y, inputs, dy) for y in reversed(outputs)]
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=0, atol=0)


def test_what_is_kept_has_a_limit():
    limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 64 if hasattr(os, "sysconf") else 256 * MIB
    sizes = [n * MIB for n in (40, 52, 68, 90, 120, 160)]  # none fits where another was
    assert sum(sizes) > min(limit, 512 * MIB)
    for size in sizes:
        train(T * size // GATES)
    assert 0 < rnnattn.empty_cache() <= limit


def test_many_threads():
    lstm = rnnattn.LSTM(H, H)
    xs = [torch.randn(T, B, H) for _ in range(8)]
    dy = torch.randn(T, B, H)

    def step(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(lstm(x)[0], list(lstm.parameters()), dy)

    with rnnattn.use_backend("cpp"), ThreadPoolExecutor(8) as pool:
        expected = [step(x) for x in xs]
        for found in (pool.map(step, xs) for _ in range(3)):
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_memory_that_is_to_be_filled_is_not_kept():
    torch.utils.deterministic.fill_uninitialized_memory = True
    train()
    assert rnnattn.empty_cache() == 0
