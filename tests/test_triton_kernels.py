"""What is particular to the Triton kernels; that they compute the operations, the shared cases show."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import device_of
from tolerances import assert_close, relative_error
from torch import Tensor

from rnnattn import backends, reference
from rnnattn.backends import pool_gemms
from rnnattn.backends.base import Call
from rnnattn.backends.triton import WIDEST

triton = pytest.importorskip("triton")
if reason := backends.unavailable("triton"):
    pytest.skip(f"backend triton: {reason}", allow_module_level=True)

import triton.language as tl  # noqa: E402

from rnnattn.kernels import additive_pool, linear_pool, step_backward, step_forward  # noqa: E402
from rnnattn.kernels.math import sigmoid, tanh, tanh_absolute  # noqa: E402
from rnnattn.kernels.pool_parts import multiprocessors, split_time  # noqa: E402

DEVICE = device_of("triton")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
BACKEND = backends.get("triton")


def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=DEVICE) * scale).to(dtype)


def double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def check_pooling(x: Tensor, A: int, lengths: Tensor | None = None, mask: Tensor | None = None) -> None:
    """Forward and backward against the reference in float64, with random cotangents."""
    (B, T, D), dtype = x.shape, x.dtype
    parameters = [normal(A or D, dtype=dtype, scale=(A or D) ** -0.5), None, None]
    if A:
        parameters[1:] = normal(A, D, dtype=dtype, scale=D**-0.5), normal(A, dtype=dtype)
    d_pooled, d_weights = normal(D, B, dtype=dtype).t(), normal(B, T, dtype=dtype)

    def run(pool: Any, convert: Any, *need_weights: bool) -> dict[str, Tensor]:
        inputs = [convert(value) for value in (x, *parameters, lengths, mask)]
        pooled, p, lse = pool.attention_pool_forward(*inputs, *need_weights)
        gradients = pool.attention_pool_backward(convert(d_pooled), convert(d_weights), *inputs, pooled, lse)
        named = zip(("dx", "dv", "dw", "db"), gradients, strict=True)
        return {"pooled": pooled.to(p.dtype), "p": p} | {name: value for name, value in named if value is not None}

    assert_close(run(BACKEND, lambda value: value, True), run(reference, double), "attention_pool", dtype)


@pytest.mark.parametrize(
    "T,block,programs,B", list(itertools.product((1, 16, 17, 999), (1, 16), (1, 7, 528), (1, 3, 600)))
)
def test_parts_cover_time_once(T: int, block: int, programs: int, B: int) -> None:
    S, steps = split_time(B, T, block, programs)
    assert steps % block == 0 and (S - 1) * steps < T <= S * steps
    assert S == 1 or programs >= B * S


@DTYPES
@pytest.mark.parametrize("A", [0, 9], ids=["linear", "additive"])
def test_rows_split_over_time(A: int, dtype: torch.dtype) -> None:
    T, D = 300, 130
    block = linear_pool.tile_config(D, T)["BLOCK_T"]
    assert split_time(2, T, block, linear_pool.PROGRAMS * multiprocessors(DEVICE))[0] > 1
    check_pooling(normal(2, T, D, dtype=dtype), A, lengths=torch.tensor([T, 70], device=DEVICE))


@DTYPES
def test_a_mask_that_empties_whole_parts(dtype: torch.dtype) -> None:
    mask = torch.zeros(2, 300, dtype=torch.bool, device=DEVICE)
    mask[0, 290:] = mask[1, :3] = True
    x = torch.where(mask[..., None], normal(2, 300, 20, dtype=dtype), torch.nan)
    check_pooling(x, 0, mask=mask)


@pytest.mark.parametrize("chunk", [9, 64, 200], ids="{}_elements".format)
def test_additive_backward_in_chunks(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """One step at a time, parts of a row, and several rows at a time, by few programs."""
    monkeypatch.setattr(pool_gemms, "CHUNK", chunk)
    monkeypatch.setattr(additive_pool, "BACKWARD_PROGRAMS", 2)
    monkeypatch.setattr(additive_pool, "TILE", 64)
    mask = torch.rand(3, 11, device=DEVICE) < 0.7
    check_pooling(torch.where(mask[..., None], normal(3, 11, 8), torch.nan), 9, mask=mask)


@pytest.mark.parametrize("B,T,limit", [(3, 11, 1), (3, 11, 7), (3, 11, 25), (3, 11, 1000)])
def test_chunks_cover_everything_once(B: int, T: int, limit: int) -> None:
    seen = torch.zeros(B, T, dtype=torch.int64)
    for rows, time in pool_gemms._chunks(B, T, limit):
        assert seen[rows, time].numel() <= limit
        seen[rows, time] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("A", [0, 5], ids=["linear", "additive"])
@pytest.mark.parametrize("layout", ["time_first", "features_strided", "expanded", "odd_offset"])
def test_strides_of_x(layout: str, A: int) -> None:
    x = {
        "time_first": lambda: normal(20, 3, 12).transpose(0, 1),
        "features_strided": lambda: normal(3, 20, 24)[..., ::2],
        "expanded": lambda: normal(1, 20, 12).expand(3, 20, 12),
        "odd_offset": lambda: normal(3 * 20 * 12 + 1)[1:].view(3, 20, 12),
    }[layout]()
    check_pooling(x, A)


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors from `new_empty` lie between zones of NaN, which nobody may overwrite."""
    zone, allocated = 64, []

    original = torch.Tensor.new_empty

    def new_empty(self: Tensor, *shape: Any, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        if options:  # the interpreter's own
            return original(self, *shape, dtype=dtype, **options)
        size = torch.Size(shape[0] if shape and not isinstance(shape[0], int) else shape)
        memory = torch.full((size.numel() + 2 * zone,), torch.nan, dtype=dtype or self.dtype, device=self.device)
        allocated.append(memory)
        return memory[zone : zone + size.numel()].view(size)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield
    assert allocated
    for memory in allocated:
        assert memory[:zone].isnan().all() and memory[-zone:].isnan().all()
        assert not memory[zone:-zone].isnan().any(), "not written"


@DTYPES
@pytest.mark.parametrize("A", [0, 7], ids=["linear", "additive"])
def test_pooling_writes_its_outputs_and_nothing_else(guarded: None, A: int, dtype: torch.dtype) -> None:
    lengths = torch.tensor([37, 0, 5], device=DEVICE)
    check_pooling(normal(3, 37, 33, dtype=dtype), A, lengths=lengths)
    check_pooling(normal(1, 200, 9, dtype=dtype), A)


@DTYPES
@pytest.mark.parametrize("H", [1, 37, 300], ids="H{}".format)
@pytest.mark.parametrize("mode", reference.CELLS)
def test_step_against_autograd(mode: str, H: int, dtype: torch.dtype) -> None:
    """Rows with gaps; the outputs are views of NaN, of which only the rows may be overwritten. Row 1 and 2 are
    invalid, row 3 is reset, row 4 is one that the step after does not start from."""
    B, t, gap, cell = 5, 2, 3, reference.CELLS[mode]
    G, S, eps = cell.blocks * H, cell.saved * H, torch.finfo(dtype).eps
    lengths = torch.tensor([3, 2, 0, 9, 5], device=DEVICE)
    valid, resets, cut = (t < lengths)[:, None], lengths == 9, lengths == 5

    def rows(width: int, like: torch.dtype = torch.float32) -> Tensor:
        return torch.full((B, width + gap), torch.nan, dtype=like, device=DEVICE)[:, :width]

    def filled(width: int, like: torch.dtype = torch.float32) -> Tensor:
        return rows(width, like).copy_(normal(B, width))

    def of_lstm(a: Tensor) -> Tensor | None:
        return a if cell.has_c else None

    gates_x, gates_h, gates_reset = filled(G), filled(G), filled(G)
    gates_x[~valid[:, 0]] = torch.nan
    h_prev, h_reset, c_prev, c_reset = filled(H, dtype), filled(H, dtype), filled(H), filled(H)
    bias_q = normal(H, dtype=dtype) if mode == "GRU" else None
    gates, c, y, h = rows(S, dtype) if S else None, of_lstm(rows(H)), rows(H, dtype), rows(H, dtype)
    step_forward(
        mode, gates_x, gates_h, bias_q, h_prev, of_lstm(c_prev), lengths, t, resets, gates_reset, h_reset,
        of_lstm(c_reset), gates, c, y, h,
    )  # fmt: skip

    reset = resets[:, None]
    a = gates_x.double().requires_grad_()
    b = torch.where(reset, gates_reset, gates_h).double()
    if bias_q is not None:
        b[:, 2 * H :] += bias_q
    h_start = torch.where(reset, h_reset, h_prev).double().requires_grad_()
    c_start = torch.where(reset, c_reset, c_prev).double().requires_grad_()
    h_true, c_true, saved = cell.forward(a, b.requires_grad_(), h_start, c_start if cell.has_c else None)
    want = {"y": torch.where(valid, h_true, 0), "h": torch.where(valid, h_true, h_prev)}
    got = {"y": y, "h": h}
    if gates is not None and saved is not None:
        want["gates"], got["gates"] = torch.where(valid, saved, 0), gates
    assert_close(got, {k: v.detach() for k, v in want.items()}, "lstm", dtype)
    if c is not None and c_true is not None:
        assert relative_error(c, torch.where(valid, c_true, c_prev).detach()) < 6 * torch.finfo(torch.float32).eps

    dy, product, dh, dc = filled(H, dtype), filled(H), filled(H), filled(H)
    dy[~valid[:, 0]] = torch.nan
    dh_reset, dc_reset, da, db = filled(H), filled(H), rows(G, dtype), None if cell.shared else rows(G, dtype)
    carried = torch.where(cut[:, None], 0, (product + dh).double())
    dc_next = torch.where(cut[:, None], 0, dc.double())
    gathered = [torch.where(cut[:, None], d + more, d) for d, more in ((dh_reset, product + dh), (dc_reset, dc))]
    step_backward(
        mode, dy, product, dh, of_lstm(dc), gates, y, h_start.detach().to(dtype), c, of_lstm(c_prev), lengths, t,
        resets, cut, of_lstm(c_reset), dh_reset, of_lstm(dc_reset), da, db,
    )  # fmt: skip
    outputs, cotangents = [h_true], [carried + dy.double()]
    if c_true is not None:
        outputs, cotangents = [h_true, c_true], [*cotangents, dc_next]
    of_a, of_b, around, dc_true = torch.autograd.grad(
        outputs, [a, b, h_start, c_start], cotangents, allow_unused=True, materialize_grads=True
    )
    want, got = {"da": torch.where(valid, of_a, 0)}, {"da": da}
    if db is not None:
        want["db"], got["db"] = torch.where(valid, of_b, 0), db
    assert_close(got, want, "lstm", dtype)
    assert relative_error(dh, torch.where(valid, around, carried)) < 4 * eps  # z was rounded to the dtype
    torch.testing.assert_close(dh_reset, gathered[0])
    if cell.has_c:
        assert relative_error(dc, torch.where(valid, dc_true, dc_next)) < 4 * eps  # and f
        torch.testing.assert_close(dc_reset, gathered[1])
    for out in (gates, c, y, h, dh, dh_reset, da, db):
        if out is not None:
            beside = out.as_strided((B - 1, gap), out.stride(), out.storage_offset() + out.shape[1])
            assert beside.isnan().all(), "wrote beside its rows"


@triton.jit
def _functions_kernel(
    x,  # [N] fp32
    y,  # out [3, N] fp32
    N: tl.constexpr,
):
    n = tl.arange(0, N)
    value = tl.load(x + n)
    tl.store(y + n, sigmoid(value))
    tl.store(y + N + n, tanh(value))
    tl.store(y + 2 * N + n, tanh_absolute(value))


def test_elementwise_functions() -> None:
    powers = torch.logspace(-30, 2, 2045, base=10.0)
    x = torch.cat([powers, -powers, torch.tensor([0.0, 0.5, -0.5, torch.inf, -torch.inf, torch.nan])]).to(DEVICE)
    y = x.new_empty(3, x.numel())
    _functions_kernel[1,](x, y, x.numel())
    truth = torch.stack([x.double().sigmoid(), x.double().tanh(), x.double().tanh()])
    assert y[:, -1].isnan().all()
    error = (y.double() - truth)[:, :-1].abs()
    # On a GPU exp is 2 ulp off and its argument rounded: exp(-88) has an error of 88 eps / 2.
    normal_range = truth[:2, :-1].abs() > torch.finfo(torch.float32).tiny
    assert (error[1] <= 4 * torch.finfo(torch.float32).eps * truth[1, :-1].abs())[normal_range[1]].all()
    assert (error[0] <= 64 * torch.finfo(torch.float32).eps * truth[0, :-1])[normal_range[0]].all()
    assert (error[0] <= 2e-7).all() and (error[2] <= 2e-7).all()


def test_names_the_reason_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    call = Call("attention_pool", "cpu", torch.float32, 2, 3, 4, 0)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in str(BACKEND.unsupported(call))
    if not torch.cuda.is_available():
        assert "TRITON_INTERPRET=1" in str(BACKEND.unavailable())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert BACKEND.unavailable() is None and BACKEND.unsupported(call) is None
    wide = Call("attention_pool", "cpu", torch.float32, 2, 3, WIDEST + 1, 0)
    assert "D=8193" in str(BACKEND.unsupported(wide))
    double_call = Call("lstm", "cpu", torch.float64, 2, 3, 4, 5)
    assert "float64" in str(BACKEND.unsupported(double_call))
