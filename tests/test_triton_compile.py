"""Every Triton kernel, as its launcher would launch it, compiles for GPUs that are not here and fits them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from triton_resources import DTYPES, SHARED_LIMIT

pytest.importorskip("triton")

KERNELS = {
    f"{file}.{kernel}_kernel" for file in ("linear_pool", "additive_pool") for kernel in ("forward", "backward")
} | {"step_forward.forward_kernel", "step_backward.backward_kernel", "pool_parts.combine_kernel"}
KERNELS |= {f"regularised_{way}.{way}_kernel" for way in ("forward", "backward")}
MODES = ("LSTM", "GRU", "RNN_TANH", "RNN_RELU")


@pytest.fixture(scope="module", params=sorted(SHARED_LIMIT), ids="sm_{}".format)
def rows(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """The table for one architecture, from a process in which Triton compiles instead of interpreting."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.triton_resources", str(request.param), "--json"]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_compiles_in_every_dtype(rows: list[dict[str, Any]]) -> None:
    # Between fp32 and tf32 only kernels with a product differ.
    compiled = {(row["kernel"], row["dtype"]) for row in rows}
    assert compiled >= {(kernel, dtype) for kernel in KERNELS for dtype in DTYPES}
    steps = {(row["kernel"], row["case"].split()[0]) for row in rows if row["kernel"].startswith("step_")}
    assert {mode for _, mode in steps} == set(MODES) and len(steps) == 2 * len(MODES)


def test_no_registers_are_spilled(rows: list[dict[str, Any]]) -> None:
    assert [row for row in rows if row["stack"] > 0] == []


def test_shared_memory_fits(rows: list[dict[str, Any]]) -> None:
    assert [row for row in rows if row["shared"] > SHARED_LIMIT[row["architecture"]]] == []


def test_products_run_on_tensor_cores_except_in_fp32(rows: list[dict[str, Any]]) -> None:
    products = [row for row in rows if row["kernel"] == "additive_pool.forward_kernel"]
    assert [row for row in products if bool(row["tensor_core"]) != (row["dtype"] != "fp32")] == []
