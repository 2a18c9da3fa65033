"""What only a GPU can show: kernels that a CUDA graph replays, on two streams at once, on another device, and in TF32.

The sequence kernels are in the first place meant: their programs wait for each other within a launch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest
import torch
from cases import BF16, F16, F32, device_of, interpreted, moved, recurrent_precision, truth
from recurrent_cases import RecurrentCase
from tolerances import TOLERANCES, relative_error
from torch import Tensor, nn

import rnnattn
from rnnattn import backends
from rnnattn.backends import products, sequence_choice

pytestmark = pytest.mark.skipif(interpreted(), reason="needs a GPU")

Result = TypeVar("Result")
CUDA = torch.device("cuda")
I, ROUNDS, REPLAYS = 24, 40, 4
SHAPES = {"T0": (3, 40, 32), "T1": (16, 60, 256)}  # B, T, H, of the tier on an H100
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.fixture(params=[pytest.param("triton", id="sequence"), pytest.param("cuda", id="stepwise")])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """The sequence kernels, and those of CUDA C++ for one step."""
    if reason := backends.unavailable(request.param):
        pytest.skip(reason)
    with rnnattn.use_backend(request.param):
        yield request.param


def takes_a_sequence(B: int, T: int, H: int, dtype: torch.dtype, mode: str = "LSTM") -> None:
    """Skips where this GPU's plan is another."""
    if any(sequence_choice.launch_for(CUDA, mode, B, T, H, dtype, 1, way) is None for way in (False, True)):
        pytest.skip(f"here B={B}, H={H} goes step by step")


class Model(nn.Module):
    """A ragged layer, pooled."""

    def __init__(self, H: int, dtype: torch.dtype, device: torch.device = CUDA) -> None:
        super().__init__()
        self.lstm = rnnattn.LSTM(I, H, device=device, dtype=dtype)
        self.pool = rnnattn.AttentionPool(H, "additive", 20, batch_first=False, device=device, dtype=dtype)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        y, _ = self.lstm(x, lengths=lengths)
        return self.pool(y, lengths=lengths)


def inputs(B: int, T: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x, lengths = torch.randn(T, B, I, generator=draw), torch.randint(0, T + 1, (B,), generator=draw)
    return x.to(CUDA, dtype), lengths.to(CUDA)


def captured(run: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A graph of the call, and its results, which every replay writes anew. As torch asks, there are calls on another
    stream first, which compile kernels and make what is made once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


@each_shape
def test_a_graph_of_inference_takes_new_inputs(shape: tuple[int, int, int], kernels: str) -> None:
    B, T, H = shape
    if kernels == "triton":
        takes_a_sequence(B, T, H, BF16)
    model, (x, lengths) = Model(H, BF16), inputs(B, T, BF16, 0)
    with torch.no_grad():
        graph, pooled = captured(lambda: model(x, lengths))
        for seed in range(1, 1 + REPLAYS):
            for static, new in zip((x, lengths), inputs(B, T, BF16, seed), strict=True):
                static.copy_(new)
            graph.replay()
            torch.testing.assert_close(pooled, model(x, lengths))


@each_shape
def test_a_graph_of_a_training_step_trains(shape: tuple[int, int, int], kernels: str) -> None:
    """Weights after replays with new inputs are those after as many steps without a graph."""
    B, T, H = shape
    if kernels == "triton":
        takes_a_sequence(B, T, H, BF16)
    model, (x, lengths) = Model(H, BF16), inputs(B, T, BF16, 0)
    start, twin = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    target = torch.randn(B, H, device=CUDA)

    def step_of(model: nn.Module, x: Tensor, lengths: Tensor) -> Callable[[], Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), 1.0)

        def step() -> Tensor:
            optimizer.zero_grad(set_to_none=True)  # in a graph gradients are made in its own memory
            loss = (model(x, lengths).float() - target).square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    graph, loss = captured(step_of(model, x, lengths))
    model.load_state_dict(start)  # in place, where the graph looks for them
    for seed in range(1, 1 + REPLAYS):
        new = inputs(B, T, BF16, seed)
        for static, value in zip((x, lengths), new, strict=True):
            static.copy_(value)
        graph.replay()
        torch.testing.assert_close(loss, step_of(twin, *new)())
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda message, name=name: f"{name}: {message}")
        assert not torch.equal(p, start[name]), f"{name} has not been trained"


@pytest.mark.parametrize("H", [512, 1024])
def test_two_streams_at_once(H: int, kernels: str) -> None:
    """Two layers, which together may ask for more of the GPU than there is, give over and over what each gives alone:
    a launch whose programs wait for each other starts when all of them have room."""
    B, T = 16, 50
    if kernels == "triton":
        takes_a_sequence(B, T, H, BF16)
    streams = [torch.cuda.Stream() for _ in range(2)]
    layers = [rnnattn.LSTM(I, H, device=CUDA, dtype=BF16) for _ in streams]
    xs = [inputs(B, T, BF16, seed)[0].requires_grad_() for seed in range(2)]
    dys = [torch.randn(T, B, H, device=CUDA).to(BF16) for _ in streams]

    def results(k: int) -> list[Tensor]:
        y, _ = layers[k](xs[k])
        return [y, *torch.autograd.grad(y, [xs[k], *layers[k].parameters()], dys[k])]

    alone = [results(k) for k in range(2)]
    different = [torch.zeros((), dtype=torch.int64, device=CUDA) for _ in streams]
    torch.cuda.synchronize()
    for _ in range(ROUNDS):
        for k, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                for got, want in zip(results(k), alone[k], strict=True):
                    different[k] += (got != want).sum()
    torch.cuda.synchronize()
    assert [int(n) for n in different] == [0, 0]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@each_shape
def test_another_device_than_the_current_one(shape: tuple[int, int, int], kernels: str) -> None:
    B, T, H = shape
    x, lengths = inputs(B, T, BF16, 0)
    here = Model(H, BF16, torch.device("cuda", 0))
    there = copy.deepcopy(here).to("cuda:1")
    assert torch.cuda.current_device() == 0
    for model in (here, there):
        on = next(model.parameters()).device
        model(x.to(on), lengths.to(on)).float().square().sum().backward()
    for p, q in zip(here.parameters(), there.parameters(), strict=True):
        assert q.grad is not None and q.grad.device.index == 1
        torch.testing.assert_close(q.grad.cpu(), p.grad.cpu())  # type: ignore[union-attr]


@pytest.mark.parametrize("of_mm", ["ieee", "tf32"])
@pytest.mark.parametrize("of_rnn", ["ieee", "tf32"])
def test_products_have_the_precision_of_recurrent_layers(
    of_rnn: str, of_mm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever torch.mm has: operands in TF32 have 10 bits behind the point, true ones 23."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", of_mm)
    a, b = torch.randn(640, 384, device=CUDA), torch.randn(512, 384, device=CUDA)
    with recurrent_precision(of_rnn):
        for left, right in ((a, b.t()), (a[:, :128], b.t()[:128]), (a.t(), a), (a[:, 64:].t(), a[:, :32])):
            product = products.recurrent_multiply(left)(left, right)
            error = relative_error(product, left.double() @ right.double())
            assert (1e-5 < error < 1e-3) if of_rnn == "tf32" else error < 1e-6, (left.shape, right.shape)


@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN_TANH"])
def test_fp32_as_tf32(mode: str) -> None:
    """Where torch's switch admits it, operands have the digits of fp16: so does the error, in units of its eps."""
    case = RecurrentCase(16, 24, 32, 256, "tf32", mode, states=True)
    with recurrent_precision("tf32"):
        takes_a_sequence(case.B, case.T, case.H, F32, mode)
        got, want = case.run(moved(case.tensors(F32), device_of("triton")), "triton"), truth(case, F32)
    eps = torch.finfo(F16).eps
    for name, value in got.items():
        allowed = TOLERANCES[case.op + ("_backward" if name.startswith("d") else "")][F16]
        assert relative_error(value, want[name]) <= allowed * eps, name
    assert relative_error(got["y"], want["y"]) > 16 * torch.finfo(F32).eps, "the products were not in TF32"
