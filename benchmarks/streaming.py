"""One step of an LSTM at a time, as in streaming inference: whole Python calls, with the state carried on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import rnnattn
from benchmarks import runtimes
from benchmarks.cases import DTYPES, StepCase
from benchmarks.measure import Experiment
from benchmarks.recurrent import torch_kernel, torch_peers

STEPS = 16  # in one call of an implementation, each on another input; what is reported is one step

State = tuple[Tensor, Tensor]
Step = Callable[[Tensor, State], tuple[Tensor, State]]


def supported(case: StepCase) -> bool:
    """Whether this version of rnnattn has what the case measures."""
    return case.variant != "LSTM-prepared" or hasattr(rnnattn.LSTM, "prepare_inference")


def experiment(case: StepCase, device: torch.device) -> Experiment:
    """All start from the same random state and give the output of the last step, [1, H]."""
    torch.manual_seed(0)
    dtype = DTYPES[case.dtype]
    layer, cell = nn.LSTM(case.H, case.H).to(device, dtype), nn.LSTMCell(case.H, case.H).to(device, dtype)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in layer.state_dict().items()})
    our_layer, our_cell = (rnnattn.swap(module).model.eval() for module in (layer, cell))
    exact = copy.deepcopy(layer).double()
    xs = [torch.randn(1, 1, case.H, device=device, dtype=dtype) for _ in range(STEPS)]
    state = torch.randn(1, 1, case.H, device=device, dtype=dtype), torch.randn(1, 1, case.H, device=device, dtype=dtype)
    rows, row_state = [x[0] for x in xs], (state[0][0], state[1][0])

    def steps_of(module: nn.Module) -> Callable[[], Tensor]:
        """A cell takes and gives rows [1, H], the others sequences of one step [1, 1, H]."""
        if isinstance(module, nn.RNNCellBase):
            return lambda: _steps(_cell_step(module), rows, row_state)
        return lambda: _steps(module, xs, state)

    ours: Any = our_cell if case.variant == "LSTMCell" else our_layer
    if case.variant == "LSTM-prepared":
        ours = ours.prepare_inference()
    exact_xs, exact_state = [x.double() for x in xs], (state[0].double(), state[1].double())
    on_cpu_in_fp32 = device.type == "cpu" and case.dtype == "fp32"
    return Experiment(
        ours=steps_of(ours),
        peers=[
            *torch_peers("torch.nn.LSTM", lambda: torch_kernel(steps_of(our_layer)), steps_of(layer), device),
            *torch_peers("torch.nn.LSTMCell", lambda: "ATen LSTM cell", steps_of(cell), device),
            *(runtimes.step_peers(layer, xs, state) if on_cpu_in_fp32 else []),
        ],
        inputs=[],
        dy=torch.empty(0, device=device),
        exact=lambda: _steps(exact, exact_xs, exact_state),
        exact_inputs=[],
        modules=(ours, layer, cell) if isinstance(ours, nn.Module) else (layer, cell),
        operations=STEPS,
    )


def _steps(step: Step, xs: Sequence[Tensor], state: State) -> Tensor:
    """The last output, [1, H]."""
    y = xs[0]
    for x in xs:
        y, state = step(x, state)
    return y.view(1, -1)


def _cell_step(cell: nn.Module) -> Step:
    def step(x: Tensor, state: State) -> tuple[Tensor, State]:
        after: Any = cell(x, state)
        return after[0], after

    return step
