"""What this machine can do at best, measured beside the rows: the rate of products, and the bandwidth of memory.

A row whose rate comes to AT_CEILING of the rate of products is as good as this hardware allows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.cases import DTYPES
from benchmarks.timing import synchronize

AT_CEILING = 0.85
PRODUCT_SIZE = 2048
MEMORY_BYTES = 2**28  # far beyond any cache
COPIED_BYTES = 2**30  # of a tensor that a GPU copies
L2_BYTES = 2**19  # of a core, where the system does not tell
REPETITIONS = 8


@dataclass(frozen=True)
class Ceilings:
    """Best of several calls. products: GFLOP/s of torch.mm by dtype; memory, l2: GB/s read by torch.sum.

    copy: GB/s that a GPU reads and writes in Tensor.copy_. Of a GPU it is the only one measured.
    """

    products: dict[str, float] = field(default_factory=dict)
    memory: float | None = None
    l2: float | None = None
    copy: float | None = None

    def rate(self, dtype: str) -> float | None:
        """GFLOP/s that products in a dtype can reach: no less than in fp32, which any 16-bit number fits."""
        rates = [self.products[name] for name in ("fp32", dtype) if name in self.products]
        return max(rates, default=None)


def measure(dtypes: Sequence[str]) -> Ceilings:
    """On the CPU, with torch's threads; fp32 is always measured."""
    return Ceilings({name: _products(name) for name in dict.fromkeys(("fp32", *dtypes))}, _memory_reads(), _l2_reads())


def measure_copy(device: torch.device) -> Ceilings:
    """Of a GPU's memory, its bytes counted as read and as written."""
    x = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    copies = 8  # in a row, so that launches and the clock's synchronisation do not count

    def run() -> None:
        for _ in range(copies):
            y.copy_(x)
        synchronize(device)

    return Ceilings(copy=2 * copies * COPIED_BYTES / _best_seconds(run) / 1e9)


def _products(dtype: str) -> float:
    a = torch.randn(PRODUCT_SIZE, PRODUCT_SIZE).to(DTYPES[dtype])
    return 2 * PRODUCT_SIZE**3 / _best_seconds(lambda: torch.mm(a, a)) / 1e9


def _memory_reads() -> float:
    x = torch.ones(MEMORY_BYTES // 4)
    return MEMORY_BYTES / _best_seconds(x.sum) / 1e9


def _l2_reads() -> float:
    """Each thread reads half of its core's L2 again and again: the rows of the view all but overlap."""
    rows, shift = 400, 16
    columns = torch.get_num_threads() * _l2_bytes() // 2 // 4
    view = torch.ones(columns + rows * shift).as_strided((rows, columns), (shift, 1))
    return rows * columns * 4 / _best_seconds(view.sum) / 1e9


def _l2_bytes() -> int:
    path = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
    text = path.read_text().strip() if path.is_file() else ""
    return int(text[:-1]) * 1024 if text.endswith("K") else L2_BYTES


def _best_seconds(run: Callable[[], object]) -> float:
    run()
    seconds = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
