"""What zoneout, locked dropout and layer norm cost a training step.

    python -m benchmarks.regularised [--op LSTM] [--seconds 2]

Against a loop over time in plain PyTorch, which is what there is without this package (backend `reference`), and
against the same layer without any of it. Ratios are taken within rounds in which all run by turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import rnnattn
from benchmarks.timing import Contender, compare, ratios

VARIANTS: dict[str, dict[str, Any]] = {
    "zoneout": {"zoneout": 0.1},
    "recurrent_dropout": {"recurrent_dropout": 0.25},
    "layer_norm": {"layer_norm": True},
    "all of them": {"zoneout": 0.1, "recurrent_dropout": 0.25, "layer_norm": True},
}
SHAPES = ((1, 100, 256), (8, 100, 256), (32, 100, 256), (32, 100, 512))  # B, T, I = H


def step(module: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    cotangent = torch.randn(*x.shape[:2], module.hidden_size)

    def run() -> None:
        module.zero_grad()
        module(x)[0].backward(cotangent)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--op", choices=("LSTM", "GRU", "RNN"), default="LSTM")
    parser.add_argument("--seconds", type=float, default=2.0, help="a line takes about this long")
    options = parser.parse_args()
    print(f"{options.op}, fp32 on a CPU, {torch.get_num_threads()} threads: a training step")
    print(f"{'':18}{'B':>4}{'T':>5}{'H':>5}{'ms':>9}{'loop':>8}{'plain':>8}   (their time / ours)")
    for B, T, H in SHAPES:
        x = torch.randn(T, B, H, requires_grad=True)
        plain = step(getattr(rnnattn, options.op)(H, H), x)
        for name, settings in VARIANTS.items():
            ours = step(getattr(rnnattn, options.op)(H, H, **settings), x)
            contenders = [Contender(ours), Contender(ours, lambda: rnnattn.use_backend("reference")), Contender(plain)]
            found = compare(contenders, options.seconds, torch.device("cpu"))
            loop, without = (ratios(other, found[0])[1] for other in found[1:])
            print(f"{name:18}{B:4}{T:5}{H:5}{found[0].median_ms:9.2f}{loop:8.1f}{without:8.2f}", flush=True)


if __name__ == "__main__":
    main()
