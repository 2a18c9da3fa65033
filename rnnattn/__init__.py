"""Fused recurrent layers and attention pooling for PyTorch: drop-in modules over custom kernels."""

from __future__ import annotations

from pathlib import Path

# `kernels/` is installed as rnnattn.kernels. Imported from a checkout, this package has no such
# folder of its own, so the checkout's root joins its search path.
_root = Path(__file__).resolve().parent.parent
if (_root / "setup.py").is_file() and (_root / "kernels").is_dir():
    __path__.append(str(_root))

from rnnattn import functional
from rnnattn._version import __version__
from rnnattn.backends import BackendError, empty_cache, use_backend
from rnnattn.inspection import explain, show_config
from rnnattn.models import SequenceClassifier
from rnnattn.nn import GRU, LSTM, RNN, AttentionPool, GRUCell, LSTMCell, RNNCell
from rnnattn.onnx import onnx_export
from rnnattn.swap import SwapReport, swap, unswap

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "AttentionPool",
    "BackendError",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "SequenceClassifier",
    "SwapReport",
    "__version__",
    "empty_cache",
    "explain",
    "functional",
    "onnx_export",
    "show_config",
    "swap",
    "unswap",
    "use_backend",
]
