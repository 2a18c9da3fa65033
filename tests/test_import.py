"""`import rnnattn` is cheap: no optional package, no kernels, no GPU context, a fraction of a second beyond torch's."""

from __future__ import annotations

import json
import subprocess
import sys

OPTIONAL = {"triton", "rnnattn.kernels", "rnnattn._C", "rich", "matplotlib", "sklearn", "scipy", "hypothesis"} | {
    "onnx", "onnxscript", "onnxruntime",
}  # fmt: skip
SECONDS = 0.3

PROBE = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import rnnattn
seconds = time.perf_counter() - start
print(json.dumps({
    "seconds": seconds,
    "modules": sorted(set(sys.modules) - before),
    "cuda": torch.cuda.is_initialized(),
}))
"""


def probe() -> dict:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    assert not done.stderr, done.stderr
    return json.loads(done.stdout)


def test_import_takes_neither_optional_packages_nor_a_gpu_nor_time():
    runs = [probe() for _ in range(3)]
    for run in runs:
        assert "rnnattn.functional" in run["modules"]
        assert not [m for m in run["modules"] if any(m == name or m.startswith(name + ".") for name in OPTIONAL)]
        assert not run["cuda"]
    assert min(run["seconds"] for run in runs) < SECONDS
