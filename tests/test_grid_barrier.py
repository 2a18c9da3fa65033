"""Programs that exchange data step by step: the numbers, mistakes that have to show, and what the compiler makes of
the barrier.

    python tests/test_grid_barrier.py        the PTX of these kernels as JSON; without TRITON_INTERPRET
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import side_by_side
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from rnnattn.kernels.grid_barrier import arrive, load_shared, wait  # noqa: E402
from rnnattn.kernels.math import INTERPRETED  # noqa: E402

BLOCK = 32
ARCHITECTURES = (80, 90, 100)
DEVICE = "cpu" if INTERPRETED.value else "cuda"


@triton.jit
def _exchange_kernel(
    h,  # [2, groups, n, BLOCK] int64: the steps take turns
    y,  # out [T, groups, n, BLOCK] int64
    counters,  # [groups] int32, all `start`
    gate,  # [1] int32, zero
    start,
    T,
    BLOCK: tl.constexpr,
    MISTAKE: tl.constexpr,  # or None
):
    """Every program adds what its neighbour had in the step before."""
    program, group, n = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    size = tl.num_programs(1) * n * BLOCK
    unit = tl.arange(0, BLOCK)
    own = (group * n + program) * BLOCK + unit
    neighbour = (group * n + (program + 1) % n) * BLOCK + unit
    value = tl.load(h + own)
    for t in range(T):
        if MISTAKE == "reads before it waits":
            other = load_shared(h + t % 2 * size + neighbour)
            # The first program stores its step 0 only when the last, its neighbour, has read it for step 1.
            if (program == n - 1) & (t == 1):
                arrive(gate)
            if (program == 0) & (t == 0):
                wait(gate, 1)
            wait(counters + group, start + n * t)
        else:
            wait(counters + group, start + n * t)
            other = load_shared(h + t % 2 * size + neighbour)
        value += other
        tl.store(h + (t + 1) % 2 * size + own, value)
        tl.store(y + t * size + own, value)
        if MISTAKE == "does not arrive":
            if (program != 1) | (t != 3):
                arrive(counters + group)
        else:
            arrive(counters + group)
    wait(counters + group, start + n * T)
    tl.store(h + (T + 1) % 2 * size + own, load_shared(h + T % 2 * size + neighbour))


@triton.jit
def _raising_kernel(counter):
    if tl.program_id(0) == 1:
        assert tl.num_programs(0) == 0, "no such luck"
    wait(counter, 1)


@triton.jit
def _dying_kernel(counter):
    if tl.program_id(0) == 1:
        os._exit(3)
    wait(counter, 1)


@triton.jit
def _product_kernel(h, w, counter, T, BLOCK: tl.constexpr):
    """h_{t+1} = h_t @ w_t: loads that Triton would pipeline."""
    tile = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    for t in range(T):
        w_t = tl.load(w + t * BLOCK * BLOCK + tile)
        wait(counter, tl.num_programs(0) * t)
        h_next = tl.dot(load_shared(h + t * BLOCK * BLOCK + tile), w_t)
        tl.store(h + (t + 1) * BLOCK * BLOCK + tile, h_next.to(h.dtype.element_ty))
        arrive(counter)


@pytest.fixture(autouse=True, params=["triton"])
def no_process_stays() -> Iterator[None]:
    if DEVICE == "cpu" and (reason := side_by_side.unavailable()):
        pytest.skip(reason)
    yield
    assert not multiprocessing.active_children()


interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="a GPU would hang, or may read the right numbers by chance")


def launch(n: int, groups: int, T: int, *arrays: Any, start: int = 0, mistake: str | None = None) -> None:
    _exchange_kernel[n, groups](*arrays, start, T, BLOCK, mistake, num_warps=4, launch_cooperative_grid=True)


def exchange(n: int, groups: int, T: int, start: int = 0, mistake: str | None = None, timeout: float = 60.0) -> Any:
    """y and the last h, and what they should be."""
    first = np.random.default_rng(0).integers(-9, 10, (groups, n, BLOCK))
    memory = torch.zeros(1 + T * first.size, dtype=torch.int64, device=DEVICE)
    y = memory[1:].view(T, groups, n, BLOCK)  # inside a storage
    h = torch.zeros(2, groups, n, BLOCK, dtype=torch.int64, device=DEVICE)
    h[0] = torch.from_numpy(first)
    counters = torch.full((groups,), start, dtype=torch.int32, device=DEVICE)
    gate = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    with side_by_side.cooperative_launches(timeout) as launched:
        launch(n, groups, T, h, y, counters, gate, start=start, mistake=mistake)
    assert launched == ["_exchange_kernel"] * (DEVICE == "cpu") and memory[0] == 0
    expected = [first]
    for _ in range(T):
        expected.append(expected[-1] + np.roll(expected[-1], -1, axis=1))
    arrived = counters.cpu().numpy().astype(np.int64) - start
    assert mistake or (arrived % 2**32 == n * T).all()
    return (y.cpu().numpy(), h[(T + 1) % 2].cpu().numpy()), (np.stack(expected[1:]), np.roll(expected[-1], -1, axis=1))


@pytest.mark.parametrize(
    "n, groups, T, start",
    [
        (4, 1, 20, 0),
        (2, 3, 7, 0),  # groups do not wait for each other's counter
        (1, 2, 3, 0),
        (3, 1, 8, 2**31 - 10),  # counters wrap around
    ],
)
def test_neighbours_see_what_was_written_in_the_step_before(n: int, groups: int, T: int, start: int) -> None:
    (y, h), (y_expected, h_expected) = exchange(n, groups, T, start)
    np.testing.assert_array_equal(y, y_expected)
    np.testing.assert_array_equal(h, h_expected)


@interpreted
def test_a_read_before_the_wait_gives_wrong_numbers() -> None:
    (y, _), (expected, _) = exchange(3, 1, 4, mistake="reads before it waits")
    np.testing.assert_array_equal(y[0], expected[0])  # what they start from was there before the launch
    assert (y[1, 0, 2] != expected[1, 0, 2]).any()


@interpreted
def test_a_missing_arrival_ends_at_the_time_limit() -> None:
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match=r"(?s)programs \[\(0, 0\), \(1, 0\)\] of _exchange_kernel.*in wait"):
        exchange(2, 1, 6, mistake="does not arrive", timeout=2.0)
    assert time.monotonic() - begin < 2.0 + 2 * side_by_side.GRACE


@interpreted
@pytest.mark.parametrize(
    "kernel, report", [(_raising_kernel, "AssertionError: no such luck"), (_dying_kernel, "exit code 3")]
)
def test_a_program_that_fails_is_named_and_ends_the_others(kernel: Any, report: str) -> None:
    begin = time.monotonic()
    with pytest.raises(side_by_side.ProgramError, match=rf"(?s)program \(1,\) of {kernel.__name__}.*{report}"):
        side_by_side.launch(kernel, (3,), torch.zeros(1, dtype=torch.int32), timeout=50)
    assert time.monotonic() - begin < 25  # without waiting for the time limit


@interpreted
def test_other_launches_run_as_ever() -> None:
    counter = torch.full((1,), 2, dtype=torch.int32)
    with side_by_side.cooperative_launches() as launched:
        _exchange_kernel[1,](*(torch.zeros(2 * BLOCK, dtype=torch.int64),) * 2, counter, None, 2, 1, BLOCK, None)
    assert launched == [] and counter == 3


@pytest.fixture(scope="module")
def ptx() -> dict[str, str]:
    """By kernel and architecture, from a process in which Triton compiles; ptxas has taken each."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def accesses(ptx: str) -> list[str]:
    """Accesses to global memory and barriers, in their order; of several in a row one."""
    pattern = r"ld\.acquire\S*|red\.\S*|atom\S*|ld\.global\.cg|ld\.global|st\.global|cp\.async\.c\w\b|bar\.sync"
    found = re.findall(rf"(?<!\S)(?:{pattern})", ptx)
    return [name for i, name in enumerate(found) if found[i - 1 : i] != [name]]


WAIT = ["ld.acquire.gpu.global.u32", "bar.sync"]
ARRIVE = ["bar.sync", "red.release.gpu.global.add.u32"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_access_is_moved_across_the_barrier(ptx: dict[str, str], architecture: int) -> None:
    code = ptx[f"exchange {architecture}"]
    step = [*WAIT, "ld.global.cg", "st.global", *ARRIVE]
    assert accesses(code) == ["ld.global", *step, *WAIT, "ld.global.cg", "st.global"]
    assert re.search(r"@first red\.release\.gpu\.global\.add\.u32 \[%rd\d+\], 1;", code)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pipelining_loads_nothing_ahead_of_the_wait(ptx: dict[str, str], architecture: int) -> None:
    found = accesses(ptx[f"product {architecture}"])
    waited = found.index(WAIT[0])
    step = found[waited:] + found[:waited]  # the blocks of the loop may be laid out in another order
    assert step[:3] == [*WAIT, "ld.global.cg"] and step[-4:] == ["st.global", *ARRIVE, "ld.global"]
    assert set(step[3:-4]) <= {"bar.sync"}


def compiled() -> Iterator[tuple[str, str]]:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    integers = {"h": "*i64", "y": "*i64", "counters": "*i32", "gate": "*i32", "start": "i32", "T": "i32"}
    exchange_source = ASTSource(
        _exchange_kernel, integers | dict.fromkeys(("BLOCK", "MISTAKE"), "constexpr"), {"BLOCK": 128, "MISTAKE": None}
    )
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(2)}
    product_types = {"h": "*bf16", "w": "*bf16", "counter": "*i32", "T": "i32", "BLOCK": "constexpr"}
    product_source = ASTSource(_product_kernel, product_types, {"BLOCK": 64}, aligned)
    for architecture in ARCHITECTURES:
        for name, source in (("exchange", exchange_source), ("product", product_source)):
            options = {"num_warps": 4, "num_stages": 3}
            kernel = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
            yield f"{name} {architecture}", kernel.asm["ptx"]


if __name__ == "__main__":
    print(json.dumps(dict(compiled())))
