"""Rows and results as a benchmark gives them, for the tests of what becomes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import environment, results
from benchmarks.ceilings import Ceilings

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
    """It has some size and colours."""
    pixels = pytest.importorskip("matplotlib.image").imread(path)
    assert min(pixels.shape[:2]) > 100
    assert torch.from_numpy(pixels).flatten(0, 1).unique(dim=0).shape[0] > 10
