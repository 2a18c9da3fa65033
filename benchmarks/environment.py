"""What a result depends on besides the code: machine, versions, threads, commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import rnnattn

OMP_SETTINGS = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
_BRANDING = re.compile(r"\((R|TM|C)\)|\b(Intel|AMD|NVIDIA|CPU|Processor|\d+-Core)\b|@.*$", re.IGNORECASE)


@dataclass(frozen=True)
class Environment:
    device: str  # the name of a result file, such as xeon-avx512-2core or h100-80gb-hbm3
    device_name: str
    isa: str
    threads: int
    omp: str
    rnnattn: str
    torch: str
    triton: str
    cuda: str
    cudnn: str
    fp32: str  # what torch's switches make of fp32 on a GPU: ieee or tf32
    python: str
    system: str
    onnxruntime: str
    openvino: str
    commit: str
    date: str
    # Older files lack what follows.
    torchrl: str = "none"
    flashrnn: str = "none"

    @property
    def on_gpu(self) -> bool:
        return self.cudnn != "none"

    @property
    def engine(self) -> str:
        """What matters most to a timing on this kind of device."""
        if self.on_gpu:
            return f"cuDNN {self.cudnn}, Triton {self.triton}"
        return f"{self.threads} thread{'s' * (self.threads != 1)}"

    def __str__(self) -> str:
        return "\n".join(f"{key:<12} {value}" for key, value in asdict(self).items())


def collect(device: torch.device) -> Environment:
    cuda = device.type == "cuda"
    device_name = torch.cuda.get_device_name(device) if cuda else _cpu_name()
    isa = f"sm_{''.join(map(str, torch.cuda.get_device_capability(device)))}" if cuda else _cpu_isa()
    return Environment(
        device=_slug(device_name) if cuda else f"{_slug(device_name)}-{isa}-{torch.get_num_threads()}core",
        device_name=device_name,
        isa=isa,
        threads=torch.get_num_threads(),
        omp=" ".join(f"{key}={os.environ.get(key, 'unset')}" for key in OMP_SETTINGS),
        rnnattn=rnnattn.__version__,
        torch=torch.__version__,
        triton=_triton_version(),
        cuda=torch.version.cuda or "none",
        cudnn=str(torch.backends.cudnn.version()) if cuda else "none",  # type: ignore[no-untyped-call]
        fp32=_fp32_precision() if cuda else "ieee",
        python=platform.python_version(),
        system=platform.platform(),
        onnxruntime=_version_of("onnxruntime"),
        openvino=_version_of("openvino"),
        commit=_commit(),
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        torchrl=_version_of("torchrl"),
        flashrnn=_version_of("flashrnn"),
    )


def warnings(device: torch.device) -> list[str]:
    """What makes timings on this machine doubtful."""
    if device.type != "cpu":
        return []
    found = [
        f"{key} is not set: threads may move between cores (`make bench` sets {key}={value})"
        for key, value in OMP_SETTINGS.items()
        if key not in os.environ
    ]
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5:
        found.append(f"the machine is busy (load average {load:.1f}): timings are noise")
    return found


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine()


def _cpu_isa() -> str:
    """The widest instruction set that matters to a matrix product."""
    if hasattr(torch.cpu, "get_capabilities") and torch.cpu.get_capabilities().get("amx_tile"):
        return "amx"
    capability = torch.backends.cpu.get_cpu_capability().lower()
    return platform.machine() if capability == "default" else capability


def _fp32_precision() -> str:
    rnn: Any = torch.backends.cudnn.rnn
    return f"cudnn rnn {rnn.fp32_precision}, matmul {torch.backends.cuda.matmul.fp32_precision}"


def _slug(device_name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", _BRANDING.sub(" ", device_name).lower()).strip("-") or "unknown"


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return str(triton.__version__)


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _commit() -> str:
    """The checkout's commit, "-dirty" where files differ from it; "unknown" without git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip() or "unknown"
