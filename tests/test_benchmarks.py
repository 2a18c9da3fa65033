"""The benchmarks as a program: one small run end to end, and the parts that decide what counts."""

from __future__ import annotations

import csv
import functools
import json
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import cases, cli, digits, environment, lstm, measure, plots, pooling, results, timing
from benchmarks.cases import LSTMCase, PoolCase
from benchmarks.measure import relative_error
from benchmarks.render import END, START, render

pytest.importorskip("rich")
image = pytest.importorskip("matplotlib.image")

CPU = torch.device("cpu")
ROW = results.Row(
    op="lstm", case="B1-T2-I3-H4", dtype="fp32", mode="forward", requested="auto", backend="cpp", kernel="C++",
    baseline="torch.nn.LSTM", baseline_kernel="oneDNN LSTM", median_ms=1.0, spread=0.1, baseline_median_ms=2.0,
    baseline_spread=0.1, ratio=2.0, error=1e-7, baseline_error=1e-7, repetitions=5, counts=True, failed=False, note="",
)  # fmt: skip
BY_TORCH = replace(
    ROW, case="B9-T2-I3-H4", backend="torch", ratio=100.0, counts=False, note="auto ran torch's own kernel"
)
MODEL_ROW = results.ModelRow(
    requested="auto", backend="lstm torch, attention_pool cpp", kernel="lstm oneDNN, attention_pool C++",
    logit_difference=1e-6, loss_difference=1e-6, losses=[2.3, 2.2],
    correct=440, baseline_correct=440, images=449, train_ms=2.0, train_spread=0.1, baseline_train_ms=3.0,
    baseline_train_spread=0.1, predict_ms=1.0, predict_spread=0.1, baseline_predict_ms=2.0,
    baseline_predict_spread=0.1, checks={"accuracy": True},
)  # fmt: skip


def measured(*rows: results.Row) -> results.Results:
    return results.Results(environment.collect(CPU), list(rows), [MODEL_ROW])


def assert_is_a_picture(path: Path) -> None:
    pixels = image.imread(path)
    assert min(pixels.shape[:2]) > 100
    assert np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0).shape[0] > 10


def test_command_line_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small: list[cases.Case] = [LSTMCase(2, 5, 3, 4, ragged=True), PoolCase(2, 5, 8, A=4)]
    monkeypatch.setitem(cases.SUITES, "quick", [*small, PoolCase(2, 5, 8, dtype="bf16")])
    out = tmp_path / "results"
    arguments = ["--suite", "quick", "--op", "lstm", "attention_pool", "--dtype", "fp32", "--seconds", "0.01"]
    assert cli.main([*arguments, "--out", str(out)]) == 0

    data = json.loads(next(out.glob("*.json")).read_text())
    with next(out.glob("*.csv")).open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(data["rows"])
    assert {row["case"] for row in table} == {case.shape for case in small}
    assert {row["mode"] for row in table} == {"forward", "forward+backward"}
    wanted = {field.name for field in (*fields(results.Row), *fields(environment.Environment))}
    assert set(table[0]) == wanted
    for row in data["rows"]:
        assert row["median_ms"] > 0 and row["baseline_median_ms"] > 0
        assert row["ratio"] == pytest.approx(row["baseline_median_ms"] / row["median_ms"])
        assert row["error"] < 1e-5 and row["baseline_error"] < 1e-5
        assert row["counts"] == (row["backend"] in results.OWN_BACKENDS)
    pictures = list(out.glob("*.png"))
    assert len(pictures) == len({(row["op"], row["dtype"]) for row in data["rows"] if row["counts"]})
    for picture in pictures:
        assert_is_a_picture(picture)


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
        eager, wrong, missing = rows
        assert [row.baseline for row in rows] == ["eager", "SDPA", "torch.compile"]
        assert {row.backend for row in rows} == {"reference"} and not any(row.failed for row in rows)
        assert eager.counts and eager.ratio is not None and not eager.note
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


def test_torch_kernels_enter_no_mean_and_no_plot(tmp_path: Path) -> None:
    found = results.means([ROW, replace(ROW, case="B3-T2-I3-H4", ratio=0.5), BY_TORCH])
    assert [(m.cases, m.lowest, m.highest) for m in found] == [(2, 0.5, 2.0)]
    assert found[0].ratio == pytest.approx(1.0)
    assert results.means([BY_TORCH]) == []
    assert [path.stem.rpartition("-")[2] for path in plots.draw(measured(BY_TORCH), tmp_path)] == ["digits"]


def test_auto_that_loses_to_torch_is_listed() -> None:
    slow, level = replace(BY_TORCH, ratio=0.9), replace(BY_TORCH, ratio=0.96)
    assert results.slower_than_torch([ROW, slow, level]) == [slow]


def test_results_come_back_as_written(tmp_path: Path) -> None:
    one = measured(ROW, BY_TORCH)
    path, _ = results.write(one, tmp_path)
    assert results.read(path) == one
    assert not one.failed
    assert measured(replace(ROW, failed=True)).failed
    assert replace(one, model=[replace(MODEL_ROW, checks={"accuracy": False})]).failed


def test_render_is_idempotent_and_leaves_the_rest_alone(tmp_path: Path) -> None:
    readme, folder = tmp_path / "README.md", tmp_path / "benchmarks" / "results"
    results.write(measured(ROW, BY_TORCH), folder)
    readme.write_text(f"# Title\n\n{START}\nold\n{END}\n\nAfter.\n")
    pictures = render(folder, readme)
    once = readme.read_text()
    render(folder, readme)
    assert readme.read_text() == once
    assert once.startswith(f"# Title\n\n{START}\n") and once.endswith(f"{END}\n\nAfter.\n") and "old" not in once
    assert "| lstm | fp32 | forward | cpp | torch.nn.LSTM | 1 | 2.00 | 2.00-2.00 |" in once
    assert "1 of 2 rows" in once and "On a GPU: not yet measured." in once
    for picture in pictures:
        assert f"({picture.relative_to(tmp_path).as_posix()})" in once
        assert_is_a_picture(picture)


def test_render_of_nothing_says_that_nothing_was_measured(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"{START}\n{END}\n")
    assert render(tmp_path, readme) == []
    assert readme.read_text() == f"{START}\nOn a GPU: not yet measured.\n\nOn a CPU: not yet measured.\n{END}\n"
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="benchmarks:start"):
        render(tmp_path, readme)
    with pytest.raises(ValueError, match="expected a folder"):
        render(tmp_path / "no", readme)


@pytest.mark.parametrize("case", [LSTMCase(3, 6, 4, 5, 2, True), LSTMCase(3, 6, 4, 5, ragged=True)], ids=cases.name)
def test_lstm_contenders_compute_the_same(case: LSTMCase) -> None:
    experiment = lstm.experiment(case, CPU)
    truth = experiment.exact()
    assert relative_error(experiment.ours(), truth) < 1e-6
    assert all(relative_error(peer.forward(), truth) < 1e-6 for peer in experiment.peers)


@pytest.mark.parametrize(
    "case", [PoolCase(3, 20, 8), PoolCase(3, 20, 8, ragged=True), PoolCase(3, 20, 8, A=4, ragged=True)], ids=cases.name
)
def test_pooling_contenders_compute_the_same(case: PoolCase) -> None:
    experiment = pooling.experiment(case, CPU)
    truth = experiment.exact()
    assert relative_error(experiment.ours(), truth) < 1e-6
    assert all(relative_error(peer.forward(), truth) < 1e-6 for peer in experiment.peers)


def test_relative_error_is_infinite_for_what_is_not_finite() -> None:
    truth = torch.ones(2, dtype=torch.float64)
    assert relative_error(torch.tensor([1.0, float("nan")]), truth) == float("inf")
    assert relative_error(torch.tensor([1.0, 1.5]), truth) == pytest.approx(0.5 / 2**0.5)


def test_every_contender_gets_every_turn() -> None:
    order: list[str] = []

    def run(name: str) -> None:
        order.append(name)
        time.sleep(1.5 * timing.MIN_SAMPLE_SECONDS)  # so that a sample is one call

    found = timing.compare([timing.Contender(functools.partial(run, name)) for name in "abc"], 0.0, CPU)
    assert [t.repetitions for t in found] == [timing.MIN_REPETITIONS] * 3
    turns = "".join(order[-3 * timing.MIN_REPETITIONS :])
    assert turns == "abcbcacababcbca"
    assert all(t.median_ms >= 1.5e3 * timing.MIN_SAMPLE_SECONDS for t in found)


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


def test_digits_model_after_the_swap_computes_and_learns_the_same() -> None:
    pytest.importorskip("sklearn")
    (row,) = digits.measure(["auto"], CPU, epochs=2, seconds=0.01)
    assert row.logit_difference < 1e-4
    assert len(row.losses) == digits.FIRST_LOSSES and row.losses[-1] < row.losses[0]
    assert row.checks[f"the first {digits.FIRST_LOSSES} losses agree to {digits.MAX_LOSS_DIFFERENCE:g}"]


def test_swapped_digits_model_shares_nothing_with_the_original_but_its_values() -> None:
    model = digits.new_model(CPU)
    after = digits.swapped(model)
    kinds = {type(module).__module__.partition(".")[0] for module in (after.recurrent, after.pool)}
    assert kinds == {"rnnattn"}
    assert {type(module) for module in (model.recurrent, model.pool)} == {torch.nn.LSTM, digits.AdditivePooling}
    assert sum(p.numel() for p in after.parameters()) == sum(p.numel() for p in model.parameters())


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.extras import optional

    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit, match=r"scikit-learn.*pip install rnnattn\[bench\]"):
        optional("sklearn.datasets")
