"""Which layers the sequence kernels run, and that running them waits for nothing and compiles little."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import BF16, F32, F64, recurrent_precision
from torch.utils._python_dispatch import TorchDispatchMode

import rnnattn
from rnnattn.backends import choice, sequence, sequence_choice
from rnnattn.backends.base import Call
from rnnattn.backends.rows import Rows
from rnnattn.backends.sequence import Launch
from rnnattn.backends.sequence_device import DEVICES
from rnnattn.backends.sequence_plan import plan

H100, CUDA = DEVICES["H100"], torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H100, as far as planning is concerned."""
    monkeypatch.setattr(sequence_choice, "_device", lambda index: H100)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("backward", [False, True])
def test_a_layer_is_launched_as_planned(backward: bool) -> None:
    p = plan(H100, "LSTM", 16, 1000, 512, BF16, 2, backward)
    launch = sequence_choice.launch_for(CUDA, "LSTM", 16, 1000, 512, BF16, 2, backward)
    assert p.tier == "T1" and launch is not None
    assert all(getattr(launch, name) == getattr(p, name) for name in Launch._fields)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    "changes",
    [{"H": 4096}, {"T": 1}, {"T": 0}, {"B": 0}, {"dtype": F64}, {"device": torch.device("cpu")}],
    ids=["wide", "short", "no step", "no row", "float64", "interpreted"],
)
def test_other_layers_go_step_by_step(changes: dict[str, Any]) -> None:
    layer = {"device": CUDA, "mode": "LSTM", "B": 16, "T": 1000, "H": 512, "dtype": BF16, "directions": 1}
    assert sequence_choice.launch_for(**layer, backward=False) is not None  # type: ignore[arg-type]
    assert sequence_choice.launch_for(**{**layer, **changes}, backward=False) is None


@pytest.mark.usefixtures("gpu")
def test_the_engine_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RNNATTN_SEQUENCE", "0")
    assert sequence_choice.launch_for(CUDA, "LSTM", 16, 1000, 512, BF16, 1, False) is None


@pytest.mark.usefixtures("gpu")
def test_fp32_is_multiplied_as_torch_may_multiply_it() -> None:
    for setting, chunk in (("tf32", 128), ("ieee", 32)):
        with recurrent_precision(setting):
            launch = sequence_choice.launch_for(CUDA, "LSTM", 16, 1000, 512, F32, 1, False)
            assert launch is not None and launch.chunk == chunk
            assert sequence_choice.precision(F32) == setting and sequence_choice.precision(BF16) == "ieee"


CALL = Call("lstm", "cuda", BF16, 16, 1000, 512, 512, grad=True)


@pytest.mark.usefixtures("gpu")
def test_explain_shows_the_plan() -> None:
    triton = rnnattn.backends.get("triton")
    p, text = plan(H100, "LSTM", 16, 1000, 512, BF16, 1), triton.kernel(CALL)
    assert text.startswith(f"forward T1, all steps in one Triton launch: {p.programs} programs of {p.units} units")
    assert f"{p.step_us:.1f} us a step expected" in text and "; backward T1" in text
    assert triton.step_us(CALL) == p.step_us
    assert "backward" not in triton.kernel(dataclasses.replace(CALL, grad=False))
    assert "no projection" in triton.kernel(dataclasses.replace(CALL, projection=64))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_no_plan() -> None:
    triton = rnnattn.backends.get("triton")
    assert triton.kernel(CALL) == "a Triton kernel and a GEMM per step" and triton.step_us(CALL) is None


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    "changes, first",
    [
        ({}, "triton"),
        ({"hidden": 4096}, "torch"),
        ({"B": 3000, "hidden": 1024}, "torch"),
        ({"projection": 64}, "torch"),
    ],
    ids=["fits", "wide", "many rows", "projection"],
)
def test_auto_goes_by_the_plan_where_that_was_measured(
    changes: dict[str, Any], first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = dataclasses.replace(CALL, **changes)
    assert choice.order(call)[0][0] == "torch"
    monkeypatch.setattr(choice, "AHEAD_OF_CUDNN", frozenset({80}))
    assert choice.order(call)[0][0] == "torch"
    monkeypatch.setattr(choice, "AHEAD_OF_CUDNN", frozenset({90}))
    assert choice.order(call)[0][0] == first


STACK_CALL = Call("lstm", "cuda", BF16, 16, 1000, 256, 256, layers=2, grad=True)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    "changes",
    [{"layers": 1}, {"directions": 2}, {"projection": 64}, {"dropout": True}, {"in_chunks": True}, {"B": 300},
     {"hidden": 1024}],
    ids=str,
)  # fmt: skip
def test_layers_run_at_the_same_time_where_they_have_room(changes: dict[str, Any]) -> None:
    call = dataclasses.replace(STACK_CALL, **changes)
    assert sequence_choice.stacks(STACK_CALL) and not sequence_choice.stacks(call)
    text = rnnattn.backends.get("triton").kernel(STACK_CALL)
    assert (
        "forward T1, all steps of all 2 layers in one Triton launch" in text and "; backward T1, all steps of" in text
    )


@pytest.mark.usefixtures("gpu")
def test_a_stack_that_is_trained_has_to_fit_both_ways() -> None:
    trained, inference = (Call("lstm", "cuda", BF16, 16, 1000, 650, 650, layers=2, grad=grad) for grad in (True, False))
    assert sequence_choice.stacks(inference) and not sequence_choice.stacks(trained)


@pytest.mark.usefixtures("gpu")
def test_the_time_of_a_step_is_that_of_one_layer() -> None:
    p, triton = plan(H100, "LSTM", 16, 1000, 256, BF16, 1, layers=2), rnnattn.backends.get("triton")
    assert triton.step_us(STACK_CALL) == pytest.approx(p.step_us * 1001 / 2000)


@pytest.mark.usefixtures("gpu")
def test_a_compiled_graph_holds_a_stack_for_any_length() -> None:
    for T in (1, 1000):
        assert sequence_choice.stacks(dataclasses.replace(STACK_CALL, T=T, B=300, compiling=True))


class NoWait(TorchDispatchMode):
    """Fails where the host would have to wait for the device: a graph that is captured allows no such thing."""

    WAITS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in self.WAITS, f"{func} waits for the device"
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("mode", ("LSTM", "GRU", "RNN_TANH"))
def test_the_host_waits_for_nothing(mode: str, packed: bool) -> None:
    """Lengths of packed rows are the host's: what is read of them is not the device's."""
    T, B, I, H, K = 5, 4, 3, 8, 2
    G = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1}[mode]
    nothing = SimpleNamespace(forward=lambda *arguments: None, backward=lambda *arguments: None)
    launch = Launch(16, 2, 16, 1, 1, False, 16, 4, 0, 1)
    x, h0, c0 = torch.randn(T, B, I), torch.randn(K, B, H), torch.randn(K, B, H) if mode == "LSTM" else None
    weights = [t for _ in range(K) for t in (torch.randn(G * H, I), torch.randn(G * H, H), *[torch.randn(G * H)] * 2)]
    lengths, resets = torch.tensor([5, 0, 3, 1]), torch.rand(T, B) > 0.5
    if packed:
        x, lengths, resets = torch.randn(9, I), torch.tensor([5, 2, 1, 1]), None
    rows = Rows.of(x, B, lengths, resets)
    with NoWait():
        inputs = x, h0, c0, weights, resets, True
        y, _, _, gates, cells = sequence.layer_forward(
            nothing, launch, "ieee", rows, *inputs, True, "bidirectional", mode, True
        )
        cotangents = torch.randn_like(y), None, None, None
        sequence.layer_backward(
            nothing, launch, "ieee", rows, *cotangents, *inputs, y, gates, cells, True, "bidirectional", mode, True,
            True,
        )  # fmt: skip


COUNT = """
import torch
from triton import knobs
from rnnattn.backends import sequence
from rnnattn.backends.rows import Rows
from rnnattn.backends.sequence_device import DEVICES
from rnnattn.backends.sequence_plan import plan
from rnnattn.backends.triton import _sequence
from tests.triton_resources import take_for_here

take_for_here(90)
keys = set()
knobs.runtime.jit_cache_hook = lambda *, key, **more: keys.add(str(key)) or True
shapes = (1, 100), (3, 1000), (7, 501), (8, 64), (15, 70000), (16, 1024)
for B, T, packed in [(*shape, packed) for shape in shapes for packed in (False, True)]:
    H = 64
    for backward in (False, True):
        p = plan(DEVICES["H100"], "LSTM", B, T, H, torch.bfloat16, 1, backward)
        launch = sequence.Launch(*(getattr(p, name) for name in sequence.Launch._fields))
        T = min(T, 100)
        x, h0, c0 = torch.zeros(T, B, 8, dtype=torch.bfloat16), *torch.zeros(2, 1, B, H, dtype=torch.bfloat16)
        weights = [torch.zeros(256, 8), torch.zeros(256, H), torch.zeros(256), torch.zeros(256)]
        weights = [w.bfloat16() for w in weights]
        lengths = torch.full((B,), T) if packed else None
        x = x.flatten(0, 1) if packed else x
        rows, inputs = Rows.of(x, B, lengths, None), (x, h0, c0, weights, None, False)
        settings = True, "forward", "LSTM"
        if not backward:
            y, *_, gates, cells = sequence.layer_forward(_sequence(), launch, "ieee", rows, *inputs, *settings, True)
        else:
            sequence.layer_backward(_sequence(), launch, "ieee", rows, y, None, None, None, *inputs, y, gates, cells,
                                    *settings, True, True)
print(len(keys))
"""


def test_batch_size_and_length_compile_nothing_anew_on_triton() -> None:
    """Six shapes, one kernel each way, and another for packed rows."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", COUNT], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == "4"
