"""The benchmarks as a program: one small run end to end, and the parts that decide what counts."""

from __future__ import annotations

import csv
import functools
import json
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from benchmark_rows import CPU, assert_is_a_picture

from benchmarks import (
    cases,
    ceilings,
    cli,
    environment,
    measure,
    pooling,
    results,
    runtimes,
    timing,
)
from benchmarks.cases import BACKWARD, FORWARD, PoolCase, RecurrentCase
from benchmarks.measure import relative_error

pytest.importorskip("rich")
pytest.importorskip("matplotlib")


def test_command_line_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small: list[cases.Case] = [
        RecurrentCase(2, 5, 3, 4, ragged=True),
        RecurrentCase(2, 5, 3, 4),
        PoolCase(2, 5, 8, A=4),
    ]
    monkeypatch.setitem(cases.SUITES, "quick", [*small, PoolCase(2, 5, 8, dtype="bf16")])
    monkeypatch.setattr(ceilings, "PRODUCT_SIZE", 64)
    monkeypatch.setattr(ceilings, "MEMORY_BYTES", 2**20)
    monkeypatch.setattr(runtimes, "missing", lambda: ["onnx"])
    out = tmp_path / "results"
    arguments = ["--suite", "quick", "--op", "lstm", "attention_pool", "--dtype", "fp32", "--seconds", "0.01"]
    arguments += ["--out", str(out)]
    assert cli.main(arguments) == 0

    data = json.loads(next(out.glob("*.json")).read_text())
    with next(out.glob("*.csv")).open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(data["rows"])
    assert {row["case"] for row in table} == {case.shape for case in small}
    assert {row["mode"] for row in table} == {FORWARD, BACKWARD}
    wanted = {field.name for field in (*fields(results.Row), *fields(environment.Environment))} - {"run"}
    assert set(table[0]) == wanted
    assert all(
        rate > 0 for rate in (*data["runs"][0]["ceilings"]["products"].values(), data["runs"][0]["ceilings"]["l2"])
    )
    for row in data["rows"]:
        assert row["median_ms"] > 0 and row["baseline_median_ms"] > 0
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row["error"] < 1e-5 and row["baseline_error"] < 1e-5
        unlike = results.ANOTHER_FORM in row["note"] or row["requested"] == results.PREPARED
        assert row["counts"] == (row["backend"] in results.OWN_BACKENDS and not unlike)
        assert (row["gflops"] is None) == (row["op"] != "lstm")
    baselines = {(row["case"], row["baseline"]) for row in data["rows"] if row["op"] == "lstm"}
    assert baselines == {
        ("B2-T5-I3-H4-ragged", "torch.nn.LSTM, packed"),
        ("B2-T5-I3-H4-ragged", "torch.nn.LSTM, padded"),
        ("B2-T5-I3-H4", "torch.nn.LSTM"),
    }
    pictures = list(out.glob("*.png"))
    assert len(pictures) == len({(row["op"], row["dtype"]) for row in data["rows"] if row["counts"]})
    for picture in pictures:
        assert_is_a_picture(picture)

    before = results.read(next(out.glob("*.json")))
    assert cli.main([*arguments, "--filter", "ragged"]) == 0
    after = results.read(next(out.glob("*.json")))
    assert {row.cell for row in after.rows} == {row.cell for row in before.rows} and len(after.rows) == len(before.rows)
    assert len(after.runs) == 2
    assert {row.case for row in after.rows if row.run == 1} == {"B2-T5-I3-H4-ragged"}
    assert cli.main([*arguments, "--resume"]) == 0
    assert results.read(next(out.glob("*.json"))) == after


def test_a_wrong_peer_is_no_baseline_and_a_missing_one_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> torch.Tensor:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(pooling, "_compiled", lambda form: fails)
    monkeypatch.setattr(pooling, "one_query_attention", lambda x, v, w, b, keep: 2 * pooling.bmm_form(x, v, w, b, keep))
    monkeypatch.setattr(measure, "OWN_BACKENDS", ("reference",))
    case = PoolCase(2, 7, 16, compiled=True)
    found = dict(measure.measure(case, pooling.experiment(case, CPU), ["reference"], 0.01))
    assert list(found) == ["forward", "forward+backward"]
    for rows in found.values():
        *eager, wrong, missing, _ = rows
        assert [row.baseline for row in rows] == ["eager", "eager", "SDPA", "torch.compile", "torch.compile"]
        assert {row.backend for row in rows} == {"reference"} and not any(row.failed for row in rows)
        fast, slow = sorted(eager, key=lambda row: row.baseline_median_ms or 0)
        assert fast.counts and fast.ratio is not None and not fast.note
        assert not slow.counts and slow.note == "eager is faster in another form"
        assert not wrong.counts and wrong.baseline_error == pytest.approx(1, rel=0.5) and "is wrong" in wrong.note
        assert not missing.counts and missing.ratio is None and "RuntimeError: no compiler" in missing.note


def test_a_kernel_that_is_wrong_or_raises_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    case = PoolCase(2, 7, 16)
    experiment = pooling.experiment(case, CPU)
    for ours, reason in ((lambda: 2 * experiment.ours(), "our result is wrong"), (lambda: 1 / 0, "ZeroDivisionError")):
        monkeypatch.setattr(measure, "OWN_BACKENDS", ("reference",))
        found = dict(measure.measure(case, replace(experiment, ours=ours), ["reference"], 0.01))
        for row in (row for rows in found.values() for row in rows):
            assert row.failed and not row.counts and reason in row.note


def test_forms_of_a_peer_that_take_far_longer_are_not_timed() -> None:
    def entry(name: str, seconds: float, error: float = 0.0) -> measure._Entry:
        return measure._Entry(name, "", "", timing.Contender(lambda: None), error, seconds)

    peers = [entry("a", 0.2), entry("a", 3.0), entry("b", 3.0), entry("c", 0.1, 1.0), entry("c", 3.0), entry("d", 25.0)]
    left = [measure._left_out(peer, peers) for peer in peers]
    assert [peer.contender is None for peer in left] == [False, True, False, False, False, True]
    assert left[1].failure == "was left out: a call takes 3.0 s" and "25.0 s" in left[-1].failure


def test_relative_error_is_infinite_for_what_is_not_finite() -> None:
    truth = torch.ones(2, dtype=torch.float64)
    assert relative_error(torch.tensor([1.0, float("nan")]), truth) == float("inf")
    assert relative_error(torch.tensor([1.0, 1.5]), truth) == pytest.approx(0.5 / 2**0.5)


def test_every_contender_gets_every_turn() -> None:
    order: list[str] = []

    def run(name: str) -> None:
        order.append(name)
        time.sleep(1.5 * timing.MIN_BURST_SECONDS)  # so that a sample is one call

    found = timing.compare([timing.Contender(functools.partial(run, name)) for name in "abc"], 0.0, CPU)
    assert [len(t.rounds) for t in found] == [timing.MIN_ROUNDS] * 3
    turns = "".join(order[-3 * timing.MIN_ROUNDS :])
    assert turns == "abcbcacababcbca"
    assert all(t.median_ms >= 1.5e3 * timing.MIN_BURST_SECONDS for t in found)
    (per_operation,) = timing.compare([timing.Contender(functools.partial(run, "a"), operations=100)], 0.0, CPU)
    assert per_operation.median_ms < 0.1 * found[0].median_ms


def test_ratios_are_taken_within_a_round() -> None:
    """A slow round, here ten times, meets both: it moves neither the median nor the quartiles of the ratios."""
    ours, baseline = timing.Timing((1.0, 10.0, 1.0, 20.0, 1.0)), timing.Timing((2.0, 20.0, 2.0, 40.0, 2.0))
    assert timing.ratios(baseline, ours) == (2.0, 2.0, 2.0)
    low, median, high = timing.ratios(timing.Timing((1.0, 2.0, 3.0, 4.0, 5.0)), timing.Timing((1.0,) * 5))
    assert (low, median, high) == (2.0, 3.0, 4.0)


@pytest.mark.parametrize(
    ("device_name", "expected"),
    [
        ("Intel(R) Xeon(R) Processor @ 2.50GHz", "xeon"),
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "xeon-platinum-8481c"),
        ("AMD EPYC 7763 64-Core Processor", "epyc-7763"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb-hbm3"),
    ],
)
def test_a_device_names_its_result_file(device_name: str, expected: str) -> None:
    assert environment._slug(device_name) == expected


def test_names_of_cases_are_unique() -> None:
    for suite in cases.SUITES.values():
        names = [cases.name(case) for case in suite]
        assert len(set(names)) == len(names)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.extras import optional

    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit, match=r"scikit-learn.*pip install rnnattn\[bench\]"):
        optional("sklearn.datasets")
