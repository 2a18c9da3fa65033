"""Measures one case: errors against float64 first, then times by turns, then one row per pair."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import rnnattn
from benchmarks.cases import BACKWARD, FORWARD, Case
from benchmarks.results import ANOTHER_FORM, BY_TORCH, OURS_PREPARED, OWN_BACKENDS, PREPARED, THEIRS_PREPARED, Row
from benchmarks.timing import Contender, Context, Timing, compare, ratios, synchronize

UNRECORDED = ("cpp", "prepared weights")  # backend and kernel where no choice is made in the call
WRONG = 0.02  # relative L2 error from which a result counts as wrong, in any dtype
HOPELESS = 10  # times a peer's other form that a call of at least a second takes: not worth the time to measure it
PATIENCE = 20.0  # seconds of a call that nobody waits for again


@dataclass(frozen=True)
class Peer:
    """An implementation to compare with. Of those with one name, the fastest that is right is the baseline.

    forward: gives the output. With `trains` it is differentiated in forward+backward, else it sits that out.
    context: entered around it. settle: as in `timing.Contender`.
    seen: what of the output can be compared, such as without padding.
    prepared: its weights were packed before the clock runs.
    informational: why it is never a baseline, or an empty text.
    """

    name: str
    kernel: Callable[[], str]
    forward: Callable[[], Tensor]
    context: Context = contextlib.nullcontext
    settle: float = 0.0
    seen: Callable[[Tensor], Tensor] = lambda y: y
    trains: bool = True
    prepared: bool = False
    informational: str = ""


@dataclass(frozen=True)
class Experiment:
    """A case made ready to run; all implementations share the inputs.

    prepared: ours with weights packed beforehand, in inference, to compare with peers that do so too.
    """

    ours: Callable[[], Tensor]
    peers: list[Peer]
    inputs: list[Tensor]  # what gradients are taken of: x and the parameters
    dy: Tensor  # random cotangent of the output
    exact: Callable[[], Tensor]  # the output in float64
    exact_inputs: list[Tensor]
    modules: Sequence[nn.Module] = ()
    prepared: Callable[[], Tensor] | None = None
    operations: int = 1  # in one call, where what is reported is less than a call


@dataclass(frozen=True)
class _Entry:
    """One implementation of a cell and what became of it."""

    name: str
    backend: str
    kernel: str
    contender: Contender | None
    error: float | None = None
    seconds: float = 0.0  # of its first call; on a GPU of its second
    model_step_us: float | None = None
    failure: str = ""
    prepared: bool = False
    informational: str = ""


def measure(
    case: Case, experiment: Experiment, backends: Sequence[str], seconds: float
) -> Iterator[tuple[str, list[Row]]]:
    """Rows of each mode in turn; `seconds` is the time for one mode."""
    truth = _truth(case, experiment)
    for mode in case.modes:
        for module in experiment.modules:
            module.train(mode == BACKWARD)
        with torch.inference_mode(mode == FORWARD):
            rows = _cell(case, experiment, mode, backends, truth, seconds)
        yield mode, rows


def _truth(case: Case, experiment: Experiment) -> list[Tensor]:
    """The exact output and, where gradients are measured, those of all inputs."""
    if BACKWARD in case.modes:
        return _results(experiment.exact, experiment.exact_inputs, experiment.dy.double())
    with torch.inference_mode():
        return [experiment.exact()]


def _cell(
    case: Case, experiment: Experiment, mode: str, backends: Sequence[str], truth: list[Tensor], seconds: float
) -> list[Row]:
    ours = _ours(experiment, mode, backends, truth)
    peers = [_peer(peer, experiment, mode, truth) for peer in experiment.peers if peer.trains or mode == FORWARD]
    peers = [_left_out(peer, peers) for peer in peers]
    running = [entry for entry in [*ours, *peers] if entry.contender is not None]
    contenders = [entry.contender for entry in running if entry.contender is not None]
    timings = dict(zip(map(id, running), compare(contenders, seconds, experiment.dy.device), strict=True))
    fastest: dict[str, _Entry] = {}
    for peer in (peer for peer in peers if not _rejected(peer)):
        best = fastest.get(peer.name)
        if best is None or timings[id(peer)].median_ms < timings[id(best)].median_ms:
            fastest[peer.name] = peer
    return [
        _row(case, mode, entry, timings.get(id(entry)), peer, timings.get(id(peer)), fastest.get(peer.name, peer))
        for entry in ours
        for peer in peers
    ]


def _ours(experiment: Experiment, mode: str, backends: Sequence[str], truth: list[Tensor]) -> list[_Entry]:
    """One entry per kernel that the backends asked for come to."""
    entries: list[_Entry] = []
    run, device = call(experiment.ours, experiment, mode), experiment.dy.device
    for name in backends:
        try:
            with rnnattn.use_backend(name):
                decisions = rnnattn.explain(experiment.ours)
        except Exception as error:  # a crash of one case must not lose the results of the others
            failure = f"unsupported: {error}" if isinstance(error, rnnattn.BackendError) else failed_by(error)
            entries.append(_Entry(name, name, "", None, failure=failure))
            continue
        ran = (decisions[0].backend, decisions[0].kernel) if decisions else UNRECORDED
        same = next((n for n, entry in enumerate(entries) if (entry.backend, entry.kernel) == ran), None)
        if same is not None:
            entries[same] = replace(entries[same], name=f"{entries[same].name}, {name}")
            continue
        contender = Contender(run, functools.partial(rnnattn.use_backend, name), experiment.operations)
        expected = decisions[0].step_us if decisions else None
        entry = _Entry(name, *ran, contender, prepared=not decisions, model_step_us=expected)
        entries.append(_checked(entry, truth, device))
    if mode == FORWARD and experiment.prepared is not None and {"cpp", "auto"} & set(backends):
        contender = Contender(call(experiment.prepared, experiment, mode), operations=experiment.operations)
        entries.append(_checked(_Entry(PREPARED, *UNRECORDED, contender, prepared=True), truth, device))
    return entries


def _peer(peer: Peer, experiment: Experiment, mode: str, truth: list[Tensor]) -> _Entry:
    try:
        with peer.context():
            kernel = peer.kernel()
    except Exception as error:
        return _Entry(peer.name, "", "", None, failure=failed_by(error), informational=peer.informational)
    contender = Contender(call(peer.forward, experiment, mode), peer.context, experiment.operations, peer.settle)
    entry = _Entry(peer.name, "", kernel, contender, prepared=peer.prepared, informational=peer.informational)
    return _checked(entry, truth, experiment.dy.device, peer.seen)


def call(forward: Callable[[], Tensor], experiment: Experiment, mode: str) -> Callable[[], list[Tensor]]:
    """What is run and timed of an implementation in a mode."""
    if mode == FORWARD:
        return lambda: [forward()]
    return lambda: _results(forward, experiment.inputs, experiment.dy)


def _results(forward: Callable[[], Tensor], inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    """The output and the gradients of all inputs."""
    y = forward()
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def _checked(
    entry: _Entry, truth: list[Tensor], device: torch.device, seen: Callable[[Tensor], Tensor] = lambda y: y
) -> _Entry:
    """Runs the entry: its error, or the failure that takes it out of the timing.

    On a GPU twice: the first call may compile, which says nothing of how long the next ones take.
    """
    assert entry.contender is not None
    try:
        with entry.contender.context():
            for _ in range(2 if device.type == "cuda" else 1):
                start = time.perf_counter()
                results = entry.contender.run()
                synchronize(device)
                seconds = time.perf_counter() - start
    except Exception as error:
        return replace(entry, contender=None, failure=failed_by(error))
    assert isinstance(results, list)
    results[0] = seen(results[0])
    return replace(entry, error=max(map(relative_error, results, truth)), seconds=seconds)


def _left_out(peer: _Entry, peers: Sequence[_Entry]) -> _Entry:
    """The peer, not to be timed where another form of it that is right is far ahead, or a call takes too long."""
    others = [other.seconds for other in peers if other.name == peer.name and not _rejected(other)]
    limit = min(PATIENCE, max(1.0, HOPELESS * min(others, default=PATIENCE)))
    if peer.contender is None or peer.seconds < limit:
        return peer
    return replace(peer, contender=None, failure=f"was left out: a call takes {peer.seconds:.1f} s")


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Relative L2 error; infinite where a result is not finite."""
    found, truth = found.detach().double(), truth.detach()
    error = (found - truth).norm() / truth.norm().clamp(min=torch.finfo(truth.dtype).tiny)
    return float(error.nan_to_num(torch.inf, torch.inf))


def _row(
    case: Case, mode: str, ours: _Entry, time: Timing | None, peer: _Entry, peer_time: Timing | None, fastest: _Entry
) -> Row:
    note = _objection(ours, peer, fastest)
    low, ratio, high = ratios(peer_time, time) if time and peer_time else (None, None, None)
    return Row(
        op=case.op,
        case=case.shape,
        dtype=case.dtype,
        mode=mode,
        requested=ours.name,
        backend=ours.backend,
        kernel=ours.kernel,
        baseline=peer.name,
        baseline_kernel=peer.kernel,
        median_ms=time.median_ms if time else None,
        spread=time.spread if time else None,
        baseline_median_ms=peer_time.median_ms if peer_time else None,
        baseline_spread=peer_time.spread if peer_time else None,
        ratio=ratio,
        ratio_low=low,
        ratio_high=high,
        gflops=_rate(case, mode, time),
        baseline_gflops=_rate(case, mode, peer_time),
        intensity=case.intensity,
        error=ours.error,
        baseline_error=peer.error,
        repetitions=len(time.rounds) if time else 0,
        counts=not note,
        failed=ours.failure.startswith("failed") or _wrong(ours),
        note=note,
        step_us=_step_us(case, mode, time),
        model_step_us=ours.model_step_us if case.steps(mode) else None,
        bandwidth=_bandwidth(case, mode, time),
        baseline_bandwidth=_bandwidth(case, mode, peer_time),
    )


def _rate(case: Case, mode: str, time: Timing | None) -> float | None:
    flops = case.flops(mode)
    return flops / time.median_ms / 1e6 if time and flops else None


def _bandwidth(case: Case, mode: str, time: Timing | None) -> float | None:
    traffic = case.traffic(mode)
    return traffic / time.median_ms / 1e6 if time and traffic else None


def _step_us(case: Case, mode: str, time: Timing | None) -> float | None:
    steps = case.steps(mode)
    return 1e3 * time.median_ms / steps if time and steps else None


def _objection(ours: _Entry, peer: _Entry, fastest: _Entry) -> str:
    """Why a row does not count, or an empty text."""
    if ours.failure:
        return ours.failure
    if _wrong(ours):
        return f"our result is wrong (error {ours.error:.2g})"
    rejected = _rejected(peer)
    if rejected or peer is not fastest:
        return rejected or f"{peer.name} {ANOTHER_FORM}"
    if ours.backend == "torch":
        return BY_TORCH
    if peer.prepared and not ours.prepared:
        return THEIRS_PREPARED
    if ours.name == PREPARED and not peer.prepared:
        return OURS_PREPARED
    return "" if ours.backend in OWN_BACKENDS else f"auto ran the {ours.backend} equations, no kernel"


def _rejected(peer: _Entry) -> str:
    """Why a peer is no baseline, or an empty text."""
    if peer.failure:
        return f"the baseline {peer.failure}"
    if peer.informational:
        return f"for information only: {peer.informational}"
    if _wrong(peer):
        return f"the baseline's result is wrong (error {peer.error:.2g})"
    return ""


def _wrong(entry: _Entry) -> bool:
    return entry.error is not None and entry.error > WRONG


def failed_by(error: Exception) -> str:
    """What a row notes of an error that it did not survive."""
    message = str(error).strip()
    return f"failed: {type(error).__name__}: {message.splitlines()[0] if message else ''}"
