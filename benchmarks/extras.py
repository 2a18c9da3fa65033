"""Optional packages of the benchmarks, imported where they are needed."""

from __future__ import annotations

import importlib
from types import ModuleType

PACKAGES = {
    "rich": ("rich", "bench"),
    "matplotlib": ("matplotlib", "bench"),
    "sklearn": ("scikit-learn", "bench"),
    "onnx": ("onnx", "bench-peers"),
    "onnxruntime": ("onnxruntime", "bench-peers"),
    "openvino": ("openvino", "bench-peers"),
    "torchrl": ("torchrl", "bench-gpu-peers"),
    "tensordict": ("tensordict", "bench-gpu-peers"),
    "flashrnn": ("flashrnn", "bench-gpu-peers"),
}


def optional(module: str) -> ModuleType:
    """Imports a module of an optional package.

    Raises:
        SystemExit: the package is missing; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package, extra = PACKAGES[module.partition(".")[0]]
        raise SystemExit(f"the benchmarks need {package} ({error}): pip install rnnattn[{extra}]") from error
