"""Times contenders against each other in one process, by turns.

Every repetition runs each contender once, in an order that rotates from one repetition to the
next, so that a slow moment of the machine meets all of them. On a GPU the clock is read after a
synchronisation, and a sample holds enough calls to make that negligible. Caches are warm, as
between the layers of a model.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Context = Callable[[], contextlib.AbstractContextManager[object]]

MIN_SAMPLE_SECONDS = 0.004
MIN_REPETITIONS, MAX_REPETITIONS = 5, 60


@dataclass(frozen=True)
class Contender:
    """A call to time; `context` is entered outside the timed loop."""

    run: Callable[[], object]
    context: Context = contextlib.nullcontext


@dataclass(frozen=True)
class Timing:
    median_ms: float
    spread: float  # interquartile range / median
    repetitions: int


def compare(contenders: Sequence[Contender], seconds: float, device: torch.device) -> list[Timing]:
    """A timing for each; together they take about `seconds`, more if few repetitions fit."""
    if not contenders:
        return []
    estimates = [_estimate(contender, device) for contender in contenders]
    calls = [max(1, math.ceil(MIN_SAMPLE_SECONDS / estimate)) for estimate in estimates]
    round_seconds = sum(n * estimate for n, estimate in zip(calls, estimates, strict=True))
    repetitions = min(MAX_REPETITIONS, max(MIN_REPETITIONS, int(seconds / round_seconds)))
    samples: list[list[float]] = [[] for _ in contenders]
    collecting = gc.isenabled()
    gc.disable()
    try:
        for r in range(repetitions):
            for n in range(len(contenders)):
                turn = (n + r) % len(contenders)
                samples[turn].append(_sample(contenders[turn], calls[turn], device))
    finally:
        if collecting:
            gc.enable()
    return [_timing(values) for values in samples]


def _estimate(contender: Contender, device: torch.device) -> float:
    """Seconds of a call, after a first call that may compile, allocate or choose an algorithm."""
    _sample(contender, 1, device)
    seconds, calls = _sample(contender, 1, device), 1
    while seconds * calls < MIN_SAMPLE_SECONDS and calls < 1024:
        calls *= 4
        seconds = _sample(contender, calls, device)
    return seconds


def _sample(contender: Contender, calls: int, device: torch.device) -> float:
    """Seconds of one call, from `calls` of them in a row."""
    with contender.context():
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            contender.run()
        _synchronize(device)
        return (time.perf_counter() - start) / calls


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timing(samples: list[float]) -> Timing:
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median * 1e3, (high - low) / median, len(samples))
