"""What is shipped and installed: the sdist, a pure-Python wheel from it, a compiled wheel, and how setup.py degrades.

Installations go into fresh environments that borrow torch from this one, without network.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import rnnattn
from rnnattn import backends
from rnnattn.backends.cpp import BUILD_COMMAND

ROOT = Path(__file__).resolve().parent.parent
NOT_COPIED = shutil.ignore_patterns(".*", "build", "dist", "results", "*.egg-info", "*.so", "__pycache__")
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


def run(*command: object, cwd: Path, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    """A command with this environment less what steers rnnattn and the import path."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RNNATTN_", "PYTHONPATH"))}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=clean | env, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the tree, as fresh as a clone."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("checkout") / "rnnattn", ignore=NOT_COPIED))


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory):
    out = tmp_path_factory.mktemp("sdist")
    call = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    run(sys.executable, "-c", call, cwd=checkout, RNNATTN_BUILD="none")
    (path,) = out.iterdir()
    return path


def build_wheel(source: Path, out: Path, **env: str) -> Path:
    run(*PIP, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", out, source, cwd=out, **env)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def pure_wheel(sdist, tmp_path_factory):
    return build_wheel(sdist, tmp_path_factory.mktemp("pure"), RNNATTN_BUILD="none")


@pytest.fixture(scope="module")
def compiled_wheel(tmp_path_factory):
    """Built in place from the objects of the last build, so that it takes seconds; only those change in the tree."""
    out = tmp_path_factory.mktemp("compiled")
    (out / "distutils.cfg").write_text(f"[build]\nbuild_base={out}/build\n[egg_info]\negg_base={out}\n")
    emulate = "emulated" in backends.build_info()["isas"] if backends.unavailable("cpp") is None else False
    return build_wheel(ROOT, out, DIST_EXTRA_CONFIG=str(out / "distutils.cfg"), RNNATTN_EMULATE=str(int(emulate)))


def environment(folder: Path, wheel: Path) -> Path:
    """The interpreter of a new environment with the wheel installed, and torch and its like borrowed from here."""
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    specs = [importlib.util.find_spec(name) for name in ("torch", "numpy", "pytest", "triton")]
    # Paths from a .pth file are searched last, and the .pth files in there (an editable rnnattn) are not read.
    borrowed = {str(Path(spec.origin).parents[1]) for spec in specs if spec and spec.origin}
    (packages / "borrowed.pth").write_text("\n".join(sorted(borrowed)))
    run(*PIP, "install", "--no-index", "--no-deps", "--target", packages, wheel, cwd=folder)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def pure_python(pure_wheel, tmp_path_factory):
    return environment(tmp_path_factory.mktemp("pure") / "env", pure_wheel)


def python_files(folder: str) -> set[str]:
    return {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*.py")}


def test_the_sdist_has_every_source_and_nothing_else(sdist):
    with tarfile.open(sdist) as archive:
        names = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    csrc = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert csrc and csrc <= names
    assert python_files("rnnattn") | python_files("kernels") <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md", "rnnattn/py.typed"} <= names
    tops = {name.partition("/")[0] for name in names}
    assert not tops & {"tests", "benchmarks", "build", "shared"}
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


def test_the_wheel_has_every_package_and_kernels_inside_it(pure_wheel):
    with zipfile.ZipFile(pure_wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith("/METADATA"))
    kernels = {f"rnnattn/{name}" for name in python_files("kernels")}
    assert "rnnattn/kernels/__init__.py" in kernels
    shipped = {name for name in names if ".dist-info/" not in name}
    assert shipped == python_files("rnnattn") | kernels | {"rnnattn/py.typed"}
    assert any(name.endswith("/LICENSE") for name in names)
    assert f"\nVersion: {rnnattn.__version__}\n" in metadata
    assert pure_wheel.name.endswith("-py3-none-any.whl")


PURE = """
import warnings, torch, rnnattn
print(rnnattn.__file__)
x = torch.randn(5, 3, 4)
ours, theirs = rnnattn.LSTM(4, 6), torch.nn.LSTM(4, 6)
ours.load_state_dict(theirs.state_dict())
with rnnattn.use_backend("reference"):
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])
pool = rnnattn.AttentionPool(4)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    pooled = pool(x, lengths=[3, 1, 2, 0, 3]), pool(x, lengths=[3, 1, 2, 0, 3])
    lstm = rnnattn.LSTM(4, 6)
    lstm(x), lstm(x)
assert torch.equal(*pooled) and pooled[0].isfinite().all()
for warning in seen:
    print("WARNING", warning.message)
print(rnnattn.show_config())
"""


def test_a_pure_python_wheel_works_and_says_once_how_to_get_the_kernels(pure_python, tmp_path):
    said = run(pure_python, "-W", "ignore", "-c", PURE, cwd=tmp_path).stdout
    assert said.splitlines()[0].startswith(str(pure_python.parents[1]))
    warned = [line for line in said.splitlines() if line.startswith("WARNING")]
    assert [line.split()[2] for line in warned] == ["attention_pool", "lstm"]  # once for each operation
    assert all(BUILD_COMMAND in line for line in warned)
    for option in ("--no-build-isolation", "--no-deps", "--no-cache-dir", "--force-reinstall"):
        assert option in BUILD_COMMAND
    assert re.search(r"\n *cpp +not usable: .*_C", said)
    assert re.search(r"\n *reference +usable", said)


COMPILED = """
import torch, rnnattn
print(rnnattn.__file__)
ours, theirs = rnnattn.LSTM(4, 6), torch.nn.LSTM(4, 6)
ours.load_state_dict(theirs.state_dict())
x = torch.randn(5, 3, 4, requires_grad=True)
with rnnattn.use_backend("cpp"):
    y, d = ours(x)[0], torch.randn(5, 3, 6)
    torch.testing.assert_close(y, theirs(x)[0])
    torch.testing.assert_close(torch.autograd.grad(y, x, d), torch.autograd.grad(theirs(x)[0], x, d))
print(rnnattn.show_config())
"""


@pytest.mark.skipif(backends.unavailable("cpp") is not None, reason="the extension is not built here")
def test_a_wheel_with_the_cpp_kernels_runs_them(compiled_wheel, tmp_path):
    with zipfile.ZipFile(compiled_wheel) as archive:
        built = [name for name in archive.namelist() if name.endswith(".so")]
    assert len(built) == 1 and re.fullmatch(r"rnnattn/_C\..*\.so", built[0])
    python = environment(tmp_path / "env", compiled_wheel)
    said = run(python, "-c", COMPILED, cwd=tmp_path).stdout
    assert said.splitlines()[0].startswith(str(tmp_path))
    assert re.search(r"\n *cpp +usable", said)


@pytest.mark.skipif(backends.unavailable("cpp") is not None, reason="the extension is not built here")
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
def test_objects_of_the_cpp_instruction_sets_share_no_symbols(compiled_wheel):
    """A function with external linkage that two of them define would be linked once, perhaps as AVX-512 code."""
    objects = sorted((ROOT / "build").glob(f"{sys.implementation.cache_tag}-torch{torch.__version__}-*/kernels_*.o"))
    assert objects
    for path in objects:
        isa = path.stem.partition("_")[2]
        listed = run("nm", "-g", "--defined-only", "-C", path, cwd=ROOT).stdout.splitlines()
        exported = [line.split(maxsplit=2)[1:] for line in listed]
        assert exported
        assert all(kind in "TDRB" and isa in name for kind, name in exported), (path.name, exported)


PROBE = """
import importlib.util
from pathlib import Path

def test_probe():
    import rnnattn
    root = Path(__file__).resolve().parent.parent
    assert Path(rnnattn.__file__) == root / "rnnattn" / "__init__.py"
    assert Path(importlib.util.find_spec("rnnattn.kernels").origin) == root / "kernels" / "__init__.py"
"""


def test_pytest_in_a_checkout_finds_its_kernels_beside_a_plain_install(pure_python, checkout):
    probe = checkout / "tests" / "test_probe.py"
    probe.write_text(PROBE)
    said = run(pure_python, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", probe, cwd=checkout).stdout
    assert "1 passed" in said


def setup(*arguments: str, cwd: Path, code: str = "", **env: str) -> tuple[int, str]:
    """Runs setup.py after `code`; its exit status and everything it said."""
    script = f"{code}\nimport runpy, sys\nsys.argv = {['setup.py', *arguments]}\nrunpy.run_path('setup.py')"
    done = run(sys.executable, "-c", script, cwd=cwd, check=False, **env)
    return done.returncode, done.stdout + done.stderr


def test_auto_goes_on_without_a_compiler_and_says_why_but_an_explicit_build_fails(checkout):
    no_compiler = {"CXX": shutil.which("false") or "false", "CUDA_HOME": ""}
    status, said = setup("build_ext", cwd=checkout, **no_compiler)
    assert status == 0 and "rnnattn: the CPU kernels did not compile, going on without: " in said
    status, said = setup("build_ext", cwd=checkout, RNNATTN_BUILD="cpu", **no_compiler)
    assert status != 0 and "going on without" not in said


def test_a_build_without_torch_is_pure_python_and_names_the_command(checkout):
    hidden = "import sys; sys.modules['torch'] = None"
    status, said = setup("--version", cwd=checkout, code=hidden)
    assert status == 0 and rnnattn.__version__ in said
    assert "torch cannot be imported while building" in said
    assert BUILD_COMMAND.partition(" (")[0] in said
    status, said = setup("--version", cwd=checkout, code=hidden, RNNATTN_BUILD="cpu")
    assert status != 0 and "RNNATTN_BUILD=cpu: torch cannot be imported" in said


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_an_explicit_cuda_build_fails_without_cuda(checkout):
    status, said = setup("--version", cwd=checkout, RNNATTN_BUILD="cuda")
    assert status != 0 and "RNNATTN_BUILD=cuda: this torch is built without CUDA" in said


def test_an_unknown_kind_of_build_is_refused(checkout):
    status, said = setup("--version", cwd=checkout, RNNATTN_BUILD="gpu")
    assert status != 0 and "RNNATTN_BUILD: expected auto, none, cpu or cuda, got 'gpu'" in said


@pytest.mark.parametrize("path", sorted((ROOT / "requirements").glob("*.txt")), ids=lambda p: p.name)
def test_requirements_are_pinned(path):
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert lines and all(re.fullmatch(r"[\w.-]+==[\w.]+(; (python_version|sys_platform) .*)?", line) for line in lines)
