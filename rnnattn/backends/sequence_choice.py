"""Which plan of the sequence engine a layer takes on the GPU at hand, by that GPU's figures and torch's switches."""

from __future__ import annotations

import functools
import os

import torch

from rnnattn.backends.base import Call
from rnnattn.backends.products import takes_tf32
from rnnattn.backends.sequence import Launch
from rnnattn.backends.sequence_device import Device, device_of_cuda
from rnnattn.backends.sequence_plan import Plan, plan

MANY = 10**6  # steps, for which starting the engine always pays
OF_OP = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN_TANH"}  # a cell of the operation; plans know no more of it


def plan_for(
    device: torch.device,
    mode: str,
    B: int,
    T: int,
    H: int,
    dtype: torch.dtype,
    directions: int,
    backward: bool,
    projection: int = 0,
    layers: int = 1,
) -> Plan:
    """The plan of a layer, or of layers at the same time, on a CUDA device."""
    index = torch.cuda.current_device() if device.index is None else device.index
    off = os.environ.get("RNNATTN_SEQUENCE") == "0"
    return plan(_device(index), mode, B, T, H, dtype, directions, backward, takes_tf32(), projection, layers, off)


def plan_of_call(call: Call, backward: bool = False, as_one: bool = False) -> Plan | None:
    """The plan of a layer of the call, or of all of them as one, on the current device; None where there is none, or
    programs are interpreted."""
    if not call.recurrent or call.regularised or 0 in (call.B, call.T):
        return None
    if call.device != "cuda" or not torch.cuda.is_available():
        return None
    return plan_for(
        torch.device("cuda"), OF_OP[call.op], call.B, call.T, call.hidden, call.dtype, call.directions, backward,
        call.projection, call.layers if as_one else 1,
    )  # fmt: skip


def stacks(call: Call) -> bool:
    """Whether the layers of the call are one operation. In a graph that is compiled for any T and B they are so where
    they could ever run at the same time; the plan is made when it runs."""
    if not call.compiling:
        return runs_as_one(call)
    cuda = call.device == "cuda" and may_stack(call)
    return cuda and could_run_as_one(call.op, call.dtype, call.hidden, call.layers, call.grad)


def could_run_as_one(op: str, dtype: torch.dtype, H: int, layers: int, grad: bool) -> bool:
    """`runs_as_one` with few rows and many steps."""
    return _engine_runs(Call(op, "cuda", dtype, 1, MANY, H, H, layers, grad=grad), as_one=True)


could_run_as_one._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as `backends.unavailable`


def runs_as_one(call: Call) -> bool:
    """Whether the layers of the call run at the same time, both ways if they are trained."""
    return may_stack(call) and _engine_runs(call, as_one=True)


def may_stack(call: Call) -> bool:
    """Whether the layers of the call lie on each other as they are, with nothing between that the engine has not."""
    changed = call.projection or call.dropout or call.in_chunks or call.regularised
    return call.layers > 1 and call.directions == 1 and not changed


def in_one_launch(call: Call, capabilities: frozenset[int]) -> bool:
    """Whether the sequence kernels run the call, both ways if it is trained, and the GPU is one of these."""
    if not capabilities or call.compiling or call.device != "cuda" or not torch.cuda.is_available():
        return False
    if _device(torch.cuda.current_device()).capability not in capabilities:
        return False
    return _engine_runs(call, as_one=False)


def _engine_runs(call: Call, as_one: bool) -> bool:
    """Whether the plans of a call's passes, of which inference has one, are none of T2."""
    plans = [plan_of_call(call, backward, as_one) for backward in ((False, True) if call.grad else (False,))]
    return all(p is not None and p.tier != "T2" for p in plans)


def launch_for(
    device: torch.device,
    mode: str,
    B: int,
    T: int,
    H: int,
    dtype: torch.dtype,
    directions: int,
    backward: bool,
    layers: int = 1,
) -> Launch | None:
    """How the sequence kernels are to run a layer, or layers at the same time; None for step by step, and for one after
    the other. As in the interpreter, where programs do not run at the same time."""
    if device.type != "cuda" or 0 in (B, T):
        return None
    p = plan_for(device, mode, B, T, H, dtype, directions, backward, layers=layers)
    if p.tier == "T2":
        return None
    return Launch(*(getattr(p, name) for name in Launch._fields))


def precision(dtype: torch.dtype) -> str:
    """Of the kernels' products: true fp32, or TF32 where torch's own recurrent layers may take it."""
    return "tf32" if dtype == torch.float32 and takes_tf32() else "ieee"


@functools.cache
def _device(index: int) -> Device:
    return device_of_cuda(torch.cuda.get_device_properties(index))
