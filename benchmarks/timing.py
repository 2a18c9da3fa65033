"""Times contenders against each other in one process, by turns.

Every round runs each contender for a short burst, in an order that rotates from one round to the
next, so that a slow moment of the machine meets all of them; ratios are taken within a round, and
their median over the rounds is the result. On a GPU the clock is read after a synchronisation, and
a burst holds enough calls to make that negligible. Caches are warm, as between the layers of a
model.
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

MIN_BURST_SECONDS = 0.004
MIN_ROUNDS, MAX_ROUNDS = 5, 60
LONG_ROUND_SECONDS, MIN_LONG_ROUNDS = 6.0, 3  # a round this long averages over the machine's moods by itself
FIRST_CALL_COUNTS_SECONDS = 0.25  # a first call this long is not much of set-up


@dataclass(frozen=True)
class Contender:
    """A call to time; `context` is entered outside the timed loop.

    operations: how many of what is reported one call runs, one after another.
    settle: seconds to wait before and after a burst, where it has threads of its own: neither its threads nor those
        of the others may still spin in another's turn.
    """

    run: Callable[[], object]
    context: Context = contextlib.nullcontext
    operations: int = 1
    settle: float = 0.0


@dataclass(frozen=True)
class Timing:
    """Milliseconds of an operation, one value per round."""

    rounds: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.rounds)

    @property
    def spread(self) -> float:
        """Interquartile range / median."""
        low, median, high = quartiles(self.rounds)
        return (high - low) / median


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def ratios(baseline: Timing, ours: Timing) -> tuple[float, float, float]:
    """The quartiles over the rounds of baseline's time / our time in one round."""
    return quartiles([b / o for b, o in zip(baseline.rounds, ours.rounds, strict=True)])


def compare(contenders: Sequence[Contender], seconds: float, device: torch.device) -> list[Timing]:
    """A timing for each; together they take about `seconds`, more if few rounds fit."""
    if not contenders:
        return []
    estimates = [_estimate(contender, device) for contender in contenders]
    calls = [max(1, math.ceil(MIN_BURST_SECONDS / estimate)) for estimate in estimates]
    bursts = zip(contenders, calls, estimates, strict=True)
    round_seconds = sum(2 * contender.settle + n * estimate for contender, n, estimate in bursts)
    fewest = MIN_ROUNDS if round_seconds < LONG_ROUND_SECONDS else MIN_LONG_ROUNDS
    rounds = min(MAX_ROUNDS, max(fewest, int(seconds / round_seconds)))
    samples: list[list[float]] = [[] for _ in contenders]
    collecting = gc.isenabled()
    gc.disable()
    try:
        for r in range(rounds):
            for n in range(len(contenders)):
                turn = (n + r) % len(contenders)
                samples[turn].append(_burst(contenders[turn], calls[turn], device))
    finally:
        if collecting:
            gc.enable()
    return [
        Timing(tuple(1e3 * seconds / contender.operations for seconds in values))
        for contender, values in zip(contenders, samples, strict=True)
    ]


def _estimate(contender: Contender, device: torch.device) -> float:
    """Seconds of a call, after a first call that may compile, allocate or choose an algorithm.

    On a GPU the first call never counts: a compiler may take seconds of it, the allocator a good part of one.
    """
    seconds, calls = _burst(contender, 1, device), 1
    if seconds > FIRST_CALL_COUNTS_SECONDS and device.type == "cpu":
        return seconds
    seconds = _burst(contender, 1, device)
    while seconds * calls < MIN_BURST_SECONDS and calls < 1024:
        calls *= 4
        seconds = _burst(contender, calls, device)
    return seconds


def _burst(contender: Contender, calls: int, device: torch.device) -> float:
    """Seconds of one call, from `calls` of them in a row."""
    time.sleep(contender.settle)
    with contender.context():
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            contender.run()
        synchronize(device)
        seconds = (time.perf_counter() - start) / calls
    time.sleep(contender.settle)
    return seconds


def synchronize(device: torch.device) -> None:
    """Waits for all that was launched; a CPU runs nothing behind the caller's back."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
