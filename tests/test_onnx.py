"""onnx_export: standard nodes, which ONNX Runtime runs to the numbers of the module, for any batch and length."""

from __future__ import annotations

import collections
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rnnattn

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.filterwarnings("ignore")
I, H = 4, 5
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("LSTM", {}),
    "lstm_stack": ("LSTM", {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False}),
    "gru": ("GRU", {}),
    "gru_stack": ("GRU", {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.5}),
    "rnn": ("RNN", {}),
    "relu_both": ("RNN", {"nonlinearity": "relu", "bidirectional": True, "bias": False}),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


class Recurrent(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        kind, settings = LAYERS[name]
        self.layer = getattr(rnnattn, kind)(I, H, **settings)

    def forward(self, x: Tensor, hx: Any = None, lengths: Tensor | None = None) -> Any:
        return self.layer(x, hx, lengths=lengths)


def flat(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else [t for part in results for t in flat(part)]


def exported(model: nn.Module, path: Path, *args: Any, **options: Any) -> Any:
    """The graph, checked, and a session of ONNX Runtime."""
    rnnattn.onnx_export(model, args, path / "model.onnx", verbose=False, **options)
    graph = onnx.load(path / "model.onnx")
    onnx.checker.check_model(graph, full_check=True)
    return graph, onnxruntime.InferenceSession(path / "model.onnx", providers=["CPUExecutionProvider"])


def agree(session: Any, model: nn.Module, *args: Any) -> None:
    names = [given.name for given in session.get_inputs()]
    given = [t.numpy() for t in flat([a for a in args if a is not None])]
    got = [torch.from_numpy(t) for t in session.run(None, dict(zip(names, given, strict=True)))]
    with torch.no_grad():
        want = flat(model(*args))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def nodes(graph: Any) -> collections.Counter[str]:
    assert {node.domain for node in graph.graph.node} <= {"", "ai.onnx"}
    return collections.Counter(node.op_type for node in graph.graph.node)


def sequence(model: Recurrent, B: int, T: int) -> Tensor:
    return torch.randn(*((B, T) if model.layer.batch_first else (T, B)), I)


@each_layer
def test_layers(name: str, tmp_path: Path) -> None:
    model = Recurrent(name).train()
    batch, time = torch.export.Dim("batch"), torch.export.Dim("time")
    dims = {0: batch, 1: time} if model.layer.batch_first else {0: time, 1: batch}
    graph, session = exported(model, tmp_path, sequence(model, 3, 6), dynamic_shapes=(dims,))
    assert model.training and model.layer.training
    counted = nodes(graph)
    assert counted[LAYERS[name][0]] == model.layer.num_layers
    assert not {"Loop", "Scan", "MatMul", "Gemm"} & set(counted)
    constants = {tensor.name for tensor in graph.graph.initializer}
    for node in graph.graph.node:  # weights are constants in ONNX's order, nothing that is computed
        assert node.op_type != LAYERS[name][0] or set(filter(None, node.input[1:4])) <= constants
    for B, T in ((3, 6), (1, 1), (7, 2)):
        agree(session, model.eval(), sequence(model, B, T))


@each_layer
def test_states_and_lengths(name: str, tmp_path: Path) -> None:
    """Also a row without steps, which keeps its states."""
    model = Recurrent(name).eval()
    batch, time = torch.export.Dim("batch"), torch.export.Dim("time")
    dims = {0: batch, 1: time} if model.layer.batch_first else {0: time, 1: batch}
    states, settings = (2 if LAYERS[name][0] == "LSTM" else 1), model.layer
    LK = settings.num_layers * (1 + settings.bidirectional)

    def arguments(B: int, T: int) -> tuple[Any, ...]:
        hx = tuple(torch.randn(LK, B, H) for _ in range(states))
        lengths = torch.randint(0, T + 1, (B,))
        lengths[0], lengths[1] = 0, T
        return sequence(model, B, T), hx if states == 2 else hx[0], lengths

    of_states = tuple({1: batch} for _ in range(states))
    shapes = (dims, of_states if states == 2 else of_states[0], {0: batch})
    graph, session = exported(model, tmp_path, *arguments(3, 6), dynamic_shapes=shapes)
    assert nodes(graph)[LAYERS[name][0]] == settings.num_layers
    for B, T in ((3, 6), (2, 1), (6, 9)):
        agree(session, model, *arguments(B, T))


@pytest.mark.parametrize("given", ["nothing", "lengths", "mask"])
@pytest.mark.parametrize("score", ["linear", "additive"])
def test_pooling(score: str, given: str, tmp_path: Path) -> None:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = rnnattn.AttentionPool(I, score, *([3] if score == "additive" else []))

        def forward(self, x: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
            kept = {} if given == "nothing" else {given: keep}
            return self.pool(x, **kept, return_weights=True)

    def arguments(B: int, T: int) -> tuple[Any, ...]:
        x, lengths = torch.randn(B, T, I), torch.randint(0, T + 1, (B,))
        lengths[0] = 0  # a row that keeps nothing
        mask = torch.rand(B, T) < 0.5
        mask[0] = False
        return {"nothing": (x,), "lengths": (x, lengths), "mask": (x, mask)}[given]

    model, batch, time = Pool(), torch.export.Dim("batch"), torch.export.Dim("time")
    shapes = ({0: batch, 1: time}, *([{0: batch}] if given == "lengths" else [{0: batch, 1: time}] * (given == "mask")))
    graph, session = exported(model, tmp_path, *arguments(3, 6), dynamic_shapes=shapes)
    assert nodes(graph)["Softmax"] == 1
    for B, T in ((3, 6), (1, 1), (5, 8)):
        agree(session, model, *arguments(B, T))


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells(kind: str, tmp_path: Path) -> None:
    cell = getattr(rnnattn, kind)(I, H)
    graph, session = exported(cell, tmp_path, torch.randn(3, I), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert nodes(graph)[kind.removesuffix("Cell")] == 1
    agree(session, cell, torch.randn(5, I))


def test_a_classifier(tmp_path: Path) -> None:
    model = rnnattn.SequenceClassifier(3, H, I)
    graph, session = exported(model, tmp_path, torch.randn(2, 6, I))
    assert nodes(graph)["LSTM"] == 1
    agree(session, model.eval(), torch.randn(2, 6, I))


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "LSTMCell", "SequenceClassifier"])
def test_torch_onnx_export_itself(kind: str, dynamo: bool, tmp_path: Path) -> None:
    """It knows no operators of ours: it is given torch's, and exports what it can of these."""
    model = rnnattn.SequenceClassifier(3, H, I) if kind == "SequenceClassifier" else getattr(rnnattn, kind)(I, H)
    x = torch.randn(*((3,) if kind.endswith("Cell") else (3, 6)), I)
    path = tmp_path / "model.onnx"
    torch.onnx.export(model.eval(), (x,), path, dynamo=dynamo, verbose=False)
    graph = onnx.load(path)
    onnx.checker.check_model(graph, full_check=True)
    assert nodes(graph)
    agree(onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]), model, x)


def test_what_onnx_has_not_is_named(tmp_path: Path) -> None:
    def causes(model: nn.Module, *args: Any) -> str:
        with pytest.raises(torch.onnx.OnnxExporterError) as caught:
            exported(model, tmp_path, *args)
        return str(caught.value)

    x = torch.randn(3, 2, I)
    assert "no projection (proj_size)" in causes(rnnattn.LSTM(I, H, proj_size=2), x)
    assert "no resets" in causes(rnnattn.GRU(I, H), x, None, None, torch.ones(3, 2) > 0)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"needs onnx and onnxscript: pip install rnnattn\[onnx\]"):
        rnnattn.onnx_export(rnnattn.LSTM(I, H), (torch.randn(3, 2, I),))
