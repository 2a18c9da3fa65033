"""Small calls beside torch.nn's, in every form that calls have: what a call itself costs decides there.

    python -m benchmarks.small [--op LSTM] [--seconds 0.4]

A few steps of few rows on a CPU, without gradients and with a backward; torch.nn's time over ours, within rounds in
which both run by turns.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnattn
from benchmarks.timing import Contender, compare, ratios

SHAPES = ((1, 1, 8), (5, 2, 32), (20, 4, 64))  # T, B, I = H
PLAIN: dict[str, Any] = {}
# Settings, dtype, and what is made of x [T, B, I].
FORMS: dict[str, tuple[dict[str, Any], torch.dtype, Callable[[Tensor], Any]]] = {
    "one layer": (PLAIN, torch.float32, lambda x: x),
    "bf16": (PLAIN, torch.bfloat16, lambda x: x),
    "fp64": (PLAIN, torch.float64, lambda x: x),
    "autocast": (PLAIN, torch.float32, lambda x: x),
    "unbatched": (PLAIN, torch.float32, lambda x: x[:, 0]),
    "packed": (PLAIN, torch.float32, lambda x: pack_padded_sequence(x, _falling(x), enforce_sorted=False)),
    "two layers": ({"num_layers": 2}, torch.float32, lambda x: x),
    "and dropout": ({"num_layers": 2, "dropout": 0.5}, torch.float32, lambda x: x),
    "and directions": ({"num_layers": 2, "bidirectional": True}, torch.float32, lambda x: x),
    "cell": (PLAIN, torch.float32, lambda x: x[0]),
    "cell, unbatched": (PLAIN, torch.float32, lambda x: x[0, 0]),
    "cell, autocast": (PLAIN, torch.float32, lambda x: x[0]),
}


def _falling(x: Tensor) -> Tensor:
    """Lengths from T down to T / 2."""
    T, B, _ = x.shape
    return torch.linspace(T, (T + 1) // 2, B).long()


def step(module: nn.Module, x: Any, train: bool, context: Callable[[], Any]) -> None:
    with torch.set_grad_enabled(train):
        with context():
            results = module(x)
        if train:
            y = results[0] if isinstance(results, tuple) else results
            rows = y.data if isinstance(y, PackedSequence) else y
            rows.float().sum().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--op", choices=("LSTM", "GRU", "RNN"), nargs="*", default=("LSTM", "GRU", "RNN"))
    parser.add_argument("--seconds", type=float, default=0.4, help="a number takes about this long")
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads; torch.nn's time / ours, without gradients and with a backward")
    print(f"{'':23}" + "".join(f"{f'T={T} B={B} H={H}':>20}" for T, B, H in SHAPES))
    torch.manual_seed(0)
    for op in options.op:
        for form, (settings, dtype, made) in FORMS.items():
            kind, found = op + ("Cell" if form.startswith("cell") else ""), ""
            autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)
            context = autocast if form.endswith("autocast") else contextlib.nullcontext
            for T, B, H in SHAPES:
                theirs = getattr(nn, kind)(H, H, dtype=dtype, **settings)
                ours = rnnattn.swap(theirs).model
                x, pair = made(torch.randn(T, B, H, dtype=dtype)), []
                for train in (False, True):
                    calls = [functools.partial(step, module, x, train, context) for module in (ours, theirs)]
                    times = compare([Contender(call) for call in calls], options.seconds, torch.device("cpu"))
                    pair.append(ratios(times[1], times[0])[1])
                found += f"{pair[0]:13.2f}{pair[1]:7.2f}"
            print(f"{op:5}{form:18}{found}", flush=True)


if __name__ == "__main__":
    main()
