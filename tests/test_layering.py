"""Who may import whom, and which headers a C++ or CUDA file may include: read from the sources, nothing runs."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import rnnattn

ROOT = Path(__file__).resolve().parent.parent

# A part of rnnattn may import parts of the layers above its own line, and itself.
LAYERS = (
    ("_version", "_C", "kernels", "reference", "transforms"),
    ("packing",),
    ("checks", "autocast"),
    ("backends",),
    ("autograd",),
    ("regularised",),
    ("stack", "pooling", "inspection"),
    ("functional",),
    ("nn",),
    ("models", "swap", "onnx"),
    ("cli",),
)
LAYER = {part: number for number, parts in enumerate(LAYERS) for part in parts}
ONLY_BACKENDS = ("kernels", "_C")
INSTALLED_WITH_TORCH = {"torch"}


class Import(NamedTuple):
    module: str
    """The absolute dotted name; of `from a import b`, a.b."""
    line: int
    at_import: bool
    """Whether it runs when the file is imported (not inside a function or `if TYPE_CHECKING`)."""


def imports(tree: ast.AST, package: str) -> Iterator[Import]:
    """All imports of a file that is a direct member of `package`."""
    yield from _imports(tree, package, True)


def _imports(node: ast.AST, package: str, at_import: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, at_import)
        elif isinstance(child, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - child.level + 1] if child.level else []
            for alias in child.names:
                yield Import(".".join([*above, *filter(None, [child.module]), alias.name]), child.lineno, at_import)
        else:
            later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
                isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            )
            yield from _imports(child, package, at_import and not later)


def _is_foreign(module: str) -> bool:
    return module.split(".")[0] not in {"rnnattn", "__future__"} | sys.stdlib_module_names


def _part(module: str) -> str:
    """rnnattn.nn.cells -> nn"""
    return module.split(".")[1]


def violations(part: str, found: Import) -> str | None:
    """Why a file of this part of rnnattn may not have this import, or None."""
    top, _, rest = found.module.partition(".")
    if _is_foreign(found.module):
        if part == "kernels":
            return None if top in INSTALLED_WITH_TORCH | {"triton"} else "kernels import torch and triton only"
        if part == "reference":
            return None if top == "torch" else "the reference imports torch only"
        if found.at_import and part != "cli" and top not in INSTALLED_WITH_TORCH:
            return f"{top} is optional: import it where it is used"
        return None
    if top != "rnnattn":
        return None
    target = _part(found.module) if rest else ""
    if target == part:
        return None
    if part in ("kernels", "reference"):
        return f"{part} imports nothing else of rnnattn"
    if target in ONLY_BACKENDS:
        if part != "backends":
            return f"only backends imports {target}"
        return f"{target} is loaded on first use, not with the package" if found.at_import else None
    if target not in LAYER:
        return "import the part that defines it, not the package's surface"
    return None if LAYER[target] < LAYER[part] else f"{part} stands below {target} or beside it"


def surface_violation(found: Import) -> str | None:
    """Why benchmarks or examples may not have this import, or None."""
    if found.module.split(".")[0] != "rnnattn":
        return None
    name = found.module.split(".")[1:2]
    return None if not name or name[0] in rnnattn.__all__ else f"{found.module} is not public"


def _python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def _package(path: Path) -> str:
    """The dotted package of a file; kernels/ is rnnattn.kernels."""
    folders = list(path.parent.relative_to(ROOT).parts)
    return ".".join(["rnnattn", *folders] if folders[:1] == ["kernels"] else folders)


def _part_of(path: Path) -> str:
    package = _package(path)
    return _part(package) if "." in package else path.stem


PACKAGE = [path for path in _python_files("rnnattn") + _python_files("kernels") if path != ROOT / "rnnattn/__init__.py"]


def _id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", PACKAGE, ids=_id)
def test_a_part_imports_only_what_stands_above_it(path):
    part = _part_of(path)
    assert part in LAYER, f"give {part} its place in LAYERS"
    found = imports(ast.parse(path.read_text()), _package(path))
    wrong = [(f"{_id(path)}:{i.line}", i.module, reason) for i in found if (reason := violations(part, i))]
    assert not wrong


@pytest.mark.parametrize("path", _python_files("benchmarks") + _python_files("examples"), ids=_id)
def test_benchmarks_and_examples_use_the_public_surface(path):
    tree = ast.parse(path.read_text())
    wrong = [(i.line, reason) for i in imports(tree, _package(path)) if (reason := surface_violation(i))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "rnnattn":
            wrong += [(node.lineno, f"rnnattn.{node.attr} is not public")] * (node.attr not in rnnattn.__all__)
    assert not wrong


@pytest.mark.parametrize(
    "part, package, source, reason",
    [
        ("nn", "rnnattn.nn", "from rnnattn import functional", None),
        ("nn", "rnnattn.nn", "from .cells import LSTMCell", None),
        ("nn", "rnnattn.nn", "from ..models import SequenceClassifier", "nn stands below models"),
        ("swap", "rnnattn", "from rnnattn.models import SequenceClassifier", "swap stands below models or beside it"),
        ("nn", "rnnattn.nn", "from rnnattn import LSTM", "package's surface"),
        ("functional", "rnnattn", "import rnnattn.kernels.math", "only backends imports kernels"),
        ("stack", "rnnattn", "from rnnattn import functional", "stack stands below functional"),
        ("backends", "rnnattn.backends", "from rnnattn import kernels", "loaded on first use"),
        ("backends", "rnnattn.backends", "def f():\n  from rnnattn import _C", None),
        ("reference", "rnnattn.reference", "from rnnattn import checks", "imports nothing else"),
        ("reference", "rnnattn.reference", "def f():\n  import numpy", "torch only"),
        ("kernels", "rnnattn.kernels", "from rnnattn.kernels.math import tanh", None),
        ("kernels", "rnnattn.kernels", "import rnnattn", "imports nothing else"),
        ("models", "rnnattn", "try:\n  import rich\nexcept ImportError: pass", "rich is optional"),
        ("models", "rnnattn", "if TYPE_CHECKING:\n  import rich", None),
    ],
)
def test_the_rules_see_what_they_should(part, package, source, reason):
    (found,) = imports(ast.parse(source), package)
    seen = violations(part, found)
    assert seen is None if reason is None else seen is not None and reason in seen


# Files of csrc, as a pattern of their path -> what they may not include, and why.
FORBIDDEN_HEADERS = (
    (
        r"(?!(bindings|call_arguments|layer_call|prepared_call|weight_watch)\.).*",
        r"pybind11/|torch/extension\.h|torch/python\.h|Python\.h",
        "pybind11: bindings only",
    ),
    (r"cpu/(.*_kernel\.h|(bfloat16_)?kernels\.cpp)", r"torch/|ATen/|c10/", "knows no torch"),
    (r"cuda/.*\.cuh", r"torch/|ATen/|c10/", "device code: CUDA's own headers only"),
    (r"cuda/.*", r"ATen/|c10/|torch/(?!csrc/stable/|csrc/inductor/aoti_torch/c/shim|headeronly/)", "stable headers"),
)
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*[<"]([^>"]+)[>"]', re.MULTILINE)


def header_violations(name: str, text: str) -> list[tuple[str, str]]:
    """(header, reason) for every header that csrc/<name> may not include."""
    return [
        (header, reason)
        for files, headers, reason in FORBIDDEN_HEADERS
        if re.fullmatch(files, name)
        for header in INCLUDE.findall(text)
        if re.match(headers, header)
    ]


SOURCES = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh", ".cpp", ".cu"))


@pytest.mark.parametrize("path", SOURCES, ids=_id)
def test_a_source_includes_only_what_its_kind_may(path):
    assert not header_violations(path.relative_to(ROOT / "csrc").as_posix(), path.read_text())


def test_what_is_compiled_per_instruction_set_reaches_no_torch_header():
    reached, waiting = set(), [ROOT / "csrc/cpu/kernels.cpp", ROOT / "csrc/cpu/bfloat16_kernels.cpp"]
    while waiting:
        path = waiting.pop()
        reached.add(path)
        headers = INCLUDE.findall(path.read_text())
        assert not [h for h in headers if re.match("torch/|ATen/|c10/", h)], path
        own = {(path.parent / h).resolve() for h in headers if (path.parent / h).is_file()}
        waiting += own - reached
    assert len(reached) > 1


@pytest.mark.parametrize(
    "name, header, allowed",
    [
        ("bindings.cpp", "pybind11/pybind11.h", True),
        ("prepared_call.cpp", "pybind11/pybind11.h", True),
        ("layer_call.cpp", "pybind11/pybind11.h", True),
        ("layer_function.cpp", "pybind11/pybind11.h", False),
        ("ops.cpp", "pybind11/pybind11.h", False),
        ("ops.cpp", "torch/library.h", True),
        ("cpu/lstm.cpp", "torch/extension.h", False),
        ("cpu/lstm_kernel.h", "ATen/Parallel.h", False),
        ("cpu/kernels.cpp", "c10/util/Half.h", False),
        ("dispatch.h", "ATen/core/Tensor.h", True),
        ("cuda/recurrent_step.cu", "torch/csrc/stable/tensor.h", True),
        ("cuda/recurrent_step.cu", "ATen/cuda/CUDAContext.h", False),
        ("cuda/recurrent_step_kernel.cuh", "torch/csrc/stable/tensor.h", False),
        ("cuda/recurrent_step_kernel.cuh", "cuda_bf16.h", True),
    ],
)
def test_the_header_rules_see_what_they_should(name, header, allowed):
    assert (not header_violations(name, f"// x\n#  include <{header}>\n")) == allowed
