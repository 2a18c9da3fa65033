"""Graphs that torch makes of models with our modules in them: torch.jit.trace, torch.jit.script and torch.fx.

torch.compile and torch.export: test_compile; ONNX: test_onnx.
"""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from cases import F64
from tolerances import close
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from twins import TABLE, inputs, pair_of

import rnnattn

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
each = pytest.mark.parametrize("name", TABLE)
I, H = 3, 4


class Encoder(nn.Module):
    """A layer with a head, called in one of the ways that a layer can be called."""

    def __init__(self, way: str = "plain", kind: str = "LSTM", **settings: Any) -> None:
        super().__init__()
        self.way, self.layer, self.pool = way, getattr(rnnattn, kind)(I, H, **settings), rnnattn.AttentionPool(H)
        self.head = nn.Linear(H, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:  # x [B, T, I]
        x = x.transpose(0, 1)
        if self.way == "packed":
            packed, _ = self.layer(pack_padded_sequence(x, lengths, enforce_sorted=False))
            y, _ = pad_packed_sequence(packed, total_length=x.shape[0])
            return self.head(y)
        if self.way == "pooled":
            y, _ = self.layer(x, lengths=lengths)
            return self.head(self.pool(y.transpose(0, 1), lengths=lengths))
        extra: dict[str, Any] = {}
        if self.way in ("lengths", "resets"):
            extra = {"lengths": lengths} if self.way == "lengths" else {"resets": x[..., 0] > 0}
        y, (h, c) = self.layer(x, (x.new_ones(1, x.shape[1], H), x.new_zeros(1, x.shape[1], H)), **extra)
        return self.head(y) + self.head(h + c)


def encoder(way: str) -> Encoder:
    return Encoder(way, **({"layer_norm": True, "zoneout": 0.2} if way == "regularised" else {})).double().eval()


WAYS = ("plain", "lengths", "packed", "pooled", "resets", "regularised")


def batch(B: int, T: int) -> tuple[Tensor, Tensor]:
    lengths = torch.randint(1, T + 1, (B,))
    lengths[B // 2] = T
    return torch.randn(B, T, I, dtype=F64), lengths


def namespaces(traced: Any) -> set[str]:
    return {node.kind().split("::")[0] for node in traced.inlined_graph.nodes()} - {"prim"}


def saved(graph: Any) -> Any:
    file = io.BytesIO()
    torch.jit.save(graph, file)
    file.seek(0)
    return torch.jit.load(file)


@each
def test_a_trace_is_of_torchs_operators(name: str) -> None:
    """Of a module that was never called, and of one that was; they go where rnnattn is not."""
    for calls in range(2):
        theirs, ours = pair_of(name)
        for _ in range(calls):
            ours(inputs(ours))
        traced = torch.jit.trace(ours, inputs(ours))
        assert namespaces(traced) == {"aten"}
        x = torch.cat([inputs(ours), inputs(ours)])
        close(saved(traced)(x), theirs(x))


@pytest.mark.parametrize("way", WAYS)
def test_a_traced_model_takes_other_sizes(way: str) -> None:
    model, own = encoder(way), way in ("resets", "regularised")  # which torch's layers do not know
    traced = torch.jit.trace(model, batch(3, 6))
    assert namespaces(traced) == ({"aten", "rnnattn"} if own else {"aten"})
    traced = saved(traced)
    for B, T in ((3, 6), (5, 2), (1, 9)):
        given = batch(B, T)
        x = given[0].requires_grad_()
        want, got = model(*given), traced(*given)
        close(got, want)
        close(torch.autograd.grad(got.square().sum(), x), torch.autograd.grad(want.square().sum(), x))


@pytest.mark.parametrize("settings", [{"zoneout": 0.2}, {"layer_norm": True}], ids=str)
def test_packed_rows_of_other_sizes_through_ours(settings: dict[str, Any]) -> None:
    model = Encoder("packed", **settings).double().eval()
    traced = torch.jit.trace(model, batch(3, 6))
    for B, T in ((3, 6), (2, 4), (5, 9)):
        given = batch(B, T)
        close(traced(*given), model(*given))


@pytest.mark.parametrize("gradients", [False, True])
def test_a_backend_asked_for_by_name_is_traced(own_backend: str, gradients: bool) -> None:
    model = Encoder("pooled").double()
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(model, batch(3, 6))
        assert namespaces(traced) == {"aten", "rnnattn"}
        given = batch(4, 5)
        close(traced(*given), model(*given))


def test_a_trace_keeps_no_steps_to_compute_again() -> None:
    model = Encoder(recompute="chunk").double()
    traced, given = torch.jit.trace(model, batch(3, 6)), batch(2, 5)
    assert namespaces(traced) == {"aten"}
    close(traced(*given), model(*given))


@each
def test_torch_jit_script_compiles_torchs_modules(name: str) -> None:
    theirs, ours = pair_of(name)
    model, x = nn.Sequential(ours), inputs(ours)
    with pytest.warns(UserWarning, match=rf"torch\.nn\.{type(theirs).__name__} in the place of rnnattn"):
        scripted = torch.jit.script(model)
    close(saved(scripted)(x), theirs(x))
    assert type(model[0]) is type(theirs)
    assert all(p is q for p, q in zip(model.parameters(), ours.parameters(), strict=True))
    assert type(rnnattn.swap(model).model[0]) is type(ours)


class Twice(rnnattn.LSTM):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x * 2)


def test_torch_jit_script_refuses_what_torchs_modules_cannot_do() -> None:
    with pytest.raises(NotImplementedError, match=r"torch.nn's can stand for, got one with zoneout"):
        torch.jit.script(nn.Sequential(rnnattn.LSTM(I, H, zoneout=0.1)))
    with pytest.raises(NotImplementedError, match=r"a Twice that .* got one with a forward of its own"):
        torch.jit.script(nn.Sequential(Twice(I, H)))
    torch.jit.script(nn.Sequential(rnnattn.LSTM(I, H, forget_bias=1.0)))


@each
def test_torch_fx_sees_a_node_as_of_torchs_modules(name: str) -> None:
    theirs, ours = pair_of(name)
    graphs = [torch.fx.symbolic_trace(nn.Sequential(nn.Tanh(), module)) for module in (theirs, ours)]
    found = [[(node.op, str(node.target), str(node.args)) for node in g.graph.nodes] for g in graphs]
    assert found[0] == found[1]
    x = inputs(ours)
    for _ in range(2):
        close(graphs[1](x), graphs[0](x))


def test_torch_fx_does_nothing_twice() -> None:
    hooked = rnnattn.GRU(I, H)
    hooked.register_forward_hook(lambda module, given, results: (results[0] * 2, results[1]))
    for module, what in ((hooked, "hooks"), (Twice(I, H), "a forward of its own")):
        with pytest.raises(torch.fx.proxy.TraceError, match=f"without {what}; make it a leaf"):
            torch.fx.symbolic_trace(nn.Sequential(module))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.inputs = rnnattn.LSTMCell(I, H), torch.randn(3, 2, I)

    def forward(self, h: Tensor) -> Tensor:
        states = h, h
        for x in self.inputs:
            states = self.cell(x, states)
        return states[0]


def test_torch_fx_follows_states_alone() -> None:
    model = Decoder()
    graph, h = torch.fx.symbolic_trace(model), torch.randn(2, H)
    assert [node.op for node in graph.graph.nodes].count("call_module") == 3
    close(graph(h), model(h))


@pytest.mark.parametrize("way", [way for way in WAYS if way != "packed"])  # nor do torch's layers take a Proxy there
def test_torch_fx_keeps_the_arguments(way: str) -> None:
    model = encoder(way)
    graph = torch.fx.symbolic_trace(model)
    called = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert called == (["layer", "pool", "head"] if way == "pooled" else ["layer", "head", "head"])
    for B, T in ((3, 6), (2, 4)):
        given = batch(B, T)
        close(torch.fx.symbolic_trace(graph)(*given), model(*given))
