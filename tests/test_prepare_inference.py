"""prepare_inference(): the results of the module, from weights that were packed once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BF16, F32, F64, moved, runs
from recurrent_cases import RECURRENT_CASES, RecurrentCase
from tolerances import assert_close, close, relative_error
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence

import rnnattn
from rnnattn import backends
from rnnattn.backends import cpp

reason = backends.unavailable("cpp")
pytestmark = pytest.mark.skipif(bool(reason), reason=f"backend cpp: {reason}")
I, H = 5, 6
KINDS = {"LSTM": rnnattn.LSTM, "GRU": rnnattn.GRU, "RNN_TANH": rnnattn.RNN, "RNN_RELU": rnnattn.RNN}
kinds = pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])


def each(state: Any) -> list[Tensor]:
    """The tensors of a state."""
    return [state] if isinstance(state, Tensor) else list(state)


def given(*tensors: Tensor) -> Any:
    """A state as the module takes it."""
    return tensors if len(tensors) > 1 else tensors[0]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


# --- results ---------------------------------------------------------------------------------------


def module_of(case: RecurrentCase, t: dict[str, Any], dtype: torch.dtype) -> Any:
    """The module of a case. Its parameters are the case's tensors, with their strides."""
    options: dict[str, Any] = {"num_layers": case.layers, "bias": case.bias, "bidirectional": case.directions == 2}
    if case.R:
        options["proj_size"] = case.R
    if case.mode.startswith("RNN"):
        options["nonlinearity"] = case.mode.split("_")[1].lower()
    module = KINDS[case.mode](case.I, case.H, batch_first=case.layout == "batch_first", dtype=dtype, **options)
    for name, w in zip(module._flat_weights_names, t["weights"], strict=True):
        setattr(module, name, nn.Parameter(w))
    return module


CASES = [case for case in RECURRENT_CASES if case.direction != "reverse" and not case.cells]


@pytest.mark.parametrize("backend, case, dtype", runs(CASES, names=("cpp",)))
def test_cases(backend: str, case: RecurrentCase, dtype: torch.dtype) -> None:
    t = case.tensors(dtype)
    states = given(*(t[name] for name in case.initial_of.values()))
    module = module_of(case, t, dtype)
    y, finals = module.prepare_inference()(t["x"], states, t["lengths"], t["resets"], case.to_initial)
    got = dict(zip(("y", *case.initial_of), (y, *each(finals)), strict=True))
    if case.layout == "batch_first":
        got["y"] = y.transpose(0, 1)
    want = case.run(moved(case.tensors(dtype, poisoned=False), F64), "reference", backward=False)
    assert_close(got, want, case.op, dtype)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "stack": {"num_layers": 2, "bidirectional": True, "bias": False},
}


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@kinds
def test_every_form_of_the_arguments(kind: str, options: dict[str, Any], with_state: bool) -> None:
    """Unbatched, packed, with and without lengths and states: beside the module."""
    module = getattr(rnnattn, kind)(I, H, dtype=F64, **options).eval()
    prepared = module.prepare_inference()
    B, T, LK = 3, 4, module.num_layers * (2 if module.bidirectional else 1)
    state = given(*(torch.randn(LK, B, H, dtype=F64) for _ in range(2 if kind == "LSTM" else 1)))
    hx = [state] if with_state else []
    x = torch.randn(*((B, T) if module.batch_first else (T, B)), I, dtype=F64)
    close(prepared(x, *hx), module(x, *hx))
    lengths = torch.tensor([2, 0, 4])
    close(prepared(x, *hx, lengths=lengths), module(x, *hx, lengths=lengths))
    resets = torch.rand(x.shape[:2]) < 0.5
    for to_initial in (False, True):
        episodes = {"resets": resets, "reset_to_initial": to_initial}
        close(prepared(x, *hx, **episodes), module(x, *hx, **episodes))
    one = given(*(s[:, 0] for s in each(state)))
    close(prepared(x[0], *([one] if hx else [])), module(x[0], *([one] if hx else [])))
    close(prepared(x[0], resets=resets[0]), module(x[0], resets=resets[0]))
    packed = pack_padded_sequence(x, torch.tensor([2, 1, 4])[: x.shape[0 if module.batch_first else 1]],
                                  batch_first=module.batch_first, enforce_sorted=False)  # fmt: skip
    close(list(prepared(packed, *hx)), list(module(packed, *hx)))
    if kind == "LSTM":
        close(prepared(x, list(state)), module(x, list(state)))


CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("LSTMCell", {}),
    "gru": ("GRUCell", {}),
    "rnn": ("RNNCell", {}),
    "relu": ("RNNCell", {"nonlinearity": "relu"}),
}


@pytest.mark.parametrize("batch", [(3,), (), (0,)], ids=["batched", "unbatched", "empty"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CELLS)
def test_cells(name: str, bias: bool, batch: tuple[int, ...]) -> None:
    kind, options = CELLS[name]
    cell = getattr(rnnattn, kind)(I, H, bias=bias, dtype=F64, **options)
    prepared = cell.prepare_inference()
    x = torch.randn(*batch, I, dtype=F64)
    hx = given(*(torch.randn(*batch, H, dtype=F64) for _ in range(2 if name == "lstm" else 1)))
    close(prepared(x, hx), cell(x, hx))
    close(prepared(x), cell(x))


@pytest.mark.parametrize("precision", ["float", "bfloat16", "int8"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@kinds
def test_twenty_calls_of_one_step_are_the_whole_sequence(kind: str, options: dict[str, Any], precision: str) -> None:
    options = options | {"bidirectional": False}
    prepared = getattr(rnnattn, kind)(I, 33, **options).eval().prepare_inference(precision)
    axis = 1 if options.get("batch_first") else 0
    x = torch.randn(2, 20, I) if axis else torch.randn(20, 2, I)
    with torch.inference_mode():
        state, outputs = None, []
        for step in x.split(1, axis):
            y, state = prepared(step, state)
            outputs.append(y)
    torch.testing.assert_close((torch.cat(outputs, axis), state), prepared(x), rtol=1e-5, atol=1e-6)


def test_streamed_cells_carry_their_state_in_16_bits() -> None:
    cell = rnnattn.GRUCell(I, H, dtype=BF16)
    prepared = cell.prepare_inference()
    h = wide = torch.zeros(2, H, dtype=BF16)
    for x in torch.randn(5, 2, I, dtype=BF16):
        h, wide = prepared(x, h), copy.deepcopy(cell).double()(x.double(), wide.double()).to(BF16)
    assert h.dtype == BF16
    torch.testing.assert_close(h, wide, rtol=0.02, atol=0.01)


def test_a_module_with_dropout_is_prepared_in_evaluation_mode() -> None:
    module = rnnattn.GRU(I, H, 2, dropout=0.9, dtype=F64)
    with pytest.raises(RuntimeError, match=r"expected evaluation mode.*training mode; call eval\(\) first"):
        module.prepare_inference()
    x = torch.randn(3, 2, I, dtype=F64)
    close(module.eval().prepare_inference()(x), module(x))
    close(rnnattn.GRU(I, H, dtype=F64).prepare_inference().training, False)


def test_a_compiled_model_calls_it() -> None:
    module = rnnattn.LSTM(I, H)
    prepared = module.prepare_inference()
    compiled = torch.compile(lambda x: prepared(x * 2)[0] * 2, backend="eager")
    x = torch.randn(3, 2, I)
    torch.testing.assert_close(compiled(x), module(x * 2)[0] * 2)
    module.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="weights changed"):
        compiled(x)


# --- precision -------------------------------------------------------------------------------------


def rounded(w: Tensor, precision: str) -> Tensor:
    """What the docstring of PreparedRecurrent says of a matrix."""
    if precision == "bfloat16":
        return w.to(BF16).to(F64)
    step = w.abs().amax(1, keepdim=True) / 127
    return (w / step).round().to(F64) * step.to(F64)


def noisy(w: Tensor, precision: str, draw: torch.Generator) -> Tensor:
    """w with the errors of a rounding, at random: a half of 2^-7 of the number, or of a step of its row."""
    uniform = torch.rand(w.shape, generator=draw, dtype=F64) * 2 - 1
    w = w.to(F64)
    return w + uniform * (w * 2**-8 if precision == "bfloat16" else w.abs().amax(1, keepdim=True) / 127 / 2)


def in_float64(module: Any, x: Tensor, change: Callable[[Tensor], Tensor] = lambda w: w) -> Tensor:
    """The outputs of the reference equations with the matrices changed."""
    wide = copy.deepcopy(module).double()
    for p, w in zip(wide.parameters(), module.parameters(), strict=True):
        p.copy_(change(w) if w.dim() == 2 else w)
    with rnnattn.use_backend("reference"):
        return wide(x.to(F64))[0]


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
@pytest.mark.parametrize("scale", [1, 4])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_error_of_the_precisions(kind: str, scale: int, precision: str) -> None:
    """That of the rounded matrices alone, which is no more than what random errors of the same size do."""
    module = getattr(rnnattn, kind)(256, 256)
    for p in module.parameters():
        p.mul_(scale if p.dim() == 2 else 1)
    x = torch.randn(100, 2, 256)
    y = module.prepare_inference(precision)(x)[0]
    exact = in_float64(module, x)
    op = kind.lower()
    assert_close({"y": y}, {"y": in_float64(module, x, lambda w: rounded(w, precision))}, op, F32)
    draw = torch.Generator().manual_seed(1)
    of_noise = [relative_error(in_float64(module, x, lambda w: noisy(w, precision, draw)), exact) for _ in range(3)]
    error = relative_error(y, exact)
    assert max(of_noise) / 4 < error < max(of_noise) * 1.1  # the draws differ by a few percent
    assert error < 0.01


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_biases_and_projections_are_not_rounded(precision: str) -> None:
    module = rnnattn.LSTM(I, 8, 2, proj_size=4, bidirectional=True)
    for name, p in module.named_parameters():
        if name.startswith(("weight_ih", "weight_hh")):
            p.copy_(p.sign() * 0.25)  # exact in both
    x = torch.randn(6, 3, I)
    y = module.prepare_inference(precision)(x)[0]
    assert_close({"y": y}, {"y": in_float64(module, x)}, "lstm", F32)


def test_rows_of_zeros_stay_zero_in_int8() -> None:
    module = rnnattn.RNN(I, H)
    module.weight_ih_l0.zero_()
    module.weight_hh_l0[::2] = 0
    x = torch.randn(4, 2, I)
    y = module.prepare_inference("int8")(x)[0]
    assert_close({"y": y}, {"y": in_float64(module, x, lambda w: rounded(w, "int8").nan_to_num())}, "rnn", F32)


# --- errors ----------------------------------------------------------------------------------------


def _calls(module: Any) -> dict[str, tuple[Any, ...]]:
    """Wrong calls of a recurrent module."""
    state = given(*(torch.zeros(1, 2, H) for _ in range(2 if module.mode == "LSTM" else 1)))

    def like(*shape: int, **options: Any) -> Any:
        return given(*(torch.zeros(*shape, **options) for _ in each(state)))

    x = torch.zeros(3, 2, I)
    packed = pack_padded_sequence(x, torch.tensor([3, 1]))
    return {
        "1D": (x[0, 0],),
        "4D": (x[None],),
        "features": (torch.zeros(3, 2, I + 1),),
        "features, with a state": (torch.zeros(3, 2, I + 1), state),
        "dtype": (x.double(),),
        "dtype, with a state": (x.double(), state),
        "dtype of the state": (x, like(1, 2, H, dtype=F64)),
        "integers": (x.int(),),
        "batch of the state": (x, like(1, 3, H)),
        "layers of the state": (x, like(2, 2, H)),
        "features of the state": (x, like(1, 2, H + 1)),
        "2D state": (x, like(1, H)),
        "3D state": (x[:, 0], state),
        "no steps": (x[:0],),
        "no steps, with a state": (x[:0], state),
        "lengths": (x, state, torch.tensor([4, 1])),
        "shape of lengths": (x, None, torch.tensor([1])),
        "lengths of a packed sequence": (packed, None, torch.tensor([1, 2])),
        "shape of resets": (x, None, None, torch.zeros(2, 3, dtype=torch.bool)),
        "dtype of resets": (x, state, None, torch.zeros(3, 2)),
        "resets of a packed sequence": (packed, None, None, torch.zeros(3, 2, dtype=torch.bool)),
        "device": (x.to("meta"),),
        "device of the state": (x, like(1, 2, H, device="meta")),
        "no tensor": (x.tolist(), state),
        "one state": (x, (torch.zeros(1, 2, H),)),
        "three states": (x, (torch.zeros(1, 2, H),) * 3),
    }


def _cell_calls(cell: Any) -> dict[str, tuple[Any, ...]]:
    state = given(*(torch.zeros(2, H) for _ in range(2 if isinstance(cell, rnnattn.LSTMCell) else 1)))

    def like(*shape: int, **options: Any) -> Any:
        return given(*(torch.zeros(*shape, **options) for _ in each(state)))

    x = torch.zeros(2, I)
    return {
        "3D": (x[None],),
        "features": (torch.zeros(2, I + 1), state),
        "dtype": (x.double(), state),
        "dtype of the state": (x, like(2, H, dtype=F64)),
        "3D state": (x, like(1, 2, H)),
        "batch of the state": (x, like(3, H)),
        "features of the state": (x, like(2, H + 1)),
        "device": (x.to("meta"),),
        "a tensor for two states": (x, torch.zeros(2, 2, H)),
        "one state": (x, (torch.zeros(2, H),)),
    }


def _outcome(module: Any, arguments: tuple[Any, ...]) -> tuple[type, str] | None:
    try:
        module(*arguments)
    except Exception as error:
        return type(error), str(error)
    return None


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_wrong_calls_raise_as_the_module_does(kind: str) -> None:
    module = getattr(rnnattn, kind)(I, H)
    prepared = module.prepare_inference()
    with rnnattn.use_backend("cpp"):
        for name, arguments in (_cell_calls if "Cell" in kind else _calls)(module).items():
            want = _outcome(module, arguments)
            assert want is not None, name
            assert _outcome(prepared, arguments) == want, name


@pytest.mark.parametrize("which", ["input", "state"])
@pytest.mark.parametrize("kind", ["LSTM", "GRUCell"])
def test_gradients_are_refused(kind: str, which: str) -> None:
    prepared = getattr(rnnattn, kind)(I, H).prepare_inference()
    shape = [1] if kind == "LSTM" else []
    x = torch.randn(*shape, 2, I, requires_grad=which == "input")
    h = torch.randn(*shape, 2, H, requires_grad=which == "state")
    hx = (h, h) if kind == "LSTM" else h
    with torch.enable_grad():
        with pytest.raises(RuntimeError, match="has no gradients, but an input requires grad"):
            prepared(x, hx)
        with torch.no_grad():
            expected = prepared(x, hx)
        close(prepared(x.detach(), (h.detach(), h.detach()) if kind == "LSTM" else h.detach()), expected)
    with torch.inference_mode():
        carried = prepared(x, hx)
    close(prepared(x, carried[1] if kind == "LSTM" else carried), prepared(x, copy_of(carried, kind)))


def copy_of(carried: Any, kind: str) -> Any:
    """The carried state as tensors of no inference."""
    return given(*(s.clone() for s in each(carried[1] if kind == "LSTM" else carried)))


def test_conversions_and_training_are_refused() -> None:
    prepared = rnnattn.LSTM(I, H).prepare_inference()
    assert prepared.eval() is prepared and prepared.to("cpu") is prepared and prepared.float() is prepared
    for convert in (prepared.half, prepared.double, lambda: prepared.to("meta"), lambda: prepared.to(BF16)):
        with pytest.raises(RuntimeError, match=r"expected to stay in torch.float32 on cpu, got .*again"):
            convert()
    for train in (prepared.train, lambda: nn.Sequential(prepared).train()):
        with pytest.raises(RuntimeError, match="cannot train"):
            train()
    prepared(torch.randn(3, 2, I))


@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
def test_what_cannot_be_prepared(kind: str) -> None:
    make = getattr(rnnattn, kind)
    for precision in ("int4", "fp16", None):
        with pytest.raises(ValueError, match="precision: expected one of float, bfloat16, int8, got"):
            make(I, H).prepare_inference(precision)
    for precision in ("bfloat16", "int8"):
        with pytest.raises(ValueError, match=f"precision: expected 'float' for float64 weights, got '{precision}'"):
            make(I, H, dtype=F64).prepare_inference(precision)
    with pytest.raises(RuntimeError, match=r"expected the weights on cpu, got weight_ih(_l0)? on meta"):
        make(I, H, device="meta").prepare_inference()
    name = "weight_hh_l0" if kind == "LSTM" else "weight_hh"
    computed = parametrizations.weight_norm(make(I, H), name)
    with pytest.raises(TypeError, match=f"expected {name} to be a parameter of the module.*remove_parametrizations"):
        computed.prepare_inference()


def test_a_missing_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp, "extension_error", lambda: "the compiled extension is not usable")
    cpp.native.cache_clear()
    with pytest.raises(rnnattn.BackendError, match="the compiled extension is not usable"):
        rnnattn.LSTM(I, H).prepare_inference()
    cpp.native.cache_clear()
