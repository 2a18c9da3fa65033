"""The sequence engine's planner: what it promises for every shape and GPU, and its plans for the usual ones."""

from __future__ import annotations

import dataclasses
import math
from itertools import chain
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from cases import BF16, F16, F32, F64
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrent_cases import MODES

from rnnattn.backends.sequence_device import DEVICES, Device, device_of_cuda
from rnnattn.backends.sequence_plan import BATCH_TILES, UNITS, Plan, owned, plan
from rnnattn.backends.sequence_tiles import chunk
from rnnattn.reference import CELLS

H100, A100 = DEVICES["H100"], DEVICES["A100"]
bounded = settings(max_examples=100, deadline=None, derandomize=True)


class Shape(NamedTuple):
    """The arguments of `plan`."""

    device: Device
    mode: str
    B: int
    T: int
    H: int
    dtype: torch.dtype
    directions: int
    backward: bool
    tensor_cores: bool
    projection: int
    layers: int

    @property
    def owners(self) -> int:
        """Directions, or layers."""
        return self.directions * self.layers


def of_layers(shape: Shape, layers: int) -> Shape:
    """A stack has one direction."""
    return shape._replace(directions=1, layers=layers) if layers > 1 else shape


shapes = st.builds(
    Shape,
    st.sampled_from(list(DEVICES.values())),
    st.sampled_from(MODES),
    st.integers(1, 300),
    st.integers(1, 70000),
    st.integers(1, 3000) | st.integers(1, 1100),  # most of the first are stepwise
    st.sampled_from([F32, BF16, F16]),
    st.integers(1, 2),
    st.booleans(),
    st.booleans(),
    st.just(0),
    st.just(1),
)
shapes = st.builds(of_layers, shapes, st.sampled_from([1, 1, 2, 4]))


def total_us(p: Plan, T: int) -> float:
    return p.start_us + T * p.step_us


@bounded
@given(shapes)
def test_a_plan_fits_its_device(shape: Shape) -> None:
    p = plan(*shape)
    assert p == plan(*shape)
    assert math.isfinite(p.step_us) and p.step_us > 0 and p.reason
    if p.tier == "T2":
        assert not p.launches() and p.programs == 0
        return
    assert (p.tier == "T0") == (p.slices == 1)
    assert 0 < p.shared <= shape.device.shared
    assert p.warps % 4 == 0 and p.warps * 32 <= 1024
    assert p.batch_tile in BATCH_TILES and p.units in UNITS
    columns = CELLS[shape.mode].blocks * shape.H if shape.backward else shape.H
    assert p.parts * p.chunk * (p.chunks - 1) < columns <= p.parts * p.chunk * p.chunks
    assert p.chunk >= 16 and p.chunk.bit_count() == p.parts.bit_count() == 1
    assert shape.backward or p.parts == 1
    assert 1 <= p.ahead <= p.chunks
    assert p.tier == "T1" or shape.backward or (p.chunk, p.chunks) == (p.units, 1)
    assert p.resident * p.slices == len(p.launches()[0]) and p.resident % p.layers == 0


@bounded
@given(shapes)
def test_programs_that_wait_for_each_other_run_together(shape: Shape) -> None:
    p = plan(*shape)
    launches = p.launches()
    assert list(chain(*launches)) == list(range(p.programs))
    if p.tier == "T1" or p.layers > 1:
        together = p.slices * p.layers
        assert len(launches) == p.waves
        assert all(len(launch) <= shape.device.sms and len(launch) % together == 0 for launch in launches)


@bounded
@given(shapes)
def test_everything_is_owned_once(shape: Shape) -> None:
    p = plan(*shape)
    owners = torch.zeros(shape.owners, shape.B, shape.H, dtype=torch.int16)
    for program in range(p.programs):
        share = owned(p, program, shape.B, shape.H)
        owners[share.direction, share.rows.start : share.rows.stop, share.units.start : share.units.stop] += 1
    assert p.tier == "T2" or (owners == 1).all()


@bounded
@given(shapes, st.integers(1, 200), st.integers(1, 300))
def test_more_sms_or_fewer_rows_are_never_slower(shape: Shape, sms: int, B: int) -> None:
    time = total_us(plan(*shape), shape.T)
    wider = dataclasses.replace(shape.device, sms=shape.device.sms + sms)
    assert total_us(plan(*shape._replace(device=wider)), shape.T) <= time * (1 + 1e-9)
    assert total_us(plan(*shape._replace(B=min(B, shape.B))), shape.T) <= time * (1 + 1e-9)


@bounded
@given(shapes, st.integers(1, 70000))
def test_the_length_decides_nothing_but_whether_the_engine_starts(shape: Shape, T: int) -> None:
    a, b = plan(*shape), plan(*shape._replace(T=T))
    assert a == b or "T2" in (a.tier, b.tier)


def test_few_kernels_serve_all_batch_sizes() -> None:
    for H in (64, 256, 512, 1024):
        plans = [plan(H100, "LSTM", B, 1000, H, BF16, 1) for B in range(1, 301)]
        assert len({(p.units, p.chunk, p.chunks, p.batch_tile, p.warps) for p in plans if p.tier != "T2"}) <= 6


@pytest.mark.parametrize(
    "H, largest, expected",
    [
        (1, 512, 16), (17, 512, 32), (63, 512, 64), (64, 512, 64), (65, 512, 128), (96, 512, 128), (130, 512, 64),
        (650, 512, 256), (768, 1024, 256), (960, 1024, 1024), (1024, 1024, 1024), (1024, 512, 512), (1500, 512, 512),
        (500, 256, 256), (600, 256, 128), (2000, 1024, 1024), (9000, 512, 512),
    ],
)  # fmt: skip
def test_chunk(H: int, largest: int, expected: int) -> None:
    assert chunk(H, largest) == expected


@pytest.mark.parametrize("H, B, us", [
    (256, 16, 1.0), (512, 16, 1.2), (768, 16, 1.2), (1024, 16, 1.4), (1024, 64, 2.9), (1536, 16, 2.5),
])  # fmt: skip
def test_the_model_meets_the_design_on_h100(H: int, B: int, us: float) -> None:
    assert plan(H100, "LSTM", B, 1000, H, BF16, 1).step_us == pytest.approx(us, rel=0.35)


@pytest.mark.parametrize("H, B, units, tile, kib", [
    (256, 16, 16, 16, 40), (512, 16, 16, 16, 80), (1024, 16, 16, 16, 160), (1024, 64, 16, 32, 192),
])  # fmt: skip
def test_shared_memory_as_compiled_for_h100(H: int, B: int, units: int, tile: int, kib: int) -> None:
    p = plan(H100, "LSTM", B, 1000, H, BF16, 1)
    assert (p.units, p.batch_tile, p.shared) == (units, tile, kib * 1024)


FORWARD_AND_BACKWARD = [
    # device, mode, B, H, dtype, tiers
    ("H100", "LSTM", 16, 64, BF16, "T0 T0"),
    ("H100", "LSTM", 16, 128, BF16, "T0 T1"),
    ("H100", "LSTM", 16, 129, BF16, "T1 T1"),
    ("H100", "LSTM", 5000, 64, BF16, "T0 T0"),
    ("H100", "LSTM", 16, 1024, BF16, "T1 T1"),
    ("H100", "LSTM", 16, 1536, BF16, "T1 T1"),
    ("H100", "LSTM", 16, 2048, BF16, "T2 T2"),
    ("H100", "LSTM", 128, 1536, BF16, "T2 T2"),
    ("H100", "LSTM", 16, 64, F32, "T0 T0"),
    ("H100", "LSTM", 16, 128, F32, "T1 T1"),
    ("H100", "LSTM", 16, 1024, F32, "T1 T1"),
    ("H100", "LSTM", 64, 1024, F32, "T2 T2"),
    ("H100", "GRU", 1, 512, F16, "T1 T1"),
    ("H100", "RNN_TANH", 16, 256, F16, "T0 T1"),
    ("H100", "RNN_RELU", 64, 1024, F16, "T1 T1"),
    ("A100", "LSTM", 16, 64, BF16, "T0 T0"),
    ("A100", "LSTM", 16, 128, BF16, "T1 T1"),
    ("A100", "LSTM", 64, 512, BF16, "T1 T1"),
    ("A100", "LSTM", 1, 1024, BF16, "T1 T1"),
    ("A100", "LSTM", 16, 1536, BF16, "T2 T2"),
    ("A10", "LSTM", 16, 512, BF16, "T1 T1"),
    ("A10", "LSTM", 16, 1024, BF16, "T2 T2"),
]


@pytest.mark.parametrize(
    "device, mode, B, H, dtype, tiers",
    FORWARD_AND_BACKWARD,
    ids=[f"{d}-{m}-B{B}-H{H}-{dtype.itemsize}" for d, m, B, H, dtype, _ in FORWARD_AND_BACKWARD],
)
def test_tiers(device: str, mode: str, B: int, H: int, dtype: torch.dtype, tiers: str) -> None:
    plans = [plan(DEVICES[device], mode, B, 1000, H, dtype, 1, backward) for backward in (False, True)]
    assert [p.tier for p in plans] == tiers.split()


@pytest.mark.parametrize("device, dtype, H, expected", [
    (A100, BF16, 1024, (128, 8)), (A100, F32, 256, (64, 4)),
    (H100, BF16, 1024, (256, 4)), (H100, BF16, 768, (256, 3)), (H100, BF16, 1536, (512, 3)), (H100, F32, 768, (64, 12)),
])  # fmt: skip
def test_chunks_that_registers_hold(device: Device, dtype: torch.dtype, H: int, expected: tuple[int, int]) -> None:
    p = plan(device, "LSTM", 16, 1000, H, dtype, 1)
    assert (p.chunk, p.chunks) == expected


def test_true_fp32_takes_small_tiles_only() -> None:
    tiers = {H: plan(H100, "LSTM", 16, 1000, H, F32, 1, tensor_cores=False).tier for H in (16, 64, 512, 1536)}
    assert tiers == {16: "T0", 64: "T1", 512: "T1", 1536: "T2"}
    of_half = [plan(H100, "LSTM", 16, 1000, 512, BF16, 1, tensor_cores=on) for on in (False, True)]
    assert of_half[0] == of_half[1]


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"dtype": F64}, "not torch.float64"),
        ({"projection": 64}, "no projection"),
        ({"device": dataclasses.replace(A100, name="T4", capability=75)}, "T4 has 7.5"),
        ({"H": 4000}, "KB of shared memory, H100 gives 227"),
        ({"H": 1500, "device": A100}, "188 programs of 8 units wait for each other, A100 has 108 SMs"),
        ({"B": 2**21}, "offsets in a step take 32 bits"),
        ({"layers": 2, "H": 1024}, "nothing fits"),
        ({"layers": 3, "B": 512, "H": 64}, "layers one after the other take less"),
        ({"B": 3000, "H": 1024}, "quicker than the engine"),
        ({"T": 1}, "T=1 steps do not pay"),
        ({"H": 256, "device": dataclasses.replace(H100, sms=2)}, "wait for each other, H100 has 2 SMs"),
    ],
    ids=["dtype", "projection", "old", "shared", "wait", "offsets", "stack", "layers", "slow", "short", "sms"],
)
def test_stepwise_says_why(changes: dict[str, object], reason: str) -> None:
    call = {"device": H100, "mode": "LSTM", "B": 16, "T": 1000, "H": 512, "dtype": BF16, "directions": 1}
    p = plan(**{**call, **changes})  # type: ignore[arg-type]
    assert p.tier == "T2" and reason in p.reason


def _properties(name: str, major: int, minor: int, sms: int, **more: int) -> SimpleNamespace:
    return SimpleNamespace(
        name=name, major=major, minor=minor, multi_processor_count=sms, L2_cache_size=40 << 20, **more
    )


@pytest.mark.parametrize(
    "properties, like",
    [
        (_properties("NVIDIA A100-SXM4-80GB", 8, 0, 108), "A100"),
        (_properties("NVIDIA A10", 8, 6, 72), "A10"),
        (_properties("NVIDIA GeForce RTX 4090", 8, 9, 128), "RTX 4090"),
        (_properties("NVIDIA H200", 9, 0, 132), "H100"),
        (_properties("NVIDIA Thor", 11, 0, 20), "B200"),
        (_properties("Tesla T4", 7, 5, 40), "A100"),
    ],
    ids=lambda value: value.name.split()[-1] if isinstance(value, SimpleNamespace) else "",
)
def test_device_of_cuda(properties: SimpleNamespace, like: str) -> None:
    device, known = device_of_cuda(properties), DEVICES[like]
    assert (device.capability, device.sms) == (
        properties.major * 10 + properties.minor,
        properties.multi_processor_count,
    )
    assert (device.tensor_flops, device.shared, device.clock) == (known.tensor_flops, known.shared, known.clock)
    assert device.l2_bandwidth == pytest.approx(known.l2_bandwidth * device.sms / known.sms)


def test_device_of_cuda_believes_torch() -> None:
    told = _properties("NVIDIA H100 PCIe", 9, 0, 114, shared_memory_per_block_optin=200_000, clock_rate=1_500_000)
    device = device_of_cuda(told)
    assert (device.sms, device.shared, device.clock) == (114, 200_000, 1.5e9)
