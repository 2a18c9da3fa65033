"""The sequence kernels compile for GPUs that are not here, as the planner plans them: a sample of
`python -m tests.sequence_resources`."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton_resources import SHARED_LIMIT

pytest.importorskip("triton")

ITEM = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2}
GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1}


@pytest.fixture(scope="module", params=(80, 90), ids="triton-sm_{}".format)
def rows(request: pytest.FixtureRequest) -> list[dict[str, str]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.sequence_resources", str(request.param)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return list(csv.DictReader(done.stdout.splitlines()))


def test_they_fit_and_do_not_spill(rows: list[dict[str, str]]) -> None:
    assert {row["kernel"] for row in rows} == {"forward", "backward"}
    for row in rows:
        assert int(row["shared"]) <= SHARED_LIMIT[int(row["architecture"])], row
        assert row["tensor_core"], row
        assert int(row["spilled"]) == 0 and int(row["stack"]) <= 16, row


def test_weights_are_loaded_before_the_loop(rows: list[dict[str, str]]) -> None:
    """What it loads is h or db, once or (rows that threads have twice) a few times, and what a step reads anyway."""
    for row in rows:
        columns = int(row["parts"]) * int(row["chunk"]) * int(row["chunks"])
        products = (row["tier"] == "T1") + (row["variant"] == "stack")  # of what others computed
        exchanged = products * columns * int(row["batch_tile"]) * ITEM[row["dtype"]]
        if row["kernel"] == "forward" or row["tier"] == "T1":
            assert int(row["exchanged"]) == exchanged, row
        tile = int(row["units"]) * int(row["batch_tile"]) * 4
        assert int(row["loaded"]) <= 16 * max(tile, 4 * 32 * int(row["warps"])), row
