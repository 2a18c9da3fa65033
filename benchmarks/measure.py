"""Measures one case: errors against float64 first, then times by turns, then one row per pair."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import rnnattn
from benchmarks.cases import Case
from benchmarks.results import OWN_BACKENDS, Row
from benchmarks.timing import Contender, Timing, compare

FORWARD, BACKWARD = MODES = ("forward", "forward+backward")
WRONG = 0.02  # relative L2 error from which a result counts as wrong, in any dtype


@dataclass(frozen=True)
class Peer:
    """An implementation to compare with. Of those with one name, the fastest is the baseline."""

    name: str
    kernel: Callable[[], str]
    forward: Callable[[], Tensor]


@dataclass(frozen=True)
class Experiment:
    """A case made ready to run; all implementations share the inputs."""

    ours: Callable[[], Tensor]
    peers: list[Peer]
    inputs: list[Tensor]  # what gradients are taken of: x and the parameters
    dy: Tensor  # random cotangent of the output
    exact: Callable[[], Tensor]  # the output in float64
    exact_inputs: list[Tensor]
    modules: Sequence[nn.Module] = ()


@dataclass(frozen=True)
class _Entry:
    """One implementation of a cell and what became of it."""

    name: str
    backend: str
    kernel: str
    contender: Contender | None
    error: float | None = None
    failure: str = ""


def measure(
    case: Case, experiment: Experiment, backends: Sequence[str], seconds: float
) -> Iterator[tuple[str, list[Row]]]:
    """Rows of each mode in turn; `seconds` is the time for one mode."""
    truth = _results(experiment.exact, experiment.exact_inputs, experiment.dy.double())
    for mode in MODES:
        for module in experiment.modules:
            module.train(mode == BACKWARD)
        with torch.set_grad_enabled(mode == BACKWARD):
            rows = _cell(case, experiment, mode, backends, truth, seconds)
        yield mode, rows


def _cell(
    case: Case, experiment: Experiment, mode: str, backends: Sequence[str], truth: list[Tensor], seconds: float
) -> list[Row]:
    ours = _ours(experiment, mode, backends, truth)
    peers = [
        _checked(_Entry(peer.name, "", peer.kernel(), Contender(_call(peer.forward, experiment, mode))), truth)
        for peer in experiment.peers
    ]
    running = [entry for entry in [*ours, *peers] if entry.contender is not None]
    contenders = [entry.contender for entry in running if entry.contender is not None]
    timings = dict(zip(map(id, running), compare(contenders, seconds, experiment.dy.device), strict=True))
    baselines: dict[str, _Entry] = {}
    for peer in peers:
        best = baselines.get(peer.name)
        if best is None or _median(timings.get(id(peer))) < _median(timings.get(id(best))):
            baselines[peer.name] = peer
    return [
        _row(case, mode, entry, timings.get(id(entry)), baseline, timings.get(id(baseline)))
        for entry in ours
        for baseline in baselines.values()
    ]


def _ours(experiment: Experiment, mode: str, backends: Sequence[str], truth: list[Tensor]) -> list[_Entry]:
    """One entry per backend asked for; one that comes to the same kernel as an earlier one is left out."""
    entries: list[_Entry] = []
    for name in backends:
        try:
            with rnnattn.use_backend(name):
                decision = rnnattn.explain(experiment.ours)[0]
        except Exception as error:  # a crash of one case must not lose the results of the others
            failure = f"unsupported: {error}" if isinstance(error, rnnattn.BackendError) else _failed(error)
            entries.append(_Entry(name, name, "", None, failure=failure))
            continue
        if any((entry.backend, entry.kernel) == (decision.backend, decision.kernel) for entry in entries):
            continue
        contender = Contender(_call(experiment.ours, experiment, mode), functools.partial(rnnattn.use_backend, name))
        entry = _Entry(name, decision.backend, decision.kernel, contender)
        entries.append(_checked(entry, truth))
    return entries


def _call(forward: Callable[[], Tensor], experiment: Experiment, mode: str) -> Callable[[], list[Tensor]]:
    if mode == FORWARD:
        return lambda: [forward()]
    return lambda: _results(forward, experiment.inputs, experiment.dy)


def _results(forward: Callable[[], Tensor], inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    """The output and the gradients of all inputs."""
    y = forward()
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def _checked(entry: _Entry, truth: list[Tensor]) -> _Entry:
    """Runs the entry once: its error, or the failure that takes it out of the timing."""
    assert entry.contender is not None
    try:
        with entry.contender.context():
            results = entry.contender.run()
    except Exception as error:
        return replace(entry, contender=None, failure=_failed(error))
    assert isinstance(results, list)
    return replace(entry, error=max(map(relative_error, results, truth)))


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Relative L2 error; infinite where a result is not finite."""
    found, truth = found.detach().double(), truth.detach()
    error = (found - truth).norm() / truth.norm().clamp(min=torch.finfo(truth.dtype).tiny)
    return float(error.nan_to_num(torch.inf, torch.inf))


def _row(
    case: Case, mode: str, ours: _Entry, time: Timing | None, baseline: _Entry, baseline_time: Timing | None
) -> Row:
    note = _objection(ours, baseline)
    ratio = baseline_time.median_ms / time.median_ms if time and baseline_time else None
    return Row(
        op=case.op,
        case=case.shape,
        dtype=case.dtype,
        mode=mode,
        requested=ours.name,
        backend=ours.backend,
        kernel=ours.kernel,
        baseline=baseline.name,
        baseline_kernel=baseline.kernel,
        median_ms=time.median_ms if time else None,
        spread=time.spread if time else None,
        baseline_median_ms=baseline_time.median_ms if baseline_time else None,
        baseline_spread=baseline_time.spread if baseline_time else None,
        ratio=ratio,
        error=ours.error,
        baseline_error=baseline.error,
        repetitions=time.repetitions if time else 0,
        counts=not note,
        failed=ours.failure.startswith("failed") or _wrong(ours),
        note=note,
    )


def _objection(ours: _Entry, baseline: _Entry) -> str:
    """Why a row does not count, or an empty text."""
    if ours.failure:
        return ours.failure
    if ours.backend == "torch":
        return "auto ran torch's own kernel"
    if ours.backend not in OWN_BACKENDS:
        return f"auto ran the {ours.backend} equations, no kernel"
    if _wrong(ours):
        return f"our result is wrong (error {ours.error:.2g})"
    if baseline.failure:
        return f"the baseline {baseline.failure}"
    if _wrong(baseline):
        return f"the baseline's result is wrong (error {baseline.error:.2g})"
    return ""


def _wrong(entry: _Entry) -> bool:
    return entry.error is not None and entry.error > WRONG


def _median(timing: Timing | None) -> float:
    return timing.median_ms if timing else float("inf")


def _failed(error: Exception) -> str:
    message = str(error).strip()
    return f"failed: {type(error).__name__}: {message.splitlines()[0] if message else ''}"
