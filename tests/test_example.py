"""The example, run as a user would run it: on a generated CSV, and for a few steps on real texts where they exist."""

from __future__ import annotations

import importlib.util
import os
import random
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def example() -> ModuleType:
    pytest.importorskip("rich")
    spec = importlib.util.spec_from_file_location("classify_text", ROOT / "examples" / "classify_text.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_csv(path: Path, rows: int) -> str:
    """Two classes that one word of a text tells apart, among 30 words that tell nothing."""
    draw = random.Random(rows)
    lines = []
    for n in range(rows):
        label, word = draw.choice([("cats", "purring"), ("dogs", "barking")])
        words = [f"w{draw.randrange(30)}" for _ in range(draw.randrange(0, 12))]
        words.insert(draw.randrange(len(words) + 1), word)
        lines.append(f'{label},"title {n}","{" ".join(words)}"')
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.mark.parametrize("flags", [[], ["--torch"]], ids=["rnnattn", "torch"])
def test_generated_texts(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    train, test = write_csv(tmp_path / "train.csv", 400), write_csv(tmp_path / "test.csv", 100)
    accuracy = example.main([train, test, "--steps", "120", "--hidden", "16", "--embedding", "16", *flags])
    printed = capsys.readouterr().out
    assert accuracy > 0.9
    assert f"test accuracy {accuracy:.2%} on 100 texts" in printed
    assert "recall of cats" in printed and "recall of dogs" in printed
    shown = [line for line in printed.splitlines() if " (is " in line]
    assert len(shown) == 4
    assert sum("purring" in line or "barking" in line for line in shown) >= 3  # attended to, or among the first words


def test_real_texts(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Half an epoch: far from trained, but well above the quarter that chance gives."""
    folder = os.environ.get("RNNATTN_TEST_DATA")
    if not folder:
        pytest.skip("RNNATTN_TEST_DATA is not set: no real texts here")
    data = Path(folder) / "agnews"
    options = ["--steps", "100", "--limit", "2500", "--hidden", "32", "--embedding", "64"]
    accuracy = example.main([str(data / "train.csv"), str(data / "test.csv"), *options])
    assert accuracy > 0.4
    assert capsys.readouterr().out.count("recall of") == 4
