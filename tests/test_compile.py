"""torch.compile and torch.export see the operations as single nodes and give eager's numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import close
from torch import Tensor, nn

import rnnattn

F64 = torch.float64


class Model(nn.Module):
    def __init__(self, kind: str = "LSTM") -> None:
        super().__init__()
        self.recurrent = getattr(rnnattn, kind)(4, 5, 2, batch_first=True, bidirectional=True)
        self.pool = rnnattn.AttentionPool(10, "additive", 3)
        self.out = nn.Linear(10, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        y, _ = self.recurrent(x, lengths=lengths)
        pooled, weights = self.pool(y, lengths=lengths, return_weights=True)
        return self.out(pooled), weights


@pytest.fixture(autouse=True)
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["LSTM", "GRU", "RNN"])
def model(request: pytest.FixtureRequest, own_backend: str) -> Any:
    return Model(request.param).to(F64)


def _inputs(B: int = 3, T: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(B, T, 4, dtype=F64), torch.randint(0, T + 1, (B,))


def _train(call: Any, model: Model, x: Tensor, lengths: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    logits, weights = call(x, lengths)
    draw = torch.Generator().manual_seed(3)
    cotangents = [torch.randn(value.shape, generator=draw, dtype=F64) for value in (logits, weights)]
    gradients = torch.autograd.grad([logits, weights], [x, *model.parameters()], cotangents)
    return [logits.detach(), weights.detach(), *gradients]


def test_forward_is_eagers(model: Model) -> None:
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, lengths = _inputs()
    with torch.no_grad():
        close(compiled(x, lengths), model(x, lengths))


def test_training_is_eagers(model: Model) -> None:
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, lengths = _inputs()
    close(_train(compiled, model, x, lengths), _train(model, model, x, lengths))


def test_a_dynamic_number_of_steps_compiles_once(model: Model) -> None:
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for B, T in ((3, 6), (4, 9), (2, 5)):
            x, lengths = _inputs(B, T)
            close(_train(compiled, model, x, lengths), _train(model, model, x, lengths))
        with pytest.raises(torch._dynamo.exc.RecompileError):  # T=1 is a graph of its own
            compiled(*_inputs(3, 1))


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("kind", ["LSTM", "GRUCell"])
def test_a_call_in_between_compiles_nothing_anew(kind: str, lengths: bool) -> None:
    """What an eager call remembers of the module is nothing that a graph depends on."""
    module = getattr(rnnattn, kind)(4, 5)
    x = torch.randn(*((6, 3) if kind == "LSTM" else (3,)), 4)
    given = {"lengths": torch.tensor([6, 0, 2])} if lengths and kind == "LSTM" else {}
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    compiled(x, **given)
    with torch._dynamo.config.patch(error_on_recompile=True):
        close(compiled(x, **given), module(x, **given))
        close(compiled(x, **given), module(x, **given))


def test_one_node_per_layer(model: Model) -> None:
    found: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        found.extend(str(node.target) for node in graph.graph.nodes if "rnnattn" in str(node.target))
        return graph

    with torch.no_grad():
        torch.compile(model, fullgraph=True, backend=backend)(*_inputs())
    assert found.count("rnnattn.recurrent_layer") == 2
    assert found.count("rnnattn.attention_pool") == 1


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_initial_states_and_cells_compile(own_backend: str, kind: str) -> None:
    """Without lengths, with initial states; and a cell unrolled by the user."""
    layer, cell = getattr(rnnattn, kind)(4, 5, dtype=F64), getattr(rnnattn, kind + "Cell")(4, 5, dtype=F64)

    def run(x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Any]:
        y, _ = layer(x, (h, c) if kind == "LSTM" else h)
        state = (h[0], c[0]) if kind == "LSTM" else h[0]
        for t in range(3):
            state = cell(x[t], state)
        return y, state

    x, h, c = (torch.randn(s, dtype=F64) for s in ((3, 2, 4), (1, 2, 5), (1, 2, 5)))
    close(torch.compile(run, fullgraph=True, backend="aot_eager")(x, h, c), run(x, h, c))


def test_lengths_are_clamped_in_a_graph(model: Model) -> None:
    """Their values are not known there: what eager refuses is cut off."""
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, _ = _inputs(2, 4)
    with torch.no_grad():
        close(compiled(x, torch.tensor([9, -1])), model(x, torch.tensor([4, 0])))


def test_a_dropout_stack_compiles() -> None:
    lstm = rnnattn.LSTM(4, 5, 2, dropout=0.5, dtype=F64)
    compiled = torch.compile(lstm, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 2, 4, dtype=F64)
    torch.manual_seed(1)
    want, _ = lstm(x)
    torch.manual_seed(1)
    close(compiled(x)[0], want)
    close(torch.compile(lstm.eval(), fullgraph=True, backend="aot_eager")(x)[0], lstm(x)[0])


def test_inductor() -> None:
    model = Model()
    x, lengths = torch.randn(3, 6, 4), torch.tensor([6, 0, 3])
    compiled = torch.compile(model, fullgraph=True)
    results = []
    for call in (compiled, model):
        model.zero_grad()
        logits, weights = call(x, lengths)
        (logits.square().sum() + weights.square().sum()).backward()
        results.append([logits, weights, *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_export(model: Model) -> None:
    x, lengths = _inputs()
    batch, time = torch.export.Dim("batch"), torch.export.Dim("time", min=2, max=1000)
    program = torch.export.export(model.eval(), (x, lengths), dynamic_shapes=({0: batch, 1: time}, {0: batch}))
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum("rnnattn.recurrent_layer" in target for target in targets) == 2
    for B, T in ((3, 6), (3, 11), (5, 2)):
        x, lengths = _inputs(B, T)
        close(program.module()(x, lengths), model(x, lengths))


@pytest.mark.parametrize("autocast", (False, True))
def test_in_16_bits(autocast: bool) -> None:
    """Where the choice of a backend asks what the processor can do."""
    module = rnnattn.LSTM(4, 5).to(torch.float32 if autocast else torch.bfloat16)
    x = torch.randn(3, 2, 4, dtype=module.weight_ih_l0.dtype)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, _ = compiled(x)
        torch.testing.assert_close(y, module(x)[0])
    assert y.dtype == torch.bfloat16
