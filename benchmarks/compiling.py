"""Compiles the kernels of cases in many processes at once, before any is timed.

Triton and Inductor keep what they compile on disk, where the process that measures finds it. A kernel is compiled for
its constants, which do not depend on T: recurrent layers run a few steps only.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

import rnnattn
from benchmarks.cases import BACKWARD, FORWARD, Case, RecurrentCase, name
from benchmarks.experiments import experiment, switches
from benchmarks.measure import call
from benchmarks.timing import Context, synchronize

STEPS = 64  # enough for the planner to find that the sequence kernels pay, and a multiple of 16 like any T measured
SILENCE = 240.0  # seconds without a case done, after which a kernel is taken to hang or a process to be gone


def compile_all(cases: Sequence[Case], device: torch.device, backends: Sequence[str], workers: int) -> Iterator[str]:
    """A line for every case that is done, in the order in which they end.

    Processes are spawned: one that is forked has no use of CUDA.
    """
    work = [(shortened(case), str(device), tuple(backends)) for case in cases]
    with multiprocessing.get_context("spawn").Pool(min(workers, len(work))) as pool:  # terminates them at its end
        done = pool.imap_unordered(_compiled, work)
        for n in range(len(work)):
            try:
                yield done.next(SILENCE)
            except multiprocessing.TimeoutError:
                yield f"gave up on {len(work) - n} of {len(work)} cases: none was done in {SILENCE:.0f} s"
                return


def shortened(case: Case) -> Case:
    return replace(case, T=min(case.T, STEPS)) if isinstance(case, RecurrentCase) else case


def _compiled(work: tuple[Case, str, tuple[str, ...]]) -> str:
    case, device, backends = work
    try:
        failures = compile_case(case, torch.device(device), backends)
    except Exception as error:  # of the case itself, such as a lack of memory beside the other processes
        return f"not compiled {name(case)}: {error}"
    return "; ".join([f"compiled {name(case)}", *failures])


def compile_case(case: Case, device: torch.device, backends: Sequence[str]) -> list[str]:
    """Runs each implementation once in each mode. What fails is left for the measurement to report in its rows."""
    failures = []
    with switches(case):
        made = experiment(case, device)
        ours: list[tuple[str, Context, Callable[[], Tensor]]] = [
            (backend, functools.partial(rnnattn.use_backend, backend), made.ours) for backend in backends
        ]
        for mode in case.modes:
            for module in made.modules:
                module.train(mode == BACKWARD)
            peers = [peer for peer in made.peers if peer.trains or mode == FORWARD]
            for which, context, forward in [*ours, *((peer.name, peer.context, peer.forward) for peer in peers)]:
                try:
                    with torch.inference_mode(mode == FORWARD), context():
                        call(forward, made, mode)()
                        synchronize(device)
                except Exception as error:
                    failures.append(f"{which}, {mode}: {type(error).__name__}")
    return failures
