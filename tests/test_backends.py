"""Which backend runs, and what is said about it."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from cases import backend_parameters, device_of

import rnnattn
from rnnattn import backends
from rnnattn.backends import BackendError, Call
from rnnattn.backends.base import Backend

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter, with none of rnnattn's variables but those given."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RNNATTN_")}
    return subprocess.run(
        [sys.executable, "-c", code], env=inherited | environment, capture_output=True, text=True, timeout=300
    )


def lstm() -> Any:
    return rnnattn.LSTM(3, 4)(torch.ones(2, 1, 3))


def gru() -> Any:
    return rnnattn.GRU(3, 4)(torch.ones(2, 1, 3))


def rnn() -> Any:
    return rnnattn.RNN(3, 4)(torch.ones(2, 1, 3))


def pool() -> Any:
    return rnnattn.AttentionPool(3)(torch.ones(1, 2, 3))


@pytest.fixture
def only_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other backend is out of order, nothing is required, nothing was warned about."""
    monkeypatch.setattr(backends, "_required", [])
    monkeypatch.setattr(backends, "_warned", set())
    for name, backend in backends.BACKENDS.items():
        if name != "reference":
            monkeypatch.setattr(backend, "unavailable", lambda name=name: f"{name} is out of order")


# --- choosing by hand ---------------------------------------------------------------------------


def test_use_backend_sets_and_restores() -> None:
    assert backends.selected() == "auto"
    with rnnattn.use_backend("reference"):
        assert backends.selected() == "reference"
        with rnnattn.use_backend("torch"):
            assert backends.selected() == "torch"
        assert backends.selected() == "reference"
    assert backends.selected() == "auto"
    with pytest.raises(KeyError), rnnattn.use_backend("reference"):
        raise KeyError
    assert backends.selected() == "auto"
    rnnattn.use_backend("reference")
    assert backends.selected() == "reference"


@pytest.mark.parametrize("name", backend_parameters("reference", "cpp", "triton", "cuda", "torch"))
def test_what_is_asked_for_runs(name: str) -> None:
    device = device_of(name)
    model = rnnattn.SequenceClassifier(2, 4, 3).to(device)
    with rnnattn.use_backend(name):
        explanation = rnnattn.explain(model, torch.ones(1, 2, 3, device=device))
    assert [decision.call.op for decision in explanation] == ["lstm", "attention_pool"]
    assert {decision.backend for decision in explanation} == {name}
    assert {decision.reason for decision in explanation} == {"asked for by name"}


def test_the_adapter_that_is_named_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    forward = backends.get("reference").recurrent_layer_forward
    monkeypatch.setattr(
        backends.get("reference"), "recurrent_layer_forward", lambda *a: ran.append(a[-2]) or forward(*a)
    )
    with rnnattn.use_backend("reference"):
        for run in (lstm, gru, rnn):
            run()
    assert ran == ["LSTM", "GRU", "RNN_TANH"]


@pytest.mark.parametrize("name", ["cpp", "triton", "cuda", "torch"])
@pytest.mark.parametrize("run", [lstm, gru, rnn, pool])
def test_what_is_asked_for_never_falls_back(name: str, run: Any, only_reference: None) -> None:
    with (
        rnnattn.use_backend(name),
        pytest.raises(BackendError, match=f"backend '{name}' was asked for and cannot run .*{name} is out of order"),
    ):
        run()


def test_a_call_that_the_backend_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.get("cpp"), "unavailable", lambda: None)
    monkeypatch.setattr(backends.get("cpp"), "unsupported", lambda call: f"no {call.dtype} here")
    with rnnattn.use_backend("cpp"), pytest.raises(BackendError, match=r"cannot run lstm: no torch\.float32 here"):
        lstm()
    with rnnattn.use_backend("torch"), pytest.raises(BackendError, match="empty batch"):
        rnnattn.LSTM(3, 4)(torch.ones(2, 0, 3))
    assert isinstance(BackendError(), RuntimeError)


def test_the_environment_chooses() -> None:
    code = "import rnnattn; print(rnnattn.backends.selected())"
    assert python(code).stdout.split() == ["auto"]
    assert python(code, RNNATTN_BACKEND="reference").stdout.split() == ["reference"]
    wrong = python(code, RNNATTN_BACKEND="fast")
    assert wrong.returncode != 0
    names = "auto, reference, cpp, triton, cuda, torch"
    assert f"ValueError: RNNATTN_BACKEND: expected one of {names}, got 'fast'" in wrong.stderr


def test_the_environment_requires() -> None:
    code = "import torch, rnnattn; rnnattn.LSTM(3, 4)(torch.ones(2, 1, 3)); print('ran')"
    assert python(code, RNNATTN_REQUIRE="reference,torch").stdout.split() == ["ran"]
    absent = "import sys; sys.modules['rnnattn._C'] = None; " + code
    missing = python(absent, RNNATTN_REQUIRE="reference,cpp")
    assert "BackendError: RNNATTN_REQUIRE names backend 'cpp', which cannot run: the compiled ext" in missing.stderr
    wrong = python(code, RNNATTN_REQUIRE="cp")
    assert "RNNATTN_REQUIRE: expected one of" in wrong.stderr and "got 'cp'" in wrong.stderr


# --- choosing by itself ---------------------------------------------------------------------------


def test_auto_warns_once_for_each_operation(only_reference: None) -> None:
    with pytest.warns(UserWarning, match="rnnattn: lstm on cpu falls back to the reference.*cpp is out of order"):
        lstm()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lstm()
    with pytest.warns(UserWarning, match="rnnattn: gru on cpu falls back to the reference.*cpp is out of order"):
        gru()
    with pytest.warns(UserWarning, match="attention_pool on cpu falls back .*cpp is out of order"):
        pool()


def test_auto_says_what_it_passed_over(only_reference: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (decision,) = rnnattn.explain(rnnattn.LSTM(3, 4), torch.ones(2, 1, 3))
    assert decision.backend == "reference"
    assert "not cpp: cpp is out of order" in decision.reason
    assert decision.others["cpp"] == "cpp is out of order"


def test_the_reference_is_not_announced_when_asked_for(only_reference: None) -> None:
    with rnnattn.use_backend("reference"), warnings.catch_warnings():
        warnings.simplefilter("error")
        for run in (lstm, gru, rnn, pool):
            run()


OPS = ("lstm", "gru", "rnn", "attention_pool")
CALLS = [
    Call("lstm", "cpu", BF16, 16, 64, 256, H, layers, K, 0, ragged, grad=True)
    for H, layers, K, ragged in itertools.product((1024, 1536, 4096), (1, 2), (1, 2), (False, True))
]


@pytest.mark.parametrize("call", CALLS, ids=lambda c: f"H{c.hidden}-L{c.layers}-K{c.directions}-{c.ragged}")
def test_wrong_gradients_are_never_chosen(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's bf16 training on a CPU from H = 1024 up, however much faster, and even with nothing else built."""
    assert backends.select(call).backend != "torch"
    monkeypatch.setattr(backends, "_required", [])
    monkeypatch.setattr(backends.get("cpp"), "unavailable", lambda: "not built")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert backends.select(call).backend == "reference"


@pytest.mark.parametrize(
    ("units", "isa", "dtype", "first"),
    [
        ({"amx_bf16", "avx512_bf16"}, "amx", torch.bfloat16, "cpp"),
        ({"amx_bf16", "avx512_bf16"}, "avx512_bf16", torch.bfloat16, "torch"),  # built by a compiler without AMX
        ({"avx512_bf16"}, "avx512_bf16", torch.bfloat16, "cpp"),
        ({"avx512_bf16"}, "avx512", torch.bfloat16, "torch"),
        (set(), "avx512", torch.bfloat16, "cpp"),
        ({"avx512_fp16"}, "amx", torch.float16, "cpp"),
        ({"amx_fp16", "avx512_fp16"}, "amx", torch.float16, "torch"),
        ({"amx_bf16", "amx_fp16"}, "avx512", torch.float32, "cpp"),
    ],
)
def test_torch_runs_what_it_alone_has_instructions_for(
    units: set[str], isa: str, dtype: torch.dtype, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends.choice, "_capabilities", lambda: dict.fromkeys(units, True))
    monkeypatch.setattr(backends.choice, "_our_isa", lambda: isa)
    call = Call("lstm", "cpu", dtype, 4, 8, 16, 16)
    assert backends.choice.order(call)[0][0] == first
    for change in ({"ragged": True}, {"projection": 8}, {"op": "gru"}):
        assert backends.choice.order(dataclasses.replace(call, **change))[0][0] == "cpp"


@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu"])
@pytest.mark.parametrize("op", OPS)
def test_the_order_ends_with_what_runs_everywhere(op: str, device: str) -> None:
    for dtype, *flags in itertools.product((F64, F32, BF16), *[(False, True)] * 3):
        call = Call(op, device, dtype, 4, 8, 16, 16, **dict(zip(("ragged", "grad", "compiling"), flags, strict=True)))
        names = [name for name, _ in backends.choice.order(call)]
        assert "reference" in names and len(set(names)) == len(names) and set(names) <= set(backends.BACKENDS)
        assert all(reason for _, reason in backends.choice.order(call))
        assert backends.get("reference").unsupported(call) is None


@pytest.mark.parametrize("op", ["lstm", "gru", "rnn"])
def test_the_size_of_a_recurrent_call_makes_no_difference_on_a_cpu(op: str) -> None:
    """`stack.takes_cpp` relies on it."""
    for dtype, grad, hidden in itertools.product((F64, F32, BF16), (False, True), (16, 1024)):
        calls = [Call(op, "cpu", dtype, B, T, 16, hidden, grad=grad) for B in (1, 300) for T in (1, 300)]
        assert len({tuple(backends.choice.order(call)) for call in calls}) == 1
        assert len({backends.objection("cpp", call) for call in calls}) == 1


def test_every_backend_answers_every_question() -> None:
    calls = itertools.product(OPS, (F64, F32, BF16), ("cpu", "cuda", "xpu"))
    for backend, (op, dtype, device) in itertools.product(backends.BACKENDS.values(), calls):
        call = Call(op, device, dtype, 4, 8, 16, 16)
        assert isinstance(backend, Backend)
        for answer in (backend.unavailable(), backend.unsupported(call)):
            assert answer is None or (isinstance(answer, str) and len(answer) > 10)
        if backend.unavailable() is None:
            assert backend.kernel(call)


@pytest.mark.parametrize("name, device", [("cpp", "cuda"), ("triton", "xpu"), ("cuda", "cpu")])
def test_devices_are_refused_by_name(name: str, device: str) -> None:
    reason = backends.get(name).unsupported(Call("lstm", device, F32, 1, 1, 1, 1))
    assert reason is not None and device in reason


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_every_cell_has_gpu_kernels(name: str) -> None:
    for op, resets in itertools.product(("lstm", "gru", "rnn"), (False, True)):
        assert backends.get(name).unsupported(Call(op, "cuda", F32, 4, 8, 16, 16, resets=resets)) is None


@pytest.mark.parametrize("op", ["gru", "rnn"])
def test_a_gru_on_a_cpu_runs_on_cpp_then_torch_then_the_reference(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Call(op, "cpu", F32, 4, 8, 16, 16, grad=True)
    monkeypatch.setattr(backends, "_required", [])
    monkeypatch.setattr(backends, "_warned", {op})
    monkeypatch.setattr(backends.get("cpp"), "unavailable", lambda: None)
    assert backends.select(call).backend == "cpp"
    monkeypatch.setattr(backends.get("cpp"), "unavailable", lambda: "not built")
    assert backends.select(call).backend == "torch"
    for unsuited in ({"compiling": True}, {"B": 0}):
        assert backends.select(dataclasses.replace(call, **unsuited)).backend == "reference"


def test_torchs_kernels_on_a_cpu() -> None:
    """aten/src/ATen/native/RNN.cpp: use_mkldnn is asked for a padded LSTM without projection, in these dtypes."""
    plain = Call("lstm", "cpu", F32, 4, 8, 16, 16)
    steps = "ATen {} (a GEMM and pointwise kernels per step)".format
    assert backends.TORCH.kernel(plain) == "oneDNN LSTM"
    for other in ({"dtype": F64}, {"projection": 3}, {"ragged": True}):
        assert backends.TORCH.kernel(dataclasses.replace(plain, **other)) == steps("LSTM")
    for op in ("gru", "rnn"):
        assert backends.TORCH.kernel(dataclasses.replace(plain, op=op)) == steps(op.upper())
    with torch.backends.mkldnn.flags(enabled=False):
        assert backends.TORCH.kernel(plain) == steps("LSTM")


SMALL, STATIC, STANDARD = "cuDNN PERSIST_STATIC_SMALL_H", "cuDNN PERSIST_STATIC", "cuDNN STANDARD"


@pytest.mark.parametrize(
    "op, settings, branch",
    [
        ("lstm", {"hidden": 192}, SMALL),
        ("gru", {"hidden": 192}, SMALL),
        ("gru", {"hidden": 193}, STANDARD),
        ("gru", {"hidden": 192, "grad": True}, STANDARD),
        ("gru", {"hidden": 128, "grad": True}, SMALL),
        ("rnn", {"hidden": 384}, SMALL),
        ("rnn", {"hidden": 385}, STANDARD),
        ("rnn", {"hidden": 256, "grad": True}, SMALL),
        ("rnn", {"hidden": 257, "grad": True}, STANDARD),
        ("gru", {"hidden": 64, "dtype": F64}, STANDARD),
        ("rnn", {"hidden": 64, "ragged": True}, STANDARD),
        ("lstm", {"hidden": 512, "dtype": torch.float16}, STATIC),
        ("gru", {"hidden": 512, "dtype": torch.float16}, STANDARD),
        ("rnn", {"hidden": 512, "dtype": torch.float16}, STATIC),
        ("rnn", {"hidden": 896, "dtype": torch.float16, "B": 96}, STANDARD),
        ("lstm", {"hidden": 896, "dtype": torch.float16, "B": 96}, STATIC),
        ("rnn", {"hidden": 896, "dtype": torch.float16, "B": 88}, STATIC),
        ("rnn", {"hidden": 512, "dtype": BF16}, STANDARD),
    ],
    ids=str,
)
def test_cudnns_algorithm(op: str, settings: dict[str, Any], branch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The branches of get_algo (aten/src/ATen/native/cudnn/RNN.cpp), as on an H100."""
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    call = dataclasses.replace(Call(op, "cuda", F32, 16, 32, 128, 64), **settings)
    assert backends.TORCH.kernel(call) == branch


# --- telling --------------------------------------------------------------------------------------


def test_explain_tells_backend_kernel_and_reason() -> None:
    model = torch.nn.Sequential(rnnattn.LSTM(3, 4, 2, bidirectional=True))
    with rnnattn.use_backend("reference"):
        explanation = rnnattn.explain(model, torch.ones(2, 1, 3))
    (decision,) = explanation
    c = decision.call
    assert (c.op, c.device, c.dtype, c.B, c.T, c.features, c.hidden) == ("lstm", "cpu", F32, 1, 2, 3, 4)
    assert (c.layers, c.directions, c.projection, c.ragged, c.grad) == (2, 2, 0, False, True)
    assert str(explanation).splitlines()[:2] == [
        "lstm float32 on cpu, B=1 T=2: reference (plain PyTorch equations, one Python step per time step)",
        "  because asked for by name",
    ]
    assert set(decision.others) == set(backends.BACKENDS) - {"reference"}
    assert all(f"  {name}: {why}" in str(explanation) for name, why in decision.others.items())


@pytest.mark.parametrize("module, op", [(rnnattn.GRU, "gru"), (rnnattn.RNN, "rnn")])
def test_explain_names_the_cell(module: type[torch.nn.Module], op: str) -> None:
    with rnnattn.use_backend("torch"):
        (decision,) = rnnattn.explain(module(3, 4, bidirectional=True), torch.ones(2, 1, 3), lengths=[1])
    c = decision.call
    assert (c.op, c.features, c.hidden, c.directions, c.projection, c.ragged) == (op, 3, 4, 2, 0, True)
    assert c.recurrent and decision.kernel == f"ATen {op.upper()} (a GEMM and pointwise kernels per step)"
    assert decision.others["cuda"] != "could run it"
    with rnnattn.use_backend("reference"):
        (step,) = rnnattn.explain(getattr(rnnattn, module.__name__ + "Cell")(3, 4), torch.ones(2, 3))
    assert (step.call.op, step.call.B, step.call.T) == (op, 2, 1)


def test_explain_follows_the_call() -> None:
    lstm, x = rnnattn.LSTM(3, 4, proj_size=2), torch.ones(2, 1, 3)
    with torch.no_grad():
        (plain,), (ragged,) = rnnattn.explain(lstm, x), rnnattn.explain(lstm, x, lengths=[1])
    assert (plain.call.ragged, ragged.call.ragged) == (False, True)
    assert not plain.call.grad and plain.call.projection == 2
    (pooling,) = rnnattn.explain(rnnattn.AttentionPool(3, "additive", 5), x, mask=torch.ones(2, 1, dtype=torch.bool))
    assert (pooling.call.op, pooling.call.features, pooling.call.hidden) == ("attention_pool", 3, 5)
    assert pooling.call.ragged and pooling.call.grad
    assert str(rnnattn.explain(torch.nn.Linear(3, 2), x)) == "no rnnattn operation ran"


def test_explain_raises_what_the_call_raises(only_reference: None) -> None:
    with rnnattn.use_backend("cpp"), pytest.raises(BackendError, match="cpp is out of order"):
        rnnattn.explain(rnnattn.LSTM(3, 4), torch.ones(2, 1, 3))


def test_show_config() -> None:
    with rnnattn.use_backend("torch"):
        lines = rnnattn.show_config().splitlines()
    assert lines[0].startswith(f"rnnattn {rnnattn.__version__}, torch {torch.__version__}, Python 3.")
    assert lines[2] == "backend torch"
    for name in backends.BACKENDS:
        reason = backends.unavailable(name)
        assert f"  {name:<10} {'usable' if reason is None else 'not usable: ' + reason}" in lines
    if backends.unavailable("cpp") is None:
        assert any(line.split()[:1] == ["isa"] for line in lines)


def test_without_the_compiled_extension() -> None:
    """A pure-Python install computes on what there is, and tells how to get the kernels."""
    code = """
import sys
sys.modules["rnnattn._C"] = None
import torch, rnnattn
torch.manual_seed(0)
model = rnnattn.SequenceClassifier(3, 4, 5)
logits = model(torch.ones(2, 6, 5), lengths=[6, 2])
logits.sum().backward()
assert all(p.grad.isfinite().all() for p in model.parameters())
print(rnnattn.show_config())
print(rnnattn.explain(model.pool, torch.ones(2, 6, 8), lengths=[6, 2]))
with rnnattn.use_backend("reference"):
    torch.testing.assert_close(model(torch.ones(2, 6, 5), lengths=[6, 2]), logits)
rnnattn.use_backend("cpp")
model(torch.ones(2, 6, 5))
"""
    done = python(code)
    assert "cpp        not usable: the compiled extension rnnattn._C is not usable" in done.stdout
    assert "attention_pool float32 on cpu, B=2 T=6: reference" in done.stdout
    assert done.stderr.count("attention_pool on cpu falls back to the reference equations") == 1
    assert "pip install --no-build-isolation --no-deps" in done.stderr
    assert "BackendError: backend 'cpp' was asked for and cannot run lstm" in done.stderr.splitlines()[-1]
