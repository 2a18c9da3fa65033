"""Everything there is to know of a machine with a GPU, in legs of less than ten minutes.

    python tests/gpu.py [build] [tests] [sanitize] [compile] [bench] [report] --out FOLDER [--dry-run]

build     the extension for this GPU, and whether the GPU's backends then run
tests     the cases of every GPU backend, on the GPU
sanitize  a sample of them under compute-sanitizer
compile   the kernels of the benchmarks, into the caches of their compilers
bench     the benchmarks of the gpu suite
report    what the folder holds of all these: table, first failures, the benchmarks' targets

All of them without a name. A leg that is broken off goes on where it stopped, one that is done for the sources at hand
is left alone; the next one runs whatever became of it. steps.jsonl has a line for every step, tests.jsonl for every
test, LEG.log what the commands said. Needs torch, Triton, pytest, setuptools, ninja and compilers, for the benchmarks
their requirements; pytest-xdist is used if it is there. --dry-run runs little of each leg on a CPU.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from gpu_report import report
from steps import BAD, ROOT, Step, results, run, workers

BACKENDS = """
from rnnattn import backends, show_config
print(show_config())
raise SystemExit("; ".join(f"{n}: {r}" for n in ("triton", "cuda") if (r := backends.unavailable(n))) or 0)
"""
WORKERS = 12  # processes of tests, each with a CUDA context
ERROR_EXIT = "86"
TOOLS = ("memcheck", "racecheck", "synccheck")
# Both tiers of each cell in fp32 with everything at once, and in 16 bits; of the others a plain case and a ragged one.
SEQUENCE_SAMPLE = ["tests/test_sequence_kernels.py", "-k",
                   "three_programs or B17-T2-I4-H6 or (packed_rows and bidirectional)"]  # fmt: skip
OTHER_SAMPLE = ["tests/test_attention_pool.py", "tests/test_recurrent.py", "-k",
                "forward_and_backward and (triton or cuda) and not (bf16 or nan) and "
                "(B3-T5-D8 or B4-T6-D5 or (B4-T5-I6-H7 and len3_0_5_1-states))"]  # fmt: skip
DRY_CASE = ["--suite", "quick", "--filter", "lstm/B1-T64-I128-H128-fp32", "--seconds", "0.01", "--backend", "auto"]


def missing() -> list[str]:
    """What the extension cannot be built without, by what setup.py asks for."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    found = [] if torch.version.cuda else ["a torch with CUDA"]
    if CUDA_HOME is None or not Path(CUDA_HOME, "bin", "nvcc").is_file():
        found.append("nvcc (CUDA_HOME)")
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        found.append("a C++ compiler (CXX)")
    # Without ninja the sources are compiled one by one, which takes longer than the leg may.
    return found + [name for name in ("setuptools", "ninja") if importlib.util.find_spec(name) is None]


def build(dry: bool, options: argparse.Namespace) -> list[Step]:
    lacking = ", ".join(missing())
    if dry:
        return [Step("build", "extension", skip=f"a dry run; lacking here: {lacking or 'nothing'}")]
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    if lacking:
        command = [sys.executable, "-c", f"raise SystemExit('the build lacks: ' + {lacking!r})"]
    jobs = {"RNNATTN_BUILD": "cuda", "MAX_JOBS": str(os.cpu_count() or 1)}
    return [
        Step("build", "extension", command, jobs, again=True, shows="error|lacks"),
        Step("build", "backends", [sys.executable, "-c", BACKENDS], again=True),
    ]


def tests(dry: bool, options: argparse.Namespace) -> list[Step]:
    if dry:
        few = "triton and forward_and_backward and B3-T6-I8-H16 and fp16"
        return [Step("tests", "recurrent", ["tests/test_recurrent.py", "-k", few], tests=True)]
    on_gpu, side_by_side = ["-k", "triton or cuda"], workers(WORKERS)

    def step(name: str, *arguments: str, **environment: str) -> Step:
        files = [f"tests/test_{argument}.py" if argument.isidentifier() else argument for argument in arguments]
        return Step("tests", name, [*files, *side_by_side], environment, tests=True)

    return [
        step("recurrent", "recurrent", *on_gpu),
        step("pooling", "attention_pool", "triton_kernels", *on_gpu),
        step("barrier", "grid_barrier"),
        Step("tests", "graphs and streams", ["tests/test_on_a_gpu.py"], tests=True),
        # One process would not come to the end of all of them.
        step("sequence kernels", "sequence_kernels", RNNATTN_THOROUGH="1" if side_by_side else "0"),
        step("stepwise", "recurrent", "-k", "triton and forward_and_backward", RNNATTN_SEQUENCE="0"),
        step("regularised", "regularised_scan", "regularised", *on_gpu),
        step("operators", "recurrent_ops", "packed", "higher_order", "autocast", "stale_weights", "backends", *on_gpu),
    ]


def sanitize(dry: bool, options: argparse.Namespace) -> list[Step]:
    from torch.utils.cpp_extension import CUDA_HOME

    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{CUDA_HOME}/bin")
    reason = "a dry run" if dry else "" if tool else "compute-sanitizer is neither on the PATH nor in CUDA_HOME/bin"
    checks = [str(tool), "--report-api-errors", "no", "--error-exitcode", ERROR_EXIT, "--print-limit", "20"]
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    # Without its cache torch puts every tensor into memory of its own, and what lies beside one is seen.
    separately = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Step(
            "sanitize", f"{name}, {sample}", [*checks, "--tool", name, *pytest, *arguments], separately, skip=reason,
            shows="^=+ .*(Error|Invalid|Race|hazard|SUMMARY)|^FAILED", seconds=180,
        )
        for name in TOOLS
        for sample, arguments in (("sequence", SEQUENCE_SAMPLE), ("others", OTHER_SAMPLE))
    ]  # fmt: skip


def _benchmarks(dry: bool, options: argparse.Namespace) -> list[str]:
    cases = DRY_CASE if dry else ["--suite", "gpu"]
    command = [sys.executable, "-m", "benchmarks", *cases, "--out", str(options.out / "bench"), "--resume"]
    return [*command, "--commit", options.commit]


def compiled(dry: bool, options: argparse.Namespace) -> list[Step]:
    processes = "1" if dry else str(os.cpu_count() or 1)
    command = [*_benchmarks(dry, options), "--compile", processes, "--compile-only"]
    return [Step("compile", "kernels", command, again=True)]


def bench(dry: bool, options: argparse.Namespace) -> list[Step]:
    packed = [sys.executable, "-m", "benchmarks.packed", "--seconds", "1"]
    on_gpu = ["--device", "cuda", "--dtype", "bf16", "--backend", "triton"]
    return [
        Step("bench", "suite", _benchmarks(dry, options), again=True, goes_on="go on with --resume"),
        Step(
            "bench", "packed rows", [*packed, *on_gpu], skip="a dry run" if dry else "", shows="^(inference|training)"
        ),
    ]


LEGS: dict[str, Callable[[bool, argparse.Namespace], list[Step]]] = {
    "build": build, "tests": tests, "sanitize": sanitize, "compile": compiled, "bench": bench,
}  # fmt: skip


def digest() -> str:
    """Of the sources: what ran tells nothing of others."""
    found = hashlib.sha256((ROOT / "setup.py").read_bytes())
    for folder in ("rnnattn", "kernels", "csrc", "tests", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh"):
                found.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:12]


def commit(of_sources: str) -> str:
    """As git has it; with the digest where files differ from that, or there is no git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    known = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout if shutil.which("git") else ""
    name = known.strip() or "tree-dirty"
    return name if not name.endswith("-dirty") else f"{name.removesuffix('-dirty')}-{of_sources}"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 where a step failed or did not come to its end."""
    parser = argparse.ArgumentParser(prog="python tests/gpu.py", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("legs", nargs="*", metavar="LEG", help=", ".join([*LEGS, "report"]) + " (all)")
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), help="folder of the results (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="little of each leg, on a CPU")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for a leg (%(default)s)")
    parser.add_argument("--commit", default="", help="of this checkout, where there is no git to tell")
    options = parser.parse_args(argv)
    names = options.legs or [*LEGS, "report"]
    if unknown := set(names) - {*LEGS, "report"}:
        parser.error(f"expected legs among {', '.join(LEGS)}, report, got {', '.join(sorted(unknown))}")
    import torch

    sys.path.insert(0, str(ROOT))  # for benchmarks, of which the report reads the results
    if names != ["report"] and not options.dry_run and not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device here; --dry-run runs little of each leg on the CPU")
    options.out, sources = options.out.resolve(), digest()
    options.commit = options.commit or commit(sources)
    code = f"dry-{sources}" if options.dry_run else sources
    for name in names:
        if name != "report":
            run(LEGS[name](options.dry_run, options), options.out, code, 60 * options.minutes)
    text = report(options.out)
    if "report" in names:
        (options.out / "report.txt").write_text(text + "\n")
    print(text)
    return int(any(result.status in BAD for result in results(options.out) if result.code == code))


if __name__ == "__main__":
    sys.exit(main())
