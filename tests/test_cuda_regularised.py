"""The CUDA step of a regularised layer beyond the cases of `test_cuda_sources`, in the same emulation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import BF16, F16, F32, SHORT, truth
from recurrent_cases import MODES
from regularised_cases import REGULARISED_CASES, RegularisedCase
from tolerances import assert_close
from torch import Tensor

from rnnattn import reference
from rnnattn.backends import cuda
from rnnattn.backends.cuda import Cuda

DTYPES = (F32, BF16, F16)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_regularised_step_with_strided_rows(dtype: torch.dtype, mode: str, library: Any) -> None:
    """Rows apart from each other give what dense rows give; the operand may be of the states' dtype, as on a GPU."""
    B, H, cell, number = 3, 8, reference.CELLS[mode], cuda.MODES.index(mode)
    G, S, lstm = cell.blocks * H, max(cell.saved, 1) * H, cell.has_c
    draw = torch.Generator().manual_seed(0)

    def apart(width: int, of: torch.dtype = F32) -> Tensor:
        numbers = torch.randn(B, width + 3, generator=draw)
        return (numbers > 0 if of == torch.bool else numbers.to(of))[:, 1:-2]

    def of_c(of: torch.dtype = F32) -> Tensor | None:
        return apart(H, of) if lstm else None

    def run(operator: Any, inputs: list[Any], outputs: list[Any], more: list[Any]) -> None:
        """more: inputs and outputs; dense copies start with the same numbers, and shall end with the same."""
        dense = [[a.contiguous() if isinstance(a, Tensor) else a for a in part] for part in (inputs, outputs, more)]
        operator(number, *inputs, *outputs, *more)
        operator(number, *(a for part in dense for a in part))
        for strided_output, dense_output in zip((*outputs, *more), (*dense[1], *dense[2]), strict=True):
            if isinstance(strided_output, Tensor):
                torch.testing.assert_close(strided_output, dense_output, rtol=0, atol=0)

    b_hh, norm_hh, norm_c, bias_c = (torch.randn(n, generator=draw) for n in (G, G, H, H))
    h_mask, resets, lengths = apart(H), torch.tensor([True, False, False]), torch.tensor([2, 1, 5])
    by = [norm_hh, *((norm_c, bias_c) if lstm else (None, None)), h_mask, apart(H, torch.bool), of_c(torch.bool)]
    by += [0.0, 0.0, lengths, 1]
    h, h_reset, operand, gates, hidden = apart(H), apart(H), apart(H, dtype), apart(S, dtype), apart(G, dtype)
    rstd = torch.rand(B, generator=draw)
    inputs = [apart(G), apart(G), b_hh, *by, resets, h_reset, of_c()]
    run(library.regularised_forward, inputs, [h, of_c(), operand, apart(H, dtype), of_c(), gates, hidden, rstd], [])
    torch.testing.assert_close(h[0], h_reset[0], rtol=0, atol=0)
    torch.testing.assert_close(operand, (h * h_mask).to(dtype), rtol=0, atol=0)

    inputs = [apart(H, dtype), of_c(), apart(H)]
    saved = [apart(H, dtype), of_c(), gates, hidden, rstd]
    gradients = [apart(H), of_c(), of_c(), of_c(), apart(G), None if cell.shared else apart(G), apart(G)]
    run(library.regularised_backward, inputs, [apart(H), of_c()], [*saved, *by, resets, *gradients])


ALL_AT_ONCE = [case for case in REGULARISED_CASES if case.reason == "all at once" and case.offered("cuda", BF16)]


@pytest.mark.parametrize("case", ALL_AT_ONCE, ids=lambda case: case.id)
def test_norms_may_stay_in_fp32(case: RegularisedCase, emulated: Cuda) -> None:
    """As autocast leaves them."""
    t = case.tensors(BF16)
    t |= {name: t[name].float() for name in ("norm_hh", "norm_c", "bias_c") if t[name] is not None}
    assert_close(case.run(t, "cuda"), truth(case, BF16), case.op, BF16)


def test_bad_arguments_of_a_regularised_step_are_named(library: Any) -> None:
    a, c, none = torch.zeros(2, 8), torch.zeros(2, 2), None
    by = {"norm_hh": torch.ones(8), "norm_c": none, "bias_c": none, "h_mask": none, "keep_h": none, "keep_c": none,
          "zoneout_h": 0.0, "zoneout_c": 0.0, "lengths": none, "t": 0}  # fmt: skip

    def forward(mode: str = "LSTM", **changed: Any) -> None:
        given = {"a": a, "product": a, "b_hh": none, "resets_next": none, "h_reset": none, "c_reset": none,
                 "h": c.clone(), "c": c.clone(), "operand": c.clone(), "y": c.clone(), "cells": c.clone(),
                 "gates": none, "hidden": none, "rstd": none}  # fmt: skip
        library.regularised_forward(cuda.MODES.index(mode), **(given | by | changed))

    def backward(mode: str = "LSTM", **changed: Any) -> None:
        given = {"dy": c, "dcells": none, "product": none, "dh": c.clone(), "dc": c.clone(), "h_prev": c, "c_prev": c,
                 "gates": a, "hidden": a, "rstd": c[:, 0].clone(), "resets_after": none, "dh_reset": none,
                 "dc_reset": none, "d_norm_c": none, "d_bias_c": none, "da": a.clone(), "db": none,
                 "d_hidden": a.clone()}  # fmt: skip
        library.regularised_backward(cuda.MODES.index(mode), **(given | by | changed))

    forward(), backward()
    with pytest.raises(RuntimeError, match=r"regularised_forward: product: expected shape \[2, 8\], got \[2, 7\]"):
        forward(product=a[:, 1:])
    with pytest.raises(RuntimeError, match="norm_hh: expected dtype Float, got BFloat16"):
        forward(norm_hh=torch.ones(8, dtype=BF16))
    with pytest.raises(RuntimeError, match="keep_h: expected dtype Bool, got Float"):
        backward(keep_h=c)
    with pytest.raises(RuntimeError, match="cells: expected a tensor for LSTM, got None"):
        forward(cells=none)
    with pytest.raises(RuntimeError, match="db: expected a tensor for GRU, got None"):
        small = a[:, :6].clone()
        backward("GRU", da=small, d_hidden=small, hidden=small, norm_hh=torch.ones(6))
    with pytest.raises(RuntimeError, match="norm_hh: expected hidden, rstd and d_hidden with it, got None"):
        backward(hidden=none)
