"""Peak memory of a training step over a long sequence.

    python -m benchmarks.memory [--steps 16384] [--batch 8] [--size 128]

Each contender runs in a process of its own, whose largest resident size after a short warm-up is the start. With it
come x, y and their gradients, which every contender has.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

import rnnattn

CONTENDERS: dict[str, Callable[[int], nn.Module]] = {
    "torch.nn.LSTM": lambda size: nn.LSTM(size, size),
    "rnnattn.LSTM": lambda size: rnnattn.LSTM(size, size),
    'rnnattn.LSTM(recompute="chunk")': lambda size: rnnattn.LSTM(size, size, recompute="chunk"),
}


def measured(contender: str, steps: int, batch: int, size: int) -> dict[str, float]:
    """Megabytes above the start, and seconds, of one step; to be called once in a process."""
    module = CONTENDERS[contender](size)
    for _ in range(2):
        module(torch.randn(16, batch, size))[0].sum().backward()
    x = torch.randn(steps, batch, size, requires_grad=True)
    before, start = _peak(), time.perf_counter()
    y, _ = module(x)
    y.backward(torch.ones_like(y))
    return {"megabytes": _peak() - before, "seconds": time.perf_counter() - start}


def _peak() -> float:
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--steps", type=int, default=16384)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=128, help="of inputs and of the hidden state")
    parser.add_argument("--contender", choices=CONTENDERS, help="one alone, in this process, as JSON")
    options = parser.parse_args()
    sizes = options.steps, options.batch, options.size
    if options.contender:
        print(json.dumps(measured(options.contender, *sizes)))
        return
    print(f"one training step in fp32, T={sizes[0]}, B={sizes[1]}, I=H={sizes[2]}: peak memory above the start, time")
    for contender in CONTENDERS:
        command = [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:], "--contender", contender]
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{contender:34}{row['megabytes']:8.0f} MB{row['seconds']:8.2f} s", flush=True)


if __name__ == "__main__":
    main()
