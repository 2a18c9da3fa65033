"""A PackedSequence beside `lengths=`, and beside torch.nn's module with the same PackedSequence.

    python -m benchmarks.packed [--op LSTM] [--seconds 4] [--device cuda] [--dtype bf16] [--backend triton]

Ratios are taken within rounds in which all three run by turns.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnattn
from benchmarks.cases import DTYPES
from benchmarks.timing import Contender, compare, ratios

SHAPES = ((8, 128), (32, 256), (64, 512))  # B, I = H
T = 200


def leaf(t: Tensor, train: bool) -> Tensor:
    return t.detach().clone().requires_grad_(train)


def step(module: nn.Module, input: Any, rows: Tensor, cotangent: Tensor, **lengths: Any) -> None:
    """One call on an input made of rows, with a backward pass where they want gradients."""
    with torch.set_grad_enabled(rows.requires_grad):
        output = module(input, **lengths)[0]
        output = output.data if isinstance(output, PackedSequence) else output
        if rows.requires_grad:
            rows.grad = None
            module.zero_grad()
            output.backward(cotangent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--op", choices=("LSTM", "GRU", "RNN"), default="LSTM")
    parser.add_argument("--seconds", type=float, default=4.0, help="a line takes about this long")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--backend", default="auto", help="of ours")
    options = parser.parse_args()
    on: dict[str, Any] = {"device": options.device, "dtype": DTYPES[options.dtype]}
    threads = f", {torch.get_num_threads()} threads" if options.device == "cpu" else ""
    print(f"{options.op}, {options.dtype} on {options.device}{threads}, T = {T}, lengths from {T // 10} to {T}")
    print(f"{'':10}{'B':>4}{'H':>5}{'packed ms':>11}{'lengths=':>10}{'torch.nn, packed':>18}   (their time / packed)")
    torch.manual_seed(0)
    for B, H in SHAPES:
        lengths, padded = torch.randint(T // 10, T + 1, (B,)), torch.randn(T, B, H, **on)
        lengths[0] = T
        ours, theirs = getattr(rnnattn, options.op)(H, H, **on), getattr(nn, options.op)(H, H, **on)
        on_device, using = lengths.to(options.device), functools.partial(rnnattn.use_backend, options.backend)
        for train in (False, True):
            data, *layout = pack_padded_sequence(padded, lengths, enforce_sorted=False)
            rows, x = leaf(data, train), leaf(padded, train)
            packed, d_rows, dy = PackedSequence(rows, *layout), torch.randn_like(data), torch.randn_like(padded)
            contenders = [
                Contender(functools.partial(step, ours, packed, rows, d_rows), using),
                Contender(functools.partial(step, ours, x, x, dy, lengths=on_device), using),
                Contender(functools.partial(step, theirs, packed, rows, d_rows)),
            ]
            found = compare(contenders, options.seconds, torch.device(options.device))
            with_lengths, torchs = (ratios(other, found[0])[1] for other in found[1:])
            name = "training" if train else "inference"
            print(f"{name:10}{B:4}{H:5}{found[0].median_ms:11.2f}{with_lengths:10.2f}{torchs:18.1f}", flush=True)


if __name__ == "__main__":
    main()
