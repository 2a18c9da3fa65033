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

from benchmarks import (
    cases,
    ceilings,
    cli,
    digits,
    environment,
    measure,
    plots,
    pooling,
    recurrent,
    results,
    roofline,
    runtimes,
    streaming,
    targets,
    timing,
)
from benchmarks.cases import BACKWARD, FORWARD, PoolCase, RecurrentCase, StepCase
from benchmarks.ceilings import Ceilings
from benchmarks.measure import relative_error
from benchmarks.render import END, START, render

pytest.importorskip("rich")
image = pytest.importorskip("matplotlib.image")

CPU = torch.device("cpu")
ROW = results.Row(
    op="lstm", case="B1-T2-I3-H4", dtype="fp32", mode="forward", requested="auto", backend="cpp", kernel="C++",
    baseline="torch.nn.LSTM", baseline_kernel="oneDNN LSTM", median_ms=1.0, spread=0.1, baseline_median_ms=2.0,
    baseline_spread=0.1, ratio=2.0, ratio_low=1.9, ratio_high=2.1, gflops=10.0, baseline_gflops=5.0, intensity=1.0,
    error=1e-7, baseline_error=1e-7, repetitions=5, counts=True, failed=False, note="",
)  # fmt: skip
BY_TORCH = replace(ROW, case="B9-T2-I3-H4", backend="torch", ratio=100.0, counts=False, note=results.BY_TORCH)
MODEL_ROW = results.ModelRow(
    requested="auto", backend="lstm torch, attention_pool cpp", kernel="lstm oneDNN, attention_pool C++",
    logit_difference=1e-6, loss_difference=1e-6, losses=[2.3, 2.2],
    correct=440, baseline_correct=440, images=449, train_ms=2.0, train_spread=0.1, baseline_train_ms=3.0,
    baseline_train_spread=0.1, predict_ms=1.0, predict_spread=0.1, baseline_predict_ms=2.0,
    baseline_predict_spread=0.1, checks={"accuracy": True},
)  # fmt: skip
CEILINGS = Ceilings({"fp32": 100.0, "bf16": 40.0}, memory=20.0, l2=80.0)


def measured(*rows: results.Row) -> results.Results:
    return results.Results([results.Run(environment.collect(CPU), CEILINGS)], list(rows), [MODEL_ROW])


def assert_is_a_picture(path: Path) -> None:
    pixels = image.imread(path)
    assert min(pixels.shape[:2]) > 100
    assert np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0).shape[0] > 10


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
        assert row["counts"] == (row["backend"] in results.OWN_BACKENDS and "faster in another form" not in row["note"])
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


def test_torch_kernels_enter_no_mean_and_no_plot(tmp_path: Path) -> None:
    found = results.means([ROW, replace(ROW, case="B3-T2-I3-H4", ratio=0.5), BY_TORCH])
    assert [(m.cases, m.lowest, m.highest) for m in found] == [(2, 0.5, 2.0)]
    assert found[0].ratio == pytest.approx(1.0)
    assert results.means([BY_TORCH]) == []
    assert [path.stem.rpartition("-")[2] for path in plots.draw(measured(BY_TORCH), tmp_path)] == ["digits"]


def test_auto_that_loses_to_torch_is_listed() -> None:
    slow, level = replace(BY_TORCH, ratio=0.9), replace(BY_TORCH, ratio=0.96)
    assert results.slower_than_torch([ROW, slow, level]) == [slow]


def test_merging_replaces_whole_cells_and_keeps_each_rows_run() -> None:
    other = replace(ROW, case="B3-T2-I3-H4")
    old, again = measured(ROW, replace(ROW, baseline="ONNX Runtime"), other), replace(ROW, ratio=3.0)
    new = replace(measured(again), model=[])
    both = results.merged(old, new)
    assert both.rows == [other, replace(again, run=1)] and both.model == old.model
    assert both.runs == [*old.runs, *new.runs]
    everything = results.merged(both, measured(ROW, other))
    assert everything.rows == [ROW, other] and len(everything.runs) == 1  # runs without rows are forgotten
    assert results.merged(None, new) == new


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


def assert_all_are_right(experiment: measure.Experiment, informational: float = 0.02) -> None:
    """All contenders give the exact output, and those that train the exact gradients."""
    modes = (FORWARD, BACKWARD) if experiment.inputs else (FORWARD,)
    for mode in modes:
        exact_dy = replace(experiment, inputs=experiment.exact_inputs, dy=experiment.dy.double())
        exact = measure._call(experiment.exact, exact_dy, mode)
        with torch.inference_mode(mode == FORWARD):
            truth = exact()
            ours = measure.Peer("ours", str, experiment.ours)
            for peer in (ours, *experiment.peers):
                if peer.trains or mode == FORWARD:
                    with peer.context():
                        found = measure._call(peer.forward, experiment, mode)()
                    assert len(found) == len(truth)
                    found[0] = peer.seen(found[0])
                    limit = informational if peer.informational else 3e-6
                    assert max(map(relative_error, found, truth)) < limit, peer.name


RECURRENT = [
    RecurrentCase(3, 6, 4, 5, 2, True),
    RecurrentCase(3, 6, 4, 5, ragged=True),
    RecurrentCase(2, 1, 4, 5, op="gru"),
    RecurrentCase(3, 6, 4, 5, 2, True, op="gru"),
    RecurrentCase(3, 6, 4, 5, ragged=True, op="gru"),
    RecurrentCase(3, 6, 4, 5, 2, True, op="rnn"),
    RecurrentCase(3, 6, 4, 5, ragged=True, op="rnn"),
]


@pytest.mark.parametrize("case", RECURRENT, ids=cases.name)
def test_recurrent_contenders_compute_the_same(case: RecurrentCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "missing", lambda: ["onnx"])
    experiment = recurrent.experiment(case, CPU)
    assert len(experiment.peers) == (4 if case.ragged else 2)
    assert {peer.name.partition(",")[0] for peer in experiment.peers} == {f"torch.nn.{case.op.upper()}"}
    assert_all_are_right(experiment)


@pytest.mark.parametrize("case", RECURRENT, ids=cases.name)
def test_other_runtimes_compute_the_same(case: RecurrentCase) -> None:
    for package in runtimes.PACKAGES:
        pytest.importorskip(package)
    experiment = recurrent.experiment(case, CPU)
    names = [peer.name for peer in experiment.peers if not peer.trains]
    int8 = ["ONNX Runtime int8"] if case.op == "lstm" else []
    assert names == ["ONNX Runtime", *int8, "OpenVINO"]
    assert_all_are_right(experiment)


@pytest.mark.parametrize("variant", ["LSTM", "LSTMCell", "LSTM-prepared"])
def test_streaming_contenders_carry_the_state_on(variant: str) -> None:
    case = StepCase(variant, H=8)
    if not streaming.supported(case):
        pytest.skip("rnnattn.LSTM has no prepare_inference")
    experiment = streaming.experiment(case, CPU)
    assert experiment.operations == streaming.STEPS
    assert_all_are_right(experiment, informational=0.05)
    with pytest.MonkeyPatch.context() as patch:  # one step fewer is another output: the last one is what is compared
        patch.setattr(streaming, "STEPS", streaming.STEPS - 1)
        other = streaming.experiment(case, CPU).exact()
    assert relative_error(other, experiment.exact()) > 0.1


@pytest.mark.parametrize(("kind", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_onnx_weights_are_torchs_in_onnx_order(kind: str, gates: int) -> None:
    """ONNX operators, LSTM: iofc; GRU: zrh. torch: ifgo, rzn. Each gate's rows are filled with its letter."""
    theirs, wanted = {"LSTM": ("ifgo", "iofg"), "GRU": ("rzn", "zrn"), "RNN": ("h", "h")}[kind]
    module = getattr(torch.nn, kind)(2, 3, bidirectional=True)
    letters = torch.tensor([float(ord(letter)) for letter in theirs for _ in range(3)])
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            shift = 1000 * ("reverse" in name) + 100000 * ("hh" in name)
            parameter.copy_((letters + shift).view(-1, *[1] * (parameter.dim() - 1)).expand_as(parameter))
    W, R, B = runtimes.layer_weights(module, 0)
    expected = torch.tensor([float(ord(letter)) for letter in wanted for _ in range(3)])
    assert W.shape == (2, gates * 3, 2) and R.shape == (2, gates * 3, 3) and B.shape == (2, 2 * gates * 3)
    for direction in (0, 1):
        assert torch.equal(W[direction, :, 1], expected + 1000 * direction)
        assert torch.equal(R[direction, :, 2], expected + 1000 * direction + 100000)
        assert torch.equal(B[direction], torch.cat([expected, expected + 100000]) + 1000 * direction)


def test_operations_are_counted_as_the_products_say() -> None:
    one_step = 2 * 4 * 7 * (3 + 7)  # 2 G H (I + H)
    assert RecurrentCase(1, 1, 3, 7).flops(FORWARD) == one_step
    assert RecurrentCase(5, 2, 3, 7).flops(BACKWARD) == 3 * 5 * 2 * one_step
    assert RecurrentCase(1, 1, 3, 7, op="gru").flops(FORWARD) == one_step * 3 / 4
    second_layer = 2 * 4 * 7 * (14 + 7)  # reads both directions of the first
    assert RecurrentCase(1, 1, 3, 7, 2, True).flops(FORWARD) == 2 * (one_step + second_layer)
    lengths = cases.ragged_lengths(4, 20)
    assert lengths.min() == 2 and lengths.max() == 20
    assert RecurrentCase(4, 20, 3, 7, ragged=True).flops(FORWARD) == int(lengths.sum()) * one_step


def suite_rows(ratio: float, **changes: object) -> list[results.Row]:
    """A row for every padded LSTM case of the cpu suite in fp32 inference."""
    shapes = [
        case.shape for case in cases.SUITES["cpu"] if cases.name(case).startswith("lstm") and case.dtype == "fp32"
    ]
    return [replace(ROW, case=shape, ratio=ratio, **changes) for shape in shapes if "ragged" not in shape]


def verdict(rows: list[results.Row], title: str = "LSTM inference", dtype: str = "fp32") -> targets.Verdict:
    return next(v for v in targets.verdicts(measured(*rows)) if (v.target.title, v.target.dtype) == (title, dtype))


def test_a_target_is_judged_by_the_best_peer_of_every_case() -> None:
    rows = suite_rows(1.3)
    assert verdict(rows).reached and verdict(rows).ratio == pytest.approx(1.3)
    faster_peer = replace(rows[2], baseline="ONNX Runtime", ratio=0.9)
    found = verdict([*rows, faster_peer])
    assert not found.reached and (found.worst, found.worst_case) == (0.9, rows[2].case)
    informational = replace(rows[2], baseline="ONNX Runtime int8", ratio=0.3, counts=False, note="for information only")
    by_torch = replace(rows[2], backend="torch", ratio=0.5, counts=False, note=results.BY_TORCH)
    assert verdict([*rows, informational, by_torch]).reached
    assert not verdict(suite_rows(1.1)).reached
    assert "incomplete" in verdict(rows[1:]).text and not verdict(rows[1:]).reached
    assert verdict(rows, "LSTM training").text == "not measured"
    assert targets.verdicts(measured(BY_TORCH)) == []


def test_a_row_at_the_hardware_limit_counts_as_reached() -> None:
    rows = suite_rows(1.3)
    slow = replace(rows[0], ratio=0.8, gflops=80.0)
    assert not verdict([slow, *rows[1:]]).reached
    limit = replace(slow, gflops=85.0)
    found = verdict([limit, *rows[1:]])
    assert found.reached and found.at_ceiling == 1 and "limit" in found.text
    assert found.worst == 0.8 and found.ratio is not None and found.ratio < 1.3  # shown as measured
    # Products in bf16 are slower than in fp32 here, and so no limit.
    assert not targets.at_ceiling(replace(limit, dtype="bf16", gflops=40.0), measured())
    assert CEILINGS.rate("bf16") == 100.0 and Ceilings().rate("fp32") is None


def test_the_step_target_takes_the_fastest_of_our_ways_and_only_torchs_layer() -> None:
    step = replace(ROW, op="step", case="LSTM-B1-T1-I256-H256", ratio=3.0)
    prepared = replace(step, case="LSTM-prepared-B1-T1-I256-H256", ratio=9.0)
    against_cell = replace(prepared, baseline="torch.nn.LSTMCell", ratio=2.0)
    found = verdict([step, prepared, against_cell], "one step, B=1, H=256, against nn.LSTM")
    assert found.reached and found.ratio == pytest.approx(9) and found.worst_case == prepared.case


def test_roofline_shows_the_cpu_suite_under_measured_ceilings(tmp_path: Path) -> None:
    (picture,) = roofline.draw(measured(*suite_rows(1.3)), tmp_path)
    assert_is_a_picture(picture)
    assert roofline.draw(measured(ROW), tmp_path) == []  # not of the suite
    without = replace(measured(*suite_rows(1.3)), runs=[results.Run(environment.collect(CPU))])
    assert roofline.draw(without, tmp_path) == []


@pytest.mark.parametrize(
    "case", [PoolCase(3, 20, 8), PoolCase(3, 20, 8, ragged=True), PoolCase(3, 20, 8, A=4, ragged=True)], ids=cases.name
)
def test_pooling_contenders_compute_the_same(case: PoolCase) -> None:
    assert_all_are_right(pooling.experiment(case, CPU))


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
