"""What the Triton kernels take on NVIDIA GPUs, found by compiling them without one.

    python -m tests.triton_resources 90 [--thorough] [--json]

The real launchers are called on small CPU tensors, with a driver in place that names a GPU and a `run`
that compiles and does not launch. So the launchers' own choice of tiles, warps and specialisation is
what is compiled, for every kernel, dtype and architecture.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may ask for
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TENSOR_CORE = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")


@dataclass(frozen=True)
class Row:
    """One compiled kernel."""

    kernel: str
    case: str
    dtype: str  # tf32: fp32 with torch's switch on
    architecture: int
    warps: int
    registers: int
    stack: int  # bytes a thread; more than none means spilled registers
    shared: int  # bytes a block
    tensor_core: str  # the instruction, or ""


def launches(dtype: torch.dtype, thorough: bool) -> Iterator[str]:
    """Calls every launcher at its usual choices or (thorough) at their corners; yields a name after each case."""
    from rnnattn import kernels

    def new(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    def fp32(*shape: int) -> torch.Tensor:
        return new(*shape, dtype=torch.float32)

    for H in (512, 37) if thorough else (512,):
        B, h, lengths, resets = 4, new(4, H), torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.bool)
        for mode, G in (("LSTM", 4), ("GRU", 3), ("RNN_TANH", 1), ("RNN_RELU", 1)):
            x, d, gates = fp32(B, G * H), new(B, G * H), new(B, 4 * H) if G > 1 else None
            c, db, bias_q = (fp32(B, H), None, None) if mode == "LSTM" else (None, d, h[0]) if G == 3 else (None,) * 3
            dh, kept = fp32(B, H), (lengths, 1, resets)
            kernels.step_forward(mode, x, x, bias_q, h, c, *kept, x, h, c, gates, c, h, h)
            kernels.step_backward(mode, h, dh, dh, c, gates, h, h, c, c, *kept, resets, c, dh, c, d, db)
            yield f"{mode} H={H}"
    for H in (512, 37, 2048) if thorough else (512,):
        for mode, G in (("LSTM", 4), ("GRU", 3), ("RNN_TANH", 1), ("RNN_RELU", 1)) if thorough else (("LSTM", 4),):
            lengths, resets, keep = torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.bool), new(4, H) > 0
            a, h, y, gain, lstm = fp32(4, G * H), fp32(4, H), new(4, H), new(G * H), mode == "LSTM"
            c, db, gates, of_c = (h if lstm else None), (a if G == 3 else None), new(4, 4 * H), y[0] if lstm else None
            saved = gates, a.to(dtype), fp32(4)
            kernels.regularised_forward(
                mode,
                a,
                a,
                gain,
                gain,
                of_c,
                of_c,
                h,
                keep,
                keep,
                0.1,
                0.1,
                lengths,
                1,
                resets,
                h,
                c,
                h,
                c,
                y,
                y,
                c,
                *saved,
            )
            kernels.regularised_backward(
                mode, y, c, h, h, c, y, c, *saved, gain, of_c, of_c, h, keep, keep, 0.1, 0.1, lengths, 1, resets, h, c,
                c, c, a, db, a,
            )  # fmt: skip
            yield f"{mode} H={H}"
    for T, D in ((1000, 64), (1000, 300), (1000, 301), (100, 2048), (100, 8192)) if thorough else ((1000, 256),):
        x, v, lengths = new(1, T, D), new(D), torch.zeros(1, dtype=torch.int64)
        kernels.linear_pool_forward(x, v, lengths, None, fp32(1, T))
        kernels.linear_pool_backward(fp32(1, D), new(1, T), fp32(1), fp32(1), x, v, lengths, None)
        yield f"T={T} D={D}"
    corners = ((50, 300, 100), (50, 301, 100), (50, 256, 1), (200, 2048, 1024), (50, 8192, 64), (50, 64, 8192))
    for T, D, A in corners if thorough else ((1000, 256, 256), (50, 301, 100)):
        x, v, w, b, mask = new(1, T, D), new(A), new(A, D), new(A), torch.ones(1, T, dtype=torch.bool)
        kernels.additive_pool_forward(x, v, w, b, None, mask, None)
        kernels.additive_pool_backward(fp32(T, A), x[0], v, b, mask[0], fp32(1, D), None, fp32(1), fp32(1), T)
        yield f"T={T} D={D} A={A}"


def take_for_here(architecture: int) -> None:
    """Triton compiles for this GPU from now on, which need not be here."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Offline:
        """The part of Triton's driver that compiling needs."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", architecture, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    driver.set_active(Offline())


def compiled(architecture: int, launches: Callable[[str], Iterator[str]]) -> Iterator[tuple[Row, Any]]:
    """Compiles for one GPU what `launches` launches for the name of a dtype; must run in a process of its own, without
    TRITON_INTERPRET. Rows, and the kernels themselves."""
    from triton.runtime.jit import JITFunction

    launched = {}
    compile_and_launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = compile_and_launch(self, *args, grid=grid, warmup=True, **kwargs)
        launched[kernel.hash] = (f"{self.__module__.split('.')[-1]}.{self.__name__.strip('_')}", kernel)

    take_for_here(architecture)
    JITFunction.run = compile_only
    for dtype in DTYPES:
        torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
        for case in launches(dtype):
            for name, kernel in launched.values():
                yield resources(kernel, name, case, dtype, architecture), kernel
            launched.clear()


def cuobjdump(cubin: bytes, option: str) -> str:
    """What the program says of a kernel."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def resources(kernel: Any, name: str, case: str, dtype: str, architecture: int) -> Row:
    usage = cuobjdump(kernel.asm["cubin"], "-res-usage")
    registers, stack = (int(re.search(rf"{field}:(\d+)", usage)[1]) for field in ("REG", "STACK"))  # type: ignore[index]
    instruction = TENSOR_CORE.search(kernel.asm["ptx"])
    return Row(
        name, case, dtype, architecture, kernel.metadata.num_warps, registers, stack, kernel.metadata.shared,
        instruction[1] if instruction else "",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("architecture", type=int, choices=sorted(SHARED_LIMIT), help="compute capability")
    parser.add_argument("--thorough", action="store_true", help="more shapes")
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    options = parser.parse_args()
    line = "{kernel:32}{case:22}{dtype:6}{warps:>6}{registers:>10}{stack:>6}{shared:>8}  {tensor_core}".format
    if not options.json:
        print(line(**{name: name for name in Row.__dataclass_fields__}))
    for row, _ in compiled(options.architecture, lambda dtype: launches(DTYPES[dtype], options.thorough)):
        print(json.dumps(asdict(row)) if options.json else line(**asdict(row)), flush=True)


if __name__ == "__main__":
    main()
