"""Whether a GPU's memory holds a case: by an estimate, before anything is allocated."""

from __future__ import annotations

import gc

import torch

from benchmarks.cases import GATES, Case, PoolCase, RecurrentCase

FLOAT64 = 8  # bytes: the truth is what takes most, and stays while the others run


def bytes_needed(case: Case) -> int:
    """About what a training step in float64 takes, and beside it the largest of the others.

    Of each step, row and unit of a layer: gates, c and y that a forward pass keeps, the gradients of all these, and as
    much again for what an implementation pads or lays out anew. Weights count with their gradients and a copy of both.
    """
    if isinstance(case, PoolCase):
        return case.B * case.T * FLOAT64 * (4 * case.D + 3 * case.A)  # x, dx and a product of each; W x, its tanh
    if not isinstance(case, RecurrentCase):
        return 0
    G, K = GATES[case.op], 2 if case.bidirectional else 1
    units = case.layers * K * case.H
    rows = case.B * case.T * (2 * case.I + units * (2 * (G + 2) + 3))
    weights = G * units * (max(case.I, K * case.H) + case.H + 2)
    return FLOAT64 * (rows + 4 * weights)


def bytes_free(device: torch.device) -> int:
    """After earlier cases' memory was given back."""
    gc.collect()
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0])


def objection(case: Case, free: int) -> str:
    """Why the case does not fit, or an empty text."""
    needed = bytes_needed(case)
    return "" if needed <= free else f"about {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB free"
