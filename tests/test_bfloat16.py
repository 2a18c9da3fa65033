"""What the ways of the C++ kernels with bfloat16 must not do to a layer's results, on the instruction set at hand."""

from __future__ import annotations

import pytest
import torch
from cases import backend_parameters
from torch import Tensor

import rnnattn

pytestmark = pytest.mark.parametrize("backend", backend_parameters("cpp"))
LAYERS = [rnnattn.LSTM, rnnattn.GRU, rnnattn.RNN]


def gradients(module: torch.nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = module(x)[0]
    torch.manual_seed(1)
    return list(torch.autograd.grad(y, [x, *module.parameters()], torch.randn_like(y)))


@pytest.mark.parametrize("layer", LAYERS)
def test_what_memory_held_before_makes_no_difference(layer: type, backend: str) -> None:
    """195 steps: GEMMs read on to the next multiple of 32, and NaN times zero is NaN."""
    torch.manual_seed(0)
    module = layer(16, 48).bfloat16()
    x = torch.randn(3, 65, 16).bfloat16()
    with rnnattn.use_backend(backend):
        for _ in range(10):
            gradients(module, torch.full_like(x, torch.nan))
            assert all(gradient.isfinite().all() for gradient in gradients(module, x))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    "x",
    [
        torch.randn(1, 24, 200).bfloat16().permute(2, 0, 1),
        torch.randn(24, 200).bfloat16().t()[None],
        torch.randn(150, 1, 1).bfloat16().expand(150, 1, 24),
        torch.randn(40, 8, 48).bfloat16()[:, ::2, ::2],
    ],
    ids=["permuted", "one-step", "expanded", "sliced"],
)
def test_input_whose_numbers_are_apart(layer: type, x: Tensor, backend: str) -> None:
    torch.manual_seed(0)
    module = layer(24, 32).bfloat16()
    assert x.stride(-1) != 1
    with rnnattn.use_backend(backend):
        for found, expected in zip(gradients(module, x), gradients(module, x.contiguous()), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_no_input_features(backend: str) -> None:
    H, x = 32, torch.empty(16, 16, 0, dtype=torch.bfloat16, requires_grad=True)
    states = [torch.zeros(1, 16, H, dtype=torch.bfloat16) for _ in range(2)]
    weights = [
        torch.randn(size).mul(0.2).bfloat16().requires_grad_() for size in ((4 * H, 0), (4 * H, H), 4 * H, 4 * H)
    ]
    with rnnattn.use_backend(backend):
        y = rnnattn.functional.lstm(x, tuple(states), weights)[0]
        dx, dw_ih, dw_hh, *_ = torch.autograd.grad(y, [x, *weights], torch.randn_like(y))
    assert dx.shape == x.shape and dw_ih.shape == (4 * H, 0) and dw_hh.isfinite().all() and dw_hh.any()


@pytest.mark.parametrize("bias", [6.0, 9.0])
def test_long_memory(bias: float, backend: str) -> None:
    """Forget gates near 1: an error of f that is small beside f is large beside 1 - f, and c meets it at every step."""
    torch.manual_seed(0)
    module = rnnattn.LSTM(16, 64).bfloat16()
    with torch.no_grad():
        module.weight_hh_l0.zero_()
        module.weight_ih_l0[64:128] *= 0.25
        module.bias_ih_l0.zero_()[64:128] = bias
        module.bias_hh_l0.zero_()[:64] = -bias
    x, h, c = torch.randn(2000, 16, 16).bfloat16(), torch.zeros(1, 16, 64).bfloat16(), torch.ones(1, 16, 64).bfloat16()
    with torch.inference_mode():
        with rnnattn.use_backend(backend):
            _, (_, found) = module(x, (h, c))
        with rnnattn.use_backend("reference"):
            _, (_, exact) = module.double()(x.double(), (h.double(), c.double()))
    assert (found - exact).norm() / exact.norm() < 0.006  # of rounding the last state alone 0.002
