"""The command line: measures, prints tables, writes results; or renders committed results."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import rnnattn
from benchmarks import ceilings, compiling, digits, environment, gpu_peers, plots, report, roofline, room, runtimes
from benchmarks.cases import DTYPES, GATES, GPU_SUITES, SUITES, Case, PoolCase, StepCase, name
from benchmarks.experiments import experiment, switches
from benchmarks.extras import optional
from benchmarks.measure import failed_by, measure
from benchmarks.render import render
from benchmarks.results import NO_ROOM, Results, Row, Run, earlier, left_out, merged, write
from benchmarks.streaming import supported

OPS = ("digits", "step", *GATES, "attention_pool")
BACKENDS = {"cpu": ("cpp", "auto"), "cuda": ("auto", "triton", "cuda")}
SECONDS = {"quick": 2.0, "cpu": 1.5, "gpu": 0.5, "gpu-full": 0.3}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    p.add_argument("--suite", choices=("auto", *SUITES), default="auto", help="auto: gpu with CUDA, else quick")
    p.add_argument("--op", choices=OPS, nargs="+", default=OPS, help="what to measure (all)")
    p.add_argument("--dtype", choices=DTYPES, nargs="+", default=tuple(DTYPES), help="of the microbenchmarks (all)")
    p.add_argument("--backend", choices=("auto", "cpp", "triton", "cuda"), nargs="+", help="(auto and all usable)")
    p.add_argument("--filter", default="", metavar="REGEX", help="only cases whose name matches; see --list")
    p.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    p.add_argument("--seconds", type=float, help="time for one case and pass (by suite)")
    p.add_argument("--epochs", type=int, default=digits.EPOCHS, help="of training the digits model (%(default)s)")
    p.add_argument("--out", type=Path, default=Path("results"), help="folder of the results, merged (%(default)s)")
    p.add_argument(
        "--resume",
        nargs="?",
        const="commit",
        choices=("commit", "any"),
        help="skip the cases that --out holds from this commit, or from any",
    )
    p.add_argument("--commit", help="of this checkout, where there is no git to tell")
    p.add_argument(
        "--compile",
        nargs="?",
        type=int,
        const=os.cpu_count() or 1,
        metavar="PROCESSES",
        help="compile the cases' kernels first, in processes side by side (as many as processors)",
    )
    p.add_argument("--compile-only", action="store_true", help="stop when --compile is done")
    p.add_argument("--render", type=Path, metavar="FOLDER", help="rewrite plots and README from result files and stop")
    p.add_argument("--readme", type=Path, default=Path("README.md"), help="of --render (%(default)s)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 where a check failed or a kernel raised or was wrong."""
    options = parser().parse_args(argv)
    if options.render:
        print("\n".join(map(str, [*render(options.render, options.readme), options.readme])))
        return 0
    on_gpu = torch.cuda.is_available() and options.suite in ("auto", *GPU_SUITES)
    device = torch.device("cuda" if on_gpu else "cpu")
    suite = ("gpu" if device.type == "cuda" else "quick") if options.suite == "auto" else options.suite
    cases = _chosen(suite, options)
    if options.list:
        print("\n".join(map(name, cases)))
        return 0
    if suite in GPU_SUITES and device.type != "cuda":
        raise SystemExit(f"--suite {suite}: torch finds no CUDA device here")
    with_digits = "digits" in options.op and re.search(options.filter, "digits") is not None
    if not cases and not with_digits:
        raise SystemExit("no case is left by --op, --dtype and --filter; --list shows the names")
    console = report.new_console()
    here = environment.collect(device)
    here = replace(here, commit=options.commit or here.commit)
    console.print(str(here), highlight=False)
    for warning in [*environment.warnings(device), *_left_out(cases, device)]:
        console.print(f"[yellow]{warning}")
    backends = _usable(options.backend or BACKENDS[device.type], device, console)
    old = earlier(here, options.out)
    if options.resume and old is not None:
        kept = [n for n, run in enumerate(old.runs) if options.resume == "any" or run.environment.commit == here.commit]
        done = {row.cell for row in old.rows if row.run in kept}
        cases = [case for case in cases if not {(case.op, case.shape, case.dtype, m) for m in case.modes} <= done]
        with_digits = with_digits and not any(row.run in kept for row in old.model)
    if options.compile and cases:
        for line in compiling.compile_all(cases, device, backends, options.compile):
            console.print(line, highlight=False, markup=False)
    if options.compile_only:
        return 0
    new = Results([Run(here, _ceilings(cases, device))], [], [])
    report.show_ceilings(new.runs[0].ceilings, console)
    options.seconds = SECONDS[suite] if options.seconds is None else options.seconds
    with _progress(console) as progress:
        for _ in _measure(new, cases, with_digits, backends, device, options, progress):
            write(merged(old, new), options.out)  # so that a run that is broken off is not lost
    report.show(new, console)
    results = merged(old, new)
    report.show_targets(results, console)
    for path in [*write(results, options.out), *plots.draw(results, options.out), *roofline.draw(results, options.out)]:
        console.print(f"wrote {path}", highlight=False)
    return int(new.failed)


def _chosen(suite: str, options: argparse.Namespace) -> list[Case]:
    return [
        case
        for case in SUITES[suite]
        if case.op in options.op and case.dtype in options.dtype and re.search(options.filter, name(case))
        if not isinstance(case, StepCase) or supported(case)
    ]


def _left_out(cases: Sequence[Case], device: torch.device) -> list[str]:
    """The peers that are not installed, where they would have been asked."""
    if all(isinstance(case, PoolCase) for case in cases):
        return []
    cpu = device.type == "cpu"
    missing, extra = (runtimes.missing(), "bench-peers") if cpu else (gpu_peers.missing(), "bench-gpu-peers")
    return [f"{package} is left out: pip install rnnattn[{extra}] for it" for package in missing]


def _ceilings(cases: Sequence[Case], device: torch.device) -> ceilings.Ceilings:
    if device.type == "cuda":
        return ceilings.measure_copy(device)
    dtypes = [case.dtype for case in cases if not isinstance(case, PoolCase)]
    return ceilings.measure(dtypes) if dtypes else ceilings.Ceilings()


def _measure(
    new: Results,
    cases: Sequence[Case],
    with_digits: bool,
    backends: Sequence[str],
    device: torch.device,
    options: argparse.Namespace,
    progress: Any,
) -> Iterator[None]:
    """Adds everything there is to measure to `new`; yields after every case and, last, after the model."""
    task = progress.add_task("", total=(1 + len(backends)) * with_digits + sum(len(case.modes) for case in cases))

    def advance(stage: str) -> None:
        progress.update(task, advance=1, description=stage)

    for case in cases:
        progress.update(task, description=name(case))
        for mode, found in _rows(case, backends, device, options.seconds):
            new.rows.extend(found)
            advance(f"{name(case)} {mode}")
        yield
        _check(case, device)
    if with_digits:
        new.model.extend(digits.measure(backends, device, options.epochs, options.seconds, advance))
        yield


def _rows(
    case: Case, backends: Sequence[str], device: torch.device, seconds: float
) -> Iterator[tuple[str, Sequence[Row]]]:
    """Those of each mode; where there are none, as a GPU's memory does not hold the case, a row that says so."""
    waiting, failed = list(case.modes), False
    objection = room.objection(case, room.bytes_free(device)) if device.type == "cuda" else ""
    note = f"{NO_ROOM} ({objection})"
    try:
        if not objection:
            with switches(case):
                for mode, found in measure(case, experiment(case, device), backends, seconds):
                    waiting.remove(mode)
                    yield mode, found
    except torch.OutOfMemoryError:
        note = f"{NO_ROOM} (about {room.bytes_needed(case) / 1e9:.0f} GB by an estimate that was too low)"
    except Exception as error:
        if device.type == "cpu":
            raise
        note, failed = failed_by(error), True  # the next case may do better
    for mode in waiting:
        yield mode, [left_out((case.op, case.shape, case.dtype, mode), note, failed)]


def _check(case: Case, device: torch.device) -> None:
    """After an error that a kernel left behind, everything on this GPU fails in this process."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            raise SystemExit(f"the GPU was lost in {name(case)}: go on with --resume ({error})") from error


def _usable(backends: Sequence[str], device: torch.device, console: Any) -> list[str]:
    """Those that can run one of the operations here, found by the smallest calls; says why not the others."""
    modules = rnnattn.AttentionPool(1, device=device), rnnattn.LSTM(1, 1, device=device)
    x = torch.zeros(1, 1, 1, device=device)
    usable = []
    for backend in backends:
        reason = ""
        for module in modules:
            try:
                with rnnattn.use_backend(backend), torch.no_grad():
                    rnnattn.explain(module, x)
                usable.append(backend)
                break
            except rnnattn.BackendError as error:
                reason = str(error)
        else:
            console.print(f"[yellow]{backend} is left out: {reason}")
    if not usable:
        raise SystemExit(f"--backend: none of {', '.join(backends)} can run here")
    return usable


def _progress(console: Any) -> Any:
    progress = optional("rich.progress")
    return progress.Progress(
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.description}"),
        console=console,
    )
