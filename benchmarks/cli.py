"""The command line: measures, prints tables, writes results; or renders committed results."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import rnnattn
from benchmarks import ceilings, digits, environment, plots, pooling, recurrent, report, roofline, runtimes, streaming
from benchmarks.cases import DTYPES, GATES, SUITES, Case, PoolCase, StepCase, name
from benchmarks.extras import optional
from benchmarks.measure import Experiment, measure
from benchmarks.render import render
from benchmarks.results import Results, Run, earlier, merged, write

OPS = ("digits", "step", *GATES, "attention_pool")
BACKENDS = {"cpu": ("cpp", "auto"), "cuda": ("auto", "triton", "cuda")}
SECONDS = {"quick": 2.0, "cpu": 1.5, "gpu": 0.5}


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
    p.add_argument("--resume", action="store_true", help="skip the cases that --out holds from this commit")
    p.add_argument("--render", type=Path, metavar="FOLDER", help="rewrite plots and README from result files and stop")
    p.add_argument("--readme", type=Path, default=Path("README.md"), help="of --render (%(default)s)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 where a check failed or a kernel raised or was wrong."""
    options = parser().parse_args(argv)
    if options.render:
        print("\n".join(map(str, [*render(options.render, options.readme), options.readme])))
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() and options.suite in ("auto", "gpu") else "cpu")
    suite = ("gpu" if device.type == "cuda" else "quick") if options.suite == "auto" else options.suite
    cases = _chosen(suite, options)
    if options.list:
        print("\n".join(map(name, cases)))
        return 0
    if suite == "gpu" and device.type != "cuda":
        raise SystemExit("--suite gpu: torch finds no CUDA device here")
    with_digits = "digits" in options.op and re.search(options.filter, "digits") is not None
    if not cases and not with_digits:
        raise SystemExit("no case is left by --op, --dtype and --filter; --list shows the names")
    console = report.new_console()
    here = environment.collect(device)
    console.print(str(here), highlight=False)
    for warning in [*environment.warnings(device), *_left_out(cases, device)]:
        console.print(f"[yellow]{warning}")
    backends = _usable(options.backend or BACKENDS[device.type], device, console)
    old = earlier(here, options.out)
    if options.resume and old is not None:
        done = {row.cell for row in old.rows if old.runs[row.run].environment.commit == here.commit}
        cases = [case for case in cases if not {(case.op, case.shape, case.dtype, m) for m in case.modes} <= done]
        with_digits = with_digits and not any(old.runs[row.run].environment.commit == here.commit for row in old.model)
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
        if not isinstance(case, StepCase) or streaming.supported(case)
    ]


def _left_out(cases: Sequence[Case], device: torch.device) -> list[str]:
    """The peers that are not installed, where they would have been asked."""
    if device.type != "cpu" or all(isinstance(case, PoolCase) for case in cases):
        return []
    return [f"{package} is left out: pip install rnnattn[bench-peers] for it" for package in runtimes.missing()]


def _ceilings(cases: Sequence[Case], device: torch.device) -> ceilings.Ceilings:
    dtypes = [case.dtype for case in cases if not isinstance(case, PoolCase)]
    return ceilings.measure(dtypes) if dtypes and device.type == "cpu" else ceilings.Ceilings()


def _measure(
    new: Results,
    cases: Sequence[Case],
    with_digits: bool,
    backends: Sequence[str],
    device: torch.device,
    options: argparse.Namespace,
    progress: Any,
) -> Iterator[None]:
    """Adds everything there is to measure to `new`; yields after the model and after every case."""
    task = progress.add_task("", total=(1 + len(backends)) * with_digits + sum(len(case.modes) for case in cases))

    def advance(stage: str) -> None:
        progress.update(task, advance=1, description=stage)

    if with_digits:
        new.model.extend(digits.measure(backends, device, options.epochs, options.seconds, advance))
        yield
    for case in cases:
        progress.update(task, description=name(case))
        for mode, found in measure(case, _experiment(case, device), backends, options.seconds):
            new.rows.extend(found)
            advance(f"{name(case)} {mode}")
        yield


def _experiment(case: Case, device: torch.device) -> Experiment:
    if isinstance(case, StepCase):
        return streaming.experiment(case, device)
    return pooling.experiment(case, device) if isinstance(case, PoolCase) else recurrent.experiment(case, device)


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
