"""What becomes of benchmark rows: means, targets, merged and written results, the README's tables, plots."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from benchmark_rows import BY_TORCH, CEILINGS, CPU, MODEL_ROW, ROW, assert_is_a_picture, measured

from benchmarks import cases, environment, plots, results, roofline, targets, verdicts
from benchmarks.ceilings import Ceilings
from benchmarks.render import END, START, render

pytest.importorskip("rich")
pytest.importorskip("matplotlib")


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


def suite_rows(ratio: float, **changes: object) -> list[results.Row]:
    """A row for every padded LSTM case of the cpu suite in fp32 inference."""
    shapes = [
        case.shape for case in cases.SUITES["cpu"] if cases.name(case).startswith("lstm") and case.dtype == "fp32"
    ]
    return [replace(ROW, case=shape, ratio=ratio, **changes) for shape in shapes if "ragged" not in shape]


def verdict(rows: list[results.Row], title: str = "LSTM inference", dtype: str = "fp32") -> verdicts.Verdict:
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


def test_prepared_weights_are_compared_with_prepared_weights() -> None:
    rows = suite_rows(1.3)
    unlike = [
        replace(row, baseline="ONNX Runtime", ratio=0.9, counts=False, note=results.THEIRS_PREPARED) for row in rows
    ]
    alike = [replace(row, requested=results.PREPARED, baseline="ONNX Runtime", ratio=1.25) for row in rows]
    assert verdict([*rows, *unlike, *alike]).ratio == pytest.approx(1.25)
    assert verdict([*rows, *unlike, *alike], "the same, only theirs prepared").ratio == pytest.approx(0.9)


def test_a_row_at_the_hardware_limit_counts_as_reached() -> None:
    rows = suite_rows(1.3)
    slow = replace(rows[0], ratio=0.8, gflops=80.0)
    assert not verdict([slow, *rows[1:]]).reached
    limit = replace(slow, gflops=85.0)
    found = verdict([limit, *rows[1:]])
    assert found.reached and found.at_ceiling == 1 and "limit" in found.text
    assert found.worst == 0.8 and found.ratio is not None and found.ratio < 1.3  # shown as measured
    # Products in bf16 are slower than in fp32 here, and so no limit.
    assert not verdicts.at_ceiling(replace(limit, dtype="bf16", gflops=40.0), measured())
    assert CEILINGS.rate("bf16") == 100.0 and Ceilings().rate("fp32") is None


def test_the_step_target_takes_the_fastest_of_our_ways_and_only_torchs_layer() -> None:
    step = replace(ROW, op="step", case="LSTM-B1-T1-I256-H256", ratio=3.0)
    prepared = replace(step, case="LSTM-prepared-B1-T1-I256-H256", ratio=9.0)
    against_cell = replace(prepared, baseline="torch.nn.LSTMCell", ratio=2.0)
    switched_off = replace(prepared, baseline_kernel="ATen LSTM" + results.ONEDNN_OFF, ratio=3.0)
    prepared = replace(prepared, counts=False, note=f"torch.nn.LSTM {results.ANOTHER_FORM}")
    found = verdict([step, prepared, against_cell, switched_off], "one step, B=1, H=256, against nn.LSTM as it comes")
    assert found.reached and found.ratio == pytest.approx(9) and found.worst_case == prepared.case


def test_roofline_shows_the_cpu_suite_under_measured_ceilings(tmp_path: Path) -> None:
    (picture,) = roofline.draw(measured(*suite_rows(1.3)), tmp_path)
    assert_is_a_picture(picture)
    assert roofline.draw(measured(ROW), tmp_path) == []  # not of the suite
    without = replace(measured(*suite_rows(1.3)), runs=[results.Run(environment.collect(CPU))])
    assert roofline.draw(without, tmp_path) == []


def test_roofline_takes_a_rate_from_the_last_run_that_measured_its_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Ceilings] = []
    draw = roofline._figure
    monkeypatch.setattr(roofline, "_figure", lambda rows, ceilings: shown.append(ceilings) or draw(rows, ceilings))
    both = measured(*suite_rows(1.3))
    later = results.Run(environment.collect(CPU), Ceilings({"fp32": 90.0}, memory=21.0, l2=81.0))
    roofline.draw(replace(both, runs=[*both.runs, later]), tmp_path)
    assert shown == [Ceilings({"fp32": 90.0, "bf16": 40.0}, memory=21.0, l2=81.0)]
