"""The C++ kernels of the compiled extension, on a CPU."""

from __future__ import annotations

import functools
from typing import Any

import torch

from rnnattn.backends.base import Backend, BackendError, Call
from rnnattn.backends.reference import FLOATING
from rnnattn.backends.regularised import scan_gradients

BUILD_COMMAND = (
    "pip install --no-build-isolation --no-deps --no-cache-dir --force-reinstall rnnattn "
    "(from a checkout: . instead of rnnattn)"
)


@functools.cache
def extension_error() -> str | None:
    """Loads the compiled extension; why it cannot be loaded, or None."""
    try:
        import rnnattn._C  # noqa: F401
    except ImportError as error:
        return f"the compiled extension rnnattn._C is not usable ({error}); build it with: {BUILD_COMMAND}"
    return None


@functools.cache
def native() -> Any:
    """The operators of the compiled extension, loaded."""
    error = extension_error()
    if error:
        raise BackendError(error)
    return torch.ops.rnnattn_native


def prepared_call(*arguments: Any) -> Any:
    """A `PreparedCall` of the compiled extension (csrc/prepared_call.cpp)."""
    native()
    from rnnattn import _C

    return _C.PreparedCall(*arguments)


def weight_watch(*arguments: Any) -> Any:
    """A `WeightWatch` of the compiled extension (csrc/weight_watch.cpp)."""
    native()
    from rnnattn import _C

    return _C.WeightWatch(*arguments)


@functools.cache
def call_layer() -> Any:
    """The function of the same name of the compiled extension (csrc/layer_call.cpp)."""
    native()
    from rnnattn import _C

    return _C.call_layer


def build_info() -> dict[str, object]:
    """Compiler, flags, instruction sets and CUDA architectures of the compiled extension."""
    from rnnattn import _C

    return dict(_C.build_info())


def empty_cache() -> int:
    """Gives back to the system the memory that the C++ kernels keep, and returns how many bytes that were.

    Weights packed for a call and what a layer saves for its backward lie in memory that stays with the process for
    the next call, up to a 64th of the machine's: fresh memory takes longer to be cleared than the kernels to write it.
    """
    if extension_error():
        return 0
    from rnnattn import _C

    return int(_C.empty_cache())


class Cpp(Backend):
    name = "cpp"
    reads_packed = True

    def unavailable(self) -> str | None:
        return extension_error()

    def unsupported(self, call: Call) -> str | None:
        if call.device != "cpu":
            return f"its kernels run on a CPU, the tensors are on {call.device}"
        return None if call.dtype in FLOATING else f"dtype {call.dtype} is not a floating type"

    def kernel(self, call: Call) -> str:
        return f"C++ kernels ({build_info()['isa']})"

    def recurrent_layer_forward(self, *arguments):  # type: ignore[no-untyped-def]
        return native().recurrent_layer_forward(*arguments)

    def recurrent_layer_backward(self, *arguments):  # type: ignore[no-untyped-def]
        return native().recurrent_layer_backward(*arguments)

    def regularised_scan_forward(self, *arguments):  # type: ignore[no-untyped-def]
        return native().regularised_scan_forward(*arguments)

    def regularised_scan_backward(self, *arguments):  # type: ignore[no-untyped-def]
        return scan_gradients(native().regularised_scan_backward, *arguments)

    def attention_pool_forward(self, *arguments):  # type: ignore[no-untyped-def]
        return native().attention_pool_forward(*arguments)

    def attention_pool_backward(self, *arguments):  # type: ignore[no-untyped-def]
        return native().attention_pool_backward(*arguments)
