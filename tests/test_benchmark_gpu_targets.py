"""What measured rows say of the targets of a GPU, on made-up rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from benchmark_rows import CPU, ROW, measured

from benchmarks import cases, environment, results, targets, verdicts
from benchmarks.cases import PoolCase, RecurrentCase
from benchmarks.ceilings import Ceilings
from benchmarks.gpu_targets import PUBLISHED_STEP_US
from benchmarks.render import section

CORE = cases.SUITES["gpu"]
GPU = replace(environment.collect(CPU), cudnn="91002")
STANDARD, PACKED = "cuDNN STANDARD", "torch.nn.LSTM, packed"


def on_gpu(*rows: results.Row) -> results.Results:
    return results.Results([results.Run(GPU, Ceilings(copy=3000.0))], list(rows), [])


def row_of(case: cases.Case, mode: str, **changes: Any) -> results.Row:
    row = replace(ROW, op=case.op, case=case.shape, dtype=case.dtype, mode=mode, requested="triton", backend="triton")
    return replace(row, **{"ratio": 2.5, "baseline_kernel": STANDARD, **changes})


def core_rows(**changes: Any) -> list[results.Row]:
    """A row for every cell of the core suite, each as fast as its target asks."""
    rows = []
    for case in CORE:
        for mode in case.modes:
            if isinstance(case, PoolCase):
                rows.append(row_of(case, mode, baseline="eager", baseline_kernel="bmm", bandwidth=2700.0, **changes))
            elif case.ragged:
                rows.append(row_of(case, mode, **{"baseline": PACKED, "ratio": 6.0, **changes}))
            else:
                rows.append(row_of(case, mode, step_us=1.9, **changes))
    return rows


def judged(rows: list[results.Row]) -> dict[str, verdicts.Verdict]:
    found = targets.verdicts(on_gpu(*rows))
    return {f"{verdict.target.title} {verdict.target.dtype}": verdict for verdict in found}


def test_targets_of_a_gpu_are_reached_or_not_by_their_own_measure() -> None:
    found = judged(core_rows())
    auto = found.pop("where auto takes our kernels all")
    assert auto.text == "not measured"
    assert {name: verdict.text for name, verdict in found.items()} == dict.fromkeys(found, "reached")
    (step,) = (verdict for name, verdict in found.items() if "fp16" in name)
    assert step.expected == 1 and step.ratio == pytest.approx(PUBLISHED_STEP_US / 1.9)
    (pool,) = (verdict for name, verdict in found.items() if name.startswith("pooling, inference"))
    assert pool.expected == 2 and pool.ratio == pytest.approx(0.9)
    (ragged,) = (verdict for name, verdict in found.items() if name.startswith("lengths"))
    assert ragged.ratio == pytest.approx(6.0)
    slow = judged([replace(row, ratio=1.0, step_us=2.0, bandwidth=1500.0) for row in core_rows()])
    assert not any(verdict.reached for verdict in slow.values())
    assert targets.title(on_gpu()) != targets.title(measured(ROW))
    assert "GPU kernels over the cases of the gpu suite" in section([on_gpu(*core_rows())], [[]])


def test_a_target_of_a_branch_counts_only_the_cells_that_run_it() -> None:
    title = "where cuDNN runs STANDARD, B up to 64 all"
    rows = core_rows()
    case = RecurrentCase(1, 512, 128, 128, dtype="fp32")
    for n, row in enumerate(rows):
        if row.case == case.shape:
            rows[n] = replace(row, baseline_kernel="cuDNN PERSIST_STATIC_SMALL_H", ratio=0.1)
    everything, without = judged(core_rows())[title], judged(rows)[title]
    assert without.expected == without.measured == everything.expected - 2
    assert without.reached
    assert "incomplete" in judged(rows[1:])[title].text  # the hard point has not been measured


def test_the_better_of_our_gpu_backends_counts_against_the_best_baseline() -> None:
    rows = core_rows()
    name = "LSTM inference, H from 256 to 1024, B up to 64 bf16"
    slow = [replace(row, backend="cuda", requested="cuda", ratio=0.5) for row in rows if row.ratio]
    assert judged([*rows, *slow])[name].ratio == pytest.approx(2.5)


def test_auto_is_judged_where_it_takes_our_kernels() -> None:
    title = "where auto takes our kernels all"
    rows = core_rows(requested="auto, triton")
    assert judged(rows)[title].reached
    by_torch = [replace(rows[0], requested="auto", backend="torch", ratio=1.0, counts=False, note=results.BY_TORCH)]
    rest = judged([*by_torch, *rows[1:]])[title]
    assert rest.reached and rest.expected == judged(rows)[title].expected - 1
    worst = judged([replace(rows[0], ratio=0.96), *rows[1:]])[title]
    assert not worst.reached and rows[0].case in worst.worst_case and rows[0].dtype in worst.worst_case
