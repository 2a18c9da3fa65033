"""`resets`: what a row's episodes give is what each gives in a call of its own, and who takes them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import F32, F64, backend_parameters
from recurrent_cases import RECURRENT_CASES, RecurrentCase
from tolerances import close
from torch import Tensor, nn

import rnnattn
from rnnattn import backends
from rnnattn.backends import Call

on_both = pytest.mark.parametrize("backend", backend_parameters("reference", "cpp"))


@dataclasses.dataclass(frozen=True)
class OneByOne(RecurrentCase):
    """A case whose layers, directions, rows and episodes are calls of their own, without lengths and resets."""

    def call(
        self,
        x: Tensor,
        initials: Sequence[Tensor],
        weights: Sequence[Tensor],
        lengths: Any,
        resets: Tensor | None = None,
    ) -> tuple[Any, ...]:
        assert resets is not None
        batch_first = self.layout == "batch_first"
        x, resets = (x.transpose(0, 1), resets.t()) if batch_first else (x, resets)
        scans = self.layers * self.directions
        per_scan, finals = len(weights) // scans, []
        for layer in range(self.layers):
            outputs = []
            for k in range(self.directions):
                n = layer * self.directions + k
                own = weights[n * per_scan : (n + 1) * per_scan]
                rows = [
                    self.row(x[:, b], [s[n, b] for s in initials], own, resets[:, b], k == 1, length)
                    for b, length in enumerate(self.lengths or [self.T] * self.B)
                ]
                y, *states = (torch.stack(parts) for parts in zip(*rows, strict=True))
                outputs.append(y.transpose(0, 1))
                finals.append(states)
            x = torch.cat(outputs, -1)
        y = x.transpose(0, 1) if batch_first else x
        return y, *(torch.stack(states) for states in zip(*finals, strict=True))

    def row(
        self, x: Tensor, initials: list[Tensor], weights: Sequence[Tensor], resets: Tensor, reverse: bool, length: int
    ) -> list[Tensor]:
        """y [T, R] and the final states; x [T, I], initials [R] and [H]."""
        one = dataclasses.replace(self, layers=1, direction="forward", layout="contiguous")
        y, states = x.new_zeros(self.T, initials[0].shape[-1]), initials
        episodes = list(itertools.pairwise([0, *(t for t in range(1, length) if resets[t]), length]))
        for begin, end in reversed(episodes) if reverse else episodes:
            border = end if reverse else begin
            if border < length and resets[border]:
                states = initials if self.to_initial else [0 * s for s in initials]  # zeros with a gradient of zero
            steps = torch.arange(begin, end)
            steps = steps.flip(0) if reverse else steps
            if len(steps):
                outputs = RecurrentCase.call(one, x[steps][:, None], [s[None, None] for s in states], weights, None)
                y = y.index_copy(0, steps, outputs[0][:, 0])
                states = [s[0, 0] for s in outputs[1:]]
        return [y, *states]


CASES = [case for case in RECURRENT_CASES if case.resets and case.direction != "reverse" and case.B and not case.cells]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@on_both
def test_episodes_are_run_one_by_one(backend: str, case: RecurrentCase) -> None:
    t = case.tensors(F64)
    close(case.run(t, backend), OneByOne(**vars(case)).run(t, "reference"))


# --- the modules -----------------------------------------------------------------------------------

I, H, B, T = 4, 5, 3, 8
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("LSTM", {}),
    "projection": ("LSTM", {"proj_size": 2}),
    "gru": ("GRU", {}),
    "tanh": ("RNN", {}),
    "relu": ("RNN", {"nonlinearity": "relu"}),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def layer(kind: str, **options: Any) -> Any:
    name, own = KINDS[kind]
    return getattr(rnnattn, name)(I, H, dtype=F64, **(own | options))


def initial(module: nn.RNNBase) -> tuple[Tensor, ...]:
    """One state or two, of the whole batch."""
    LK = module.num_layers * (2 if module.bidirectional else 1)
    widths = [module.proj_size or H, *([H] if module.mode == "LSTM" else [])]
    return tuple(torch.randn(LK, B, width, dtype=F64, requires_grad=True) for width in widths)


def given(states: tuple[Tensor, ...]) -> Any:
    """As a module takes it."""
    return states if len(states) > 1 else states[0]


def results(outputs: Any) -> list[Tensor]:
    y, finals = outputs
    return [y, *([finals] if isinstance(finals, Tensor) else finals)]


def differentiated(outputs: list[Tensor], *leaves: Tensor) -> list[Tensor]:
    """With cotangents that depend on the shapes alone."""
    draw = torch.Generator().manual_seed(3)
    cotangents = [torch.randn(value.shape, generator=draw, dtype=F64) for value in outputs]
    return list(torch.autograd.grad(outputs, leaves, cotangents))


@kinds
@on_both
def test_nothing_crosses_a_border(backend: str, kind: str) -> None:
    """Not even NaN, and no gradient: of y behind a border, what stands before it has none, in both directions."""
    module = layer(kind, num_layers=2, bidirectional=True)
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[3] = True
    x = torch.randn(T, B, I, dtype=F64)
    poisoned = x.clone()
    poisoned[:3] = torch.nan
    with rnnattn.use_backend(backend):
        close(module(poisoned, resets=resets)[0][3:], module(x, resets=resets)[0][3:])
        poisoned = x.clone()
        poisoned[3:] = torch.nan
        close(module(poisoned, resets=resets)[0][:3], module(x, resets=resets)[0][:3])
        y, _ = module(x.requires_grad_(), resets=resets)
        (before,) = torch.autograd.grad(y[3:].sum(), x, retain_graph=True)
        (behind,) = torch.autograd.grad(y[:3].sum(), x)
    assert not before[:3].any() and before[3:].any()
    assert not behind[3:].any() and behind[:3].any()


@kinds
@on_both
def test_one_step_at_a_time(backend: str, kind: str) -> None:
    """What an agent that acts does: one call a step with the resets of that step is one call of all steps."""
    module = layer(kind, num_layers=2)
    x, states, resets = torch.randn(T, B, I, dtype=F64), initial(module), torch.rand(T, B) < 0.4
    leaves = (*states, *module.parameters())
    with rnnattn.use_backend(backend):
        whole = results(module(x, given(states), resets=resets))
        state, steps = given(states), []
        for t in range(T):
            y, state = module(x[t : t + 1], state, resets=resets[t : t + 1])
            steps.append(y)
        stepped = results((torch.cat(steps), state))
        close(stepped, whole)
        close(differentiated(stepped, *leaves), differentiated(whole, *leaves))


@kinds
@on_both
def test_an_unbatched_sequence(backend: str, kind: str) -> None:
    resets = torch.rand(T) < 0.4
    for batch_first in (False, True):
        module = layer(kind, bidirectional=True, batch_first=batch_first)
        x, dim = torch.randn(T, I, dtype=F64), 0 if batch_first else 1
        with rnnattn.use_backend(backend):
            y, finals = module(x, resets=resets)
            want = results(module(x.unsqueeze(dim), resets=resets.unsqueeze(dim)))
        close([y, *results((y, finals))[1:]], [want[0].squeeze(dim), *(s.squeeze(1) for s in want[1:])])


@pytest.mark.parametrize("to_initial", [False, True], ids=["zeros", "hx"])
@kinds
@on_both
def test_compiled(backend: str, kind: str, to_initial: bool) -> None:
    module = layer(kind, num_layers=2, bidirectional=True)
    states = initial(module)

    def run(x: Tensor, resets: Tensor, *states: Tensor) -> list[Tensor]:
        return results(module(x, given(states), resets=resets, reset_to_initial=to_initial))

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x, resets = torch.randn(T, B, I, dtype=F64, requires_grad=True), torch.rand(T, B) < 0.4
    leaves = (x, *states, *module.parameters())
    with rnnattn.use_backend(backend):
        want, got = run(x, resets, *states), compiled(x, resets, *states)
        close(got, want)
        close(differentiated(got, *leaves), differentiated(want, *leaves))
    torch._dynamo.reset()


@pytest.mark.parametrize("op", ["lstm", "gru"])
def test_torch_takes_none_and_says_so(op: str) -> None:
    reason = backends.get("torch").unsupported(Call(op, "cpu", F32, 2, 3, 4, 5, resets=True))
    assert reason is not None and "resets" in reason
    assert backends.get("torch").unsupported(Call(op, "cpu", F32, 2, 3, 4, 5)) is None
    with rnnattn.use_backend("reference"):
        (decision,) = rnnattn.explain(layer("gru"), torch.randn(T, B, I, dtype=F64), resets=torch.ones(T, B) > 0)
    assert decision.call.resets and decision.others["torch"] == "torch's own GRU takes no resets"


def test_auto_takes_one_that_can() -> None:
    x, resets = torch.randn(T, B, I, dtype=torch.bfloat16), torch.zeros(T, B, dtype=torch.bool)
    (decision,) = rnnattn.explain(rnnattn.LSTM(I, H, dtype=torch.bfloat16), x, resets=resets)
    assert decision.backend == ("reference" if backends.unavailable("cpp") else "cpp")
    with rnnattn.use_backend("torch"), pytest.raises(rnnattn.BackendError, match="torch's own LSTM takes no resets"):
        rnnattn.LSTM(I, H)(x.float(), resets=resets)
