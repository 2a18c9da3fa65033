"""What holds for every test: where kernels run, poisoned memory, seeds, and what may not be skipped."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Generator, Iterator

import pytest
import torch

# Before anything imports triton: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it in deterministic mode

from cases import OWN, backend_parameters
from direct_layers import taken  # noqa: F401 (a fixture)
from emulated_cuda import emulated, library  # noqa: F401 (fixtures)
from quick_interpreter import patched_once_a_launch

import rnnattn

REQUIRED = [name for name in os.environ.get("RNNATTN_REQUIRE", "").split(",") if name]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `backend`, and does not say which, runs on each with operations of its own."""
    chosen = [marker.args[0] for marker in metafunc.definition.iter_markers("parametrize")]
    if "backend" in metafunc.fixturenames and not any("backend" in names for names in chosen):
        metafunc.parametrize("backend", backend_parameters(*OWN))


@pytest.fixture(scope="session", autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fills what torch.empty (at::empty in C++ too) allocates with NaN, so that an unwritten element shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all() and torch.empty_like(torch.ones(3)).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(scope="session", autouse=True)
def true_fp32() -> Iterator[None]:
    """On a GPU torch lets recurrent layers multiply fp32 as TF32, which no tolerance of fp32 admits.

    By the older switch: where the newer one is set for recurrent layers alone, torch no longer answers the older.
    """
    with torch.backends.__allow_nonbracketed_mutation():  # PyTorch's own test tools, once imported, freeze switches
        before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
        yield
        torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> Iterator[None]:
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    with patched_once_a_launch():
        yield


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """The same random numbers and the default backend for every test, whatever ran before."""
    torch.manual_seed(0)
    with rnnattn.use_backend("auto"):
        yield


@pytest.fixture(params=backend_parameters("reference", "cpp", "torch"))
def chosen(request: pytest.FixtureRequest) -> Iterator[str]:
    """A test of the modules runs on each of these; the kernels themselves are held to the cases elsewhere."""
    with rnnattn.use_backend(request.param):
        yield request.param


@pytest.fixture(params=backend_parameters("reference", "cpp"))
def own_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """As `chosen`, without torch's own layers, of which torch knows the derivatives and the graph itself."""
    with rnnattn.use_backend(request.param):
        yield request.param


def _required(nodeid: str) -> str | None:
    return next((name for name in REQUIRED if name in nodeid), None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With RNNATTN_REQUIRE=cpp,triton a skipped test of those backends is a failure."""
    report = yield
    name = _required(item.nodeid)
    if report.skipped and name and not hasattr(report, "wasxfail"):
        report.outcome, report.longrepr = "failed", f"RNNATTN_REQUIRE={name} forbids this skip: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a whole file that skips itself."""
    report = yield
    name = _required(collector.nodeid)
    if report.skipped and name:
        report.outcome, report.longrepr = "failed", f"RNNATTN_REQUIRE={name} forbids this skip: {report.longrepr}"
    return report
