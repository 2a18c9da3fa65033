"""recompute="chunk": the same results and gradients, from states at the borders of chunks alone.

The shared cases have rows of it for every backend.
"""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import F64
from recurrent_cases import RecurrentCase, each_mode
from tolerances import close
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import rnnattn
from rnnattn.autograd.chunks import _spans
from rnnattn.packing import Packing

CASES = {
    "plain": RecurrentCase(3, 11, 4, 5, "chunks of 3 steps, the last of 2"),
    "states": RecurrentCase(2, 10, 4, 5, "initial states", states=True),
    "ragged": RecurrentCase(4, 10, 4, 5, "rows that end in every chunk, and none", lengths=(10, 0, 3, 5), states=True,
                            direction="bidirectional"),
    "stack": RecurrentCase(3, 9, 4, 5, "a stack without biases", layers=2, bias=False, direction="bidirectional"),
    "episodes": RecurrentCase(3, 10, 4, 5, "episodes that begin at borders too", resets="some", states=True,
                              direction="bidirectional"),
    "every step": RecurrentCase(3, 10, 4, 5, "an episode at each step, ragged", resets="every", lengths=(10, 6, 4),
                                states=True, direction="bidirectional"),
    "T=1": RecurrentCase(2, 1, 4, 5, "one chunk", states=True),
    "batch first": RecurrentCase(3, 7, 4, 5, "batch first", layout="batch_first", states=True),
    "packed": RecurrentCase(5, 10, 4, 5, "packed, rows that end in every chunk", layout="packed",
                            lengths=(10, 9, 6, 3, 1), states=True, direction="bidirectional"),
    "packed, only c_n": RecurrentCase(4, 7, 4, 5, "packed, only final states have cotangents", layout="packed",
                                      lengths=(7, 7, 5, 1), cotangents=("h_n", "c_n"), states=True),
    "only h_n": RecurrentCase(3, 10, 4, 5, "only h_n has a cotangent", cotangents=("h_n",), states=True),
}  # fmt: skip


@pytest.mark.parametrize("backend, mode", each_mode("reference", "cpp"))
@pytest.mark.parametrize("name", CASES)
def test_results_are_the_same(name: str, backend: str, mode: str) -> None:
    case = replace(CASES[name], mode=mode)
    t = case.tensors(F64)
    close(replace(case, recompute="chunk").run(t, backend), case.run(t, backend))


def test_a_projection() -> None:
    case = replace(CASES["ragged"], R=3)
    t = case.tensors(F64)
    close(replace(case, recompute="chunk").run(t, "reference"), case.run(t, "reference"))


def test_packed_rows_are_not_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Packing, "padded")
    layer = rnnattn.GRU(4, 5, 2, bidirectional=True, dropout=0.5, recompute="chunk")
    packed = pack_padded_sequence(torch.randn(9, 3, 4), [4, 9, 2], enforce_sorted=False)
    with rnnattn.use_backend("cpp"):
        layer(packed)[0].data.sum().backward()


@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 10_000])
def test_chunks_are_of_the_size_of_their_number(T: int) -> None:
    for reverse in (False, True):
        spans = _spans(T, reverse)
        assert sorted(t for span in spans for t in range(*span)) == list(range(T))
        assert spans == sorted(spans, reverse=reverse)
        assert max(end - start for start, end in spans) <= T**0.5 and len(spans) <= T**0.5 + 2


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_what_is_kept_grows_with_the_root_of_the_length(kind: str) -> None:
    def kept(T: int, recompute: str | None) -> int:
        """Numbers kept for the backward pass beside the input and the weights."""
        layer = getattr(rnnattn, kind)(2, 8, recompute=recompute)
        x, seen = torch.randn(T, 3, 2, requires_grad=True), {}
        given = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}

        def pack(t: Tensor) -> Tensor:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer(x)
        return sum(size for storage, size in seen.items() if storage not in given)

    states = 2 if kind == "LSTM" else 1
    assert kept(400, "chunk") <= 21 * 3 * 8 * states
    assert kept(1600, "chunk") <= 41 * 3 * 8 * states
    assert kept(400, None) >= 400 * 3 * 8


def test_the_module_and_its_attribute() -> None:
    plain, chunked = rnnattn.LSTM(3, 4, 2), rnnattn.LSTM(3, 4, 2, recompute="chunk")
    chunked.load_state_dict(plain.state_dict())
    assert repr(chunked) == "LSTM(3, 4, num_layers=2, recompute=chunk)" and repr(plain) == "LSTM(3, 4, num_layers=2)"
    x = torch.randn(7, 2, 3)
    for module in (chunked, copy.deepcopy(chunked), pickle.loads(pickle.dumps(chunked))):
        gradients = []
        for one in (module, plain):
            one.zero_grad()
            one(x)[0].square().sum().backward()
            gradients.append([p.grad for p in one.parameters()])
        torch.testing.assert_close(*gradients)
        assert "Chunked" in str(_nodes(module(x)[0].grad_fn))
    plain(x), plain(x)
    plain.recompute = "chunk"
    assert "Chunked" in str(_nodes(plain(x)[0].grad_fn))
    with torch.no_grad():
        torch.testing.assert_close(plain(x)[0], chunked(x)[0])
    y = plain(x)[0]
    (d,) = torch.autograd.grad(y.sum(), plain.weight_hh_l0, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiate twice|does not require grad"):
        d.sum().backward()


def _nodes(node: Any) -> list[str]:
    return [] if node is None else [node.name(), *(name for next_, _ in node.next_functions for name in _nodes(next_))]


def test_autocast_and_selected_backends() -> None:
    layer, x = rnnattn.GRU(3, 4, recompute="chunk"), torch.randn(6, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)[0]
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    with rnnattn.use_backend("torch"), pytest.raises(rnnattn.BackendError, match="keeps what it computed of all steps"):
        layer(x)


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(ValueError, match="recompute: expected None or 'chunk', got 'all'"):
        rnnattn.RNN(3, 4, recompute="all")
    layer, resets = rnnattn.GRU(3, 4, recompute="chunk"), torch.zeros(5, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="recompute: expected no reset_to_initial with 'chunk'"):
        layer(torch.randn(5, 2, 3), resets=resets, reset_to_initial=True)


def test_the_benchmark_of_peak_memory() -> None:
    """Of 17 MB of gates, 4 of cells and 4 each of x, y and their gradients."""
    command = [sys.executable, "-m", "benchmarks.memory", "--steps", "2048", "--batch", "8", "--size", "64"]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True)
    peaks = [float(line.split(" MB")[0].split()[-1]) for line in done.stdout.splitlines()[1:]]
    assert len(peaks) == 3
    assert peaks[2] < peaks[1] - 8
