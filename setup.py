"""What is compiled, and how. The metadata is in pyproject.toml.

RNNATTN_BUILD=auto   what this machine can compile: CPU and CUDA kernels, CPU kernels, or pure Python;
                     prints why it is not more (the default)
              none   pure Python
              cpu    the CPU kernels, or fail
              cuda   the CPU and the CUDA kernels, or fail
RNNATTN_EMULATE=1    also the instructions for bfloat16 in plain C++, for tests: what RNNATTN_CPU_ISA=emulated chooses
RNNATTN_SANITIZE=address,undefined   for the C++ sources, in objects of their own; `make asan` builds and runs it
CXX, CXXFLAGS, MAX_JOBS and TORCH_CUDA_ARCH_LIST are respected. Objects are kept under build/ between builds.
"""

import functools
import hashlib
import os
import platform
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import Extension, setup

BUILD = os.environ.get("RNNATTN_BUILD", "auto")
if BUILD not in ("auto", "none", "cpu", "cuda"):
    raise SystemExit(f"RNNATTN_BUILD: expected auto, none, cpu or cuda, got {BUILD!r}")

PACKAGES = ["rnnattn", *(f"rnnattn.{name}" for name in ("autograd", "backends", "kernels", "nn", "reference"))]
REBUILD = "pip install --no-build-isolation --no-deps --no-cache-dir --force-reinstall rnnattn"

# Sources that know no torch, compiled once per instruction set, which is chosen at run time; those that multiply
# bfloat16 have the rest of their kernels from another.
KERNELS, BFLOAT16_KERNELS = "csrc/cpu/kernels.cpp", "csrc/cpu/bfloat16_kernels.cpp"
INSTRUCTION_SETS: dict[str, list[str]] = {"baseline": []}
BFLOAT16_SETS: dict[str, list[str]] = {}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
    BFLOAT16_SETS["avx512_bf16"] = ["-march=x86-64-v4", "-mavx512bf16"]
    BFLOAT16_SETS["amx"] = ["-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]
if os.environ.get("RNNATTN_EMULATE", "") == "1":
    BFLOAT16_SETS["emulated"] = ["-DRNNATTN_EMULATE"]

OPTIMISE = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]  # NaN and inf stay what they are
# Python's own -g would double the time and make a module ten times as large; CXXFLAGS=-g asks for it.
CXX_FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-DNDEBUG", "-g0", *OPTIMISE]
CXX_FLAGS += shlex.split(os.environ.get("CXXFLAGS", ""))
SANITIZE = os.environ.get("RNNATTN_SANITIZE", "")
SANITIZER_FLAGS = [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all"] if SANITIZE else []
CXX_FLAGS += [*SANITIZER_FLAGS, "-O1", "-g", "-fno-omit-frame-pointer"] if SANITIZE else []
# torch's own headers switch the half operators off for extensions; a plain nvcc call has them.
NVCC_FLAGS = ["-std=c++20", "-O3", "-DUSE_CUDA"]
NVCC_FLAGS += [f"-U__CUDA_NO_{name}__" for name in ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS")]
NVCC_FLAGS += ["-U__CUDA_NO_BFLOAT16_CONVERSIONS__"]


def say(message: str) -> None:
    print(f"rnnattn: {message}", file=sys.stderr, flush=True)


def import_torch():
    """torch, or None where a pure-Python build will do."""
    if BUILD == "none":
        return None
    try:
        import torch.utils.cpp_extension
    except (ImportError, OSError) as error:
        reason = f"torch cannot be imported while building ({error})"
        if BUILD != "auto":
            raise SystemExit(f"RNNATTN_BUILD={BUILD}: {reason}; build with: {REBUILD}") from error
        say(f"{reason}: a pure-Python build. With torch installed, get the compiled kernels with: {REBUILD}")
        return None
    return torch


def cuda_obstacle(torch) -> str | None:
    """Why the CUDA sources cannot be compiled here, or None. No GPU needs to be visible."""
    if not torch.version.cuda:
        return "this torch is built without CUDA"
    return None if torch.utils.cpp_extension.CUDA_HOME else "no CUDA toolkit found (set CUDA_HOME)"


def cuda_architectures(torch) -> str:
    """TORCH_CUDA_ARCH_LIST, set first where it is not: the visible GPUs, else Ampere to Hopper and PTX for later."""
    visible = sorted({torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())})
    default = ";".join(f"{major}.{minor}" for major, minor in visible) or "8.0;8.6;8.9;9.0+PTX"
    os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or default
    return os.environ["TORCH_CUDA_ARCH_LIST"].replace(";", " ")


@functools.cache
def compiled_sets(torch) -> dict[str, tuple[str, list[str]]]:
    """Source and flags of every instruction set that the compiler knows: older ones lack those for bfloat16."""
    compiler = [*shlex.split(torch.utils.cpp_extension.get_cxx_compiler()), "-x", "c++", "-E", os.devnull]
    sets = {isa: (KERNELS, flags) for isa, flags in INSTRUCTION_SETS.items()}
    for isa, flags in BFLOAT16_SETS.items():
        if subprocess.run([*compiler, *flags], capture_output=True).returncode == 0:
            sets[isa] = BFLOAT16_KERNELS, flags
        else:
            say(f"no {isa} kernels: the compiler does not know {' '.join(flags)}")
    return sets


def extension(torch, cuda: bool) -> Extension:
    """rnnattn._C without the instruction-set objects."""
    cpp_extension = torch.utils.cpp_extension
    compiler = subprocess.run(
        [*shlex.split(cpp_extension.get_cxx_compiler()), "--version"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[0]
    words = {
        "RNNATTN_BUILD_COMPILER": compiler,
        "RNNATTN_BUILD_FLAGS": " ".join(OPTIMISE),
        "RNNATTN_CUDA_ARCHS": ",".join(cuda_architectures(torch).split()) if cuda else "",
    }
    cxx = [*CXX_FLAGS, *(f'-D{name}="{value}"' for name, value in words.items())]
    cxx += [f"-DRNNATTN_HAVE_{name.upper()}" for name in compiled_sets(torch) if name != "baseline"]
    if sys.platform == "linux":
        cxx += ["-fopenmp"]  # at::parallel_for; not linked with it, so that torch's own OpenMP runtime is the only one
    sources = [*sorted(glob("csrc/*.cpp")), *sorted(glob("csrc/cpu/*.cpp"))]
    sources = [s for s in sources if s not in (KERNELS, BFLOAT16_KERNELS)]
    kind = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    return kind(
        "rnnattn._C",
        sources + (sorted(glob("csrc/cuda/*.cu")) if cuda else []),
        include_dirs=[os.path.abspath("csrc")],
        extra_compile_args={"cxx": cxx, "nvcc": NVCC_FLAGS},
        extra_link_args=SANITIZER_FLAGS,
        depends=["setup.py", *glob("csrc/**/*.*", recursive=True)],
    )


def make_build_ext(torch):
    attempts = [False]  # with CUDA?
    obstacle = "RNNATTN_BUILD=cpu" if BUILD == "cpu" else cuda_obstacle(torch)
    if obstacle is None:
        attempts = [True] if BUILD == "cuda" else [True, False]
    elif BUILD == "cuda":
        raise SystemExit(f"RNNATTN_BUILD=cuda: {obstacle}")

    class build_ext(torch.utils.cpp_extension.BuildExtension):
        def run(self) -> None:
            if obstacle:
                say(f"no CUDA kernels: {obstacle}")
            for cuda in attempts:
                try:
                    # The full description replaces the empty one; what finalize_options noted on that stays.
                    vars(self.extensions[0]).update(vars(extension(torch, cuda)))
                    tag = f"{sys.implementation.cache_tag}-torch{torch.__version__}-{'cuda' if cuda else 'cpu'}"
                    tag += "-emulated" if "emulated" in BFLOAT16_SETS else ""
                    tag += f"-{SANITIZE}" if SANITIZE else ""
                    self.compiler, self.build_temp = None, os.path.join("build", tag)
                    return super().run()
                except Exception as error:
                    if BUILD != "auto":
                        raise
                    say(f"the {'CUDA' if cuda else 'CPU'} kernels did not compile, going on without: {error}")
            self.extensions = []

        def build_extensions(self) -> None:
            jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
            sets = compiled_sets(torch)
            with ThreadPoolExecutor(jobs) as pool:
                compiled = list(pool.map(self.compile_kernels, *zip(*sets.items(), strict=True)))
            self.extensions[0].extra_objects = [path for path, _ in compiled]
            self.force |= any(fresh for _, fresh in compiled)
            super().build_extensions()

        def compile_kernels(self, isa: str, source_and_flags: tuple[str, list[str]]) -> tuple[str, bool]:
            """The object of one instruction set, and whether it was compiled anew."""
            compiler = shlex.split(torch.utils.cpp_extension.get_cxx_compiler())
            source, flags = source_and_flags
            command = [*compiler, *CXX_FLAGS, *flags, f"-DRNNATTN_ISA={isa}", "-Icsrc", "-c", source]
            version = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout
            digest = hashlib.sha256(repr(command).encode() + version)
            for path in (source, *sorted(glob("csrc/**/*.h", recursive=True))):
                digest.update(Path(path).read_bytes())
            target, stamp = (Path(self.build_temp, f"kernels_{isa}{end}") for end in (".o", ".sha256"))
            if target.exists() and stamp.exists() and stamp.read_text() == digest.hexdigest():
                return str(target), False
            target.parent.mkdir(parents=True, exist_ok=True)
            stamp.unlink(missing_ok=True)
            subprocess.run([*command, "-o", str(target)], check=True)
            stamp.write_text(digest.hexdigest())
            return str(target), True

    return build_ext


torch = import_torch()
setup(
    license="Apache-2.0",  # here, because setuptools 64 and 84 agree on no spelling of it in pyproject.toml
    packages=PACKAGES,
    package_dir={"rnnattn.kernels": "kernels"},
    package_data={"rnnattn": ["py.typed"]},
    ext_modules=[Extension("rnnattn._C", [])] if torch else [],
    cmdclass={"build_ext": make_build_ext(torch)} if torch else {},
)
