"""The C++ engine and threads: it follows torch's number of them, and computes the right numbers in processes
that fork, in worker processes, among other threads, inside a parallel region, and where threads are scarce.

What could hang runs in a process of its own that is killed after a time.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cases import BF16, F32, Tensors, truth
from recurrent_cases import MODES, RecurrentCase
from tolerances import assert_close
from torch.utils.data import DataLoader, Dataset

import rnnattn
from rnnattn import backends

_reason = backends.unavailable("cpp")
pytestmark = pytest.mark.skipif(_reason is not None, reason=f"backend cpp: {_reason}")
linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, or reads /proc")

SECONDS = 60  # until a process counts as hanging


def cases_of(mode: str) -> list[RecurrentCase]:
    relu = mode == "RNN_RELU"  # no sum may lie at its kink, where rounding decides
    return [
        RecurrentCase(1, 24, 16, 256, "one row: threads share the units", mode, states=True, apart=relu),
        RecurrentCase(
            16, 9, 24, 72, "several rows: threads share them", mode, direction="bidirectional", states=True, apart=relu,
            lengths=(9, 9, 0, 1, 9, 4, 7, 8, 9, 2, 5, 9, 3, 9, 6, 9),
        ),
    ]  # fmt: skip


ROW, ROWS = cases_of("LSTM")
# torch's own operations around the scan are large enough here to be shared among threads as well.
WIDE = RecurrentCase(24, 40, 200, 160, "rows and large products", "GRU", states=True)


@contextlib.contextmanager
def torch_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check(case: RecurrentCase, dtype: torch.dtype = F32) -> Tensors:
    """Runs forward and backward, and compares with the reference."""
    got = case.run(case.tensors(dtype), "cpp")
    assert_close(got, truth(case, dtype), case.op, dtype)
    return got


def in_process(code: str, **environment: str) -> None:
    """Runs the code, in which `t` is this module; kills it and what it started where it hangs."""
    path = os.pathsep.join([str(Path(__file__).parent), *(p for p in sys.path if p)])
    environment = os.environ | {"PYTHONPATH": path} | environment
    command = [sys.executable, "-c", f"import torch, test_threads as t\n{code}"]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"hangs: {process.communicate()[0]}")
    assert process.returncode == 0, output


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("mode", MODES)
def test_same_numbers_on_any_number_of_threads(mode: str, threads: int) -> None:
    for case in cases_of(mode):
        with torch_threads(threads):
            first, second = check(case), check(case)
        for name, value in first.items():
            assert torch.equal(value, second[name]), name


def test_16_bits_on_three_threads() -> None:
    with torch_threads(3):
        for mode in ("LSTM", "GRU"):
            for case in cases_of(mode):
                check(case, BF16)


# --- how many threads there are -------------------------------------------------------------------


def threads_started(number: int) -> int:
    """How many threads the process has more of after a forward on so many."""
    case, before = ROW, len(os.listdir("/proc/self/task"))
    t = case.tensors(F32)
    torch.set_num_threads(number)
    between = len(os.listdir("/proc/self/task"))
    case.run(t, "cpp", backward=False)
    return len(os.listdir("/proc/self/task")) - (between if number > 1 else before)


@linux_only
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one processor: the engine uses one thread")
def test_the_engine_follows_torchs_number_of_threads() -> None:
    in_process("assert t.threads_started(1) == 0\nassert t.threads_started(2) == 1", OMP_NUM_THREADS="1")


@pytest.mark.parametrize("name, value", [("OMP_NUM_THREADS", "1"), ("OMP_THREAD_LIMIT", "1"), ("OMP_DYNAMIC", "true")])
def test_where_the_system_gives_fewer_threads(name: str, value: str) -> None:
    """Torch asks for two; a region may start with one, and then no member may wait for another."""
    threads = "" if name == "OMP_NUM_THREADS" else "torch.set_num_threads(2)\n"
    in_process(f"{threads}t.check(t.ROW), t.check(t.ROWS)", **{name: value})


# --- processes -------------------------------------------------------------------------------------


class Samples(Dataset[list[str]]):
    """Each item is the names of what a worker computed, all of it right."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> list[str]:
        return list(check((ROW, ROWS)[index]))


def load(method: str) -> None:
    torch.set_num_threads(2)
    check(ROW)  # the parent has its threads before it forks
    loaded = list(DataLoader(Samples(), batch_size=None, num_workers=1, multiprocessing_context=method))
    assert [len(names) for names in loaded] == [len(check(ROW)), len(check(ROWS))]


@linux_only
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_in_a_data_loaders_workers(method: str) -> None:
    in_process(f"t.load({method!r})")


def fork() -> None:
    """A child that computes what its parent has computed on two threads. Torch leaves the child two as well."""
    torch.set_num_threads(2)
    wanted = [(case, dtype) for case in (ROW, ROWS, WIDE) for dtype in (F32, BF16)]
    for case, dtype in wanted:
        check(case, dtype)
    inputs = [case.tensors(dtype) for case, dtype in wanted]
    child = os.fork()
    if child:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    computed = [case.run(t, "cpp") for (case, _), t in zip(wanted, inputs, strict=True)]
    torch.set_num_threads(1)  # for what is torch's own from here on
    for (case, dtype), got in zip(wanted, computed, strict=True):
        assert_close(got, truth(case, dtype), case.op, dtype)
    os._exit(0)


@linux_only
def test_a_forked_child_of_a_parent_with_threads() -> None:
    in_process("t.fork()")


LONG = RecurrentCase(1, 256, 16, 256, "many meetings of the threads that share a row")


def check_at_once(deadline: float) -> None:
    time.sleep(max(0.0, deadline - time.time()))  # so that both processes run at the same time
    torch.set_num_threads(2)
    for _ in range(5):
        check(LONG)


def test_two_processes_on_the_same_processors() -> None:
    """More threads than processors, each waiting for another's turn."""
    truth(LONG, F32)
    with ThreadPoolExecutor(2) as pool:
        deadline = time.time() + 10  # both have started by then
        for done in [pool.submit(in_process, f"t.check_at_once({deadline})") for _ in range(2)]:
            done.result()


# --- threads of the caller's -----------------------------------------------------------------------


def test_eight_threads_share_a_module() -> None:
    torch.manual_seed(0)
    module = rnnattn.LSTM(24, 128, bidirectional=True)
    inputs = [torch.randn(11, 1 + n % 3, 24) for n in range(16)]

    def run(x: torch.Tensor) -> list[torch.Tensor]:
        y, states = module(x)
        gradients = torch.autograd.grad(y.square().sum() + states[1].sum(), list(module.parameters()))
        return [y.detach(), *(state.detach() for state in states), *gradients]

    with rnnattn.use_backend("cpp"), torch_threads(2):
        alone = [run(x) for x in inputs]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(run, inputs))
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


# Two threads of one OpenMP region, in which a region of the engine's own would have a single thread.
NESTED = r"""
#include <omp.h>
int in_parallel(void (*call)(void)) {
  int threads = 0;
#pragma omp parallel num_threads(2)
  {
#pragma omp atomic
    ++threads;
    call();
  }
  return threads;
}
"""


def nest(library: str) -> None:
    import ctypes

    torch.set_num_threads(2)
    check(ROW)
    errors: list[BaseException] = []
    calls: list[int] = []

    def call() -> None:
        try:
            with rnnattn.use_backend("cpp"):
                calls.extend(len(check(case)) for case in (ROW, ROWS))
        except BaseException as error:
            errors.append(error)

    kind = ctypes.CFUNCTYPE(None)
    threads = ctypes.CDLL(library).in_parallel(kind(call))
    assert not errors, errors
    assert threads == 2 and len(calls) == 4


@linux_only
def test_inside_a_parallel_region(tmp_path: Path) -> None:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("gcc is not on the PATH")
    source, library = tmp_path / "nested.c", tmp_path / "nested.so"
    source.write_text(NESTED)
    subprocess.run([compiler, "-shared", "-fPIC", "-fopenmp", str(source), "-o", str(library)], check=True)
    in_process(f"t.nest({str(library)!r})")
