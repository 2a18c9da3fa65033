"""What the benchmarks do on a GPU, as far as that shows without one: suites, rows, room, peers, compilation."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from benchmark_rows import CPU, ROW, measured
from torch import Tensor, nn

from benchmarks import cases, ceilings, cli, compiling, gpu_peers, measure, recurrent, report, results, room, timing
from benchmarks.cases import BACKWARD, FORWARD, MODES, PoolCase, RecurrentCase
from benchmarks.experiments import switches
from benchmarks.render import section
from rnnattn.backends import Call
from rnnattn.backends.aten import cudnn_branch

pytest.importorskip("rich")
ROOT = Path(__file__).resolve().parent.parent
CORE = cases.SUITES["gpu"]
LAYERS = [case for case in CORE if isinstance(case, RecurrentCase)]


def test_core_suite_is_small_and_covers_what_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sum(len(case.modes) for case in CORE) <= 60
    assert {case.H for case in LAYERS} == {128, 256, 512, 768, 1024, 1536}
    assert {case.B for case in LAYERS} == {1, 16, 64, 128}
    assert {case.T for case in LAYERS} == {512, 1024}
    assert {case.dtype for case in LAYERS} == {"fp16", "bf16", "fp32"}
    assert {case.op for case in LAYERS} == {"lstm", "gru", "rnn"}
    assert any(case.layers > 1 for case in LAYERS) and any(case.bidirectional for case in LAYERS)
    assert {case.dtype for case in LAYERS if case.ragged} == {"bf16", "fp32"}
    assert RecurrentCase(16, 1024, 768, 768, dtype="fp16") in CORE
    assert {case.score for case in CORE if isinstance(case, PoolCase)} == {"linear", "additive"}
    region = [case for case in LAYERS if case.dtype != "fp16" and 256 <= case.H <= 1024 and case.B <= 64]
    assert len(region) > len(LAYERS) / 2

    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "enabled", True)
    branches = {cudnn_branch(_call(case, mode)) for case in LAYERS for mode in MODES}
    assert branches == {f"cuDNN {branch}" for branch in ("PERSIST_STATIC_SMALL_H", "PERSIST_STATIC", "STANDARD")}


def _call(case: RecurrentCase, mode: str) -> Call:
    return Call(
        case.op, "cuda", cases.DTYPES[case.dtype], case.B, case.T, case.I, case.H, case.layers,
        2 if case.bidirectional else 1, ragged=case.ragged, grad=mode == BACKWARD,
    )  # fmt: skip


def test_full_suite_begins_with_the_core_and_goes_beyond_it() -> None:
    full = cases.SUITES["gpu-full"]
    assert full[: len(CORE)] == CORE
    layers = [case for case in full if isinstance(case, RecurrentCase)]
    assert {64, 650, 2048} <= {case.H for case in layers}
    assert 256 in {case.B for case in layers} and 128 in {case.T for case in layers}
    assert {case.true_fp32 for case in layers if case.dtype == "fp32"} == {True, False}


def test_true_fp32_is_switched_on_for_its_cases_alone() -> None:
    rnn: Any = torch.backends.cudnn.rnn
    before = rnn.fp32_precision
    with switches(RecurrentCase(1, 2, 3, 4, true_fp32=True)):
        assert rnn.fp32_precision == "ieee"
    with switches(RecurrentCase(1, 2, 3, 4)):
        assert rnn.fp32_precision == before
    assert rnn.fp32_precision == before
    assert cases.name(RecurrentCase(1, 2, 3, 4, true_fp32=True)) == "lstm/B1-T2-I3-H4-ieee-fp32"


@pytest.mark.parametrize("suite", cases.GPU_SUITES)
def test_suites_are_listed_without_a_gpu_and_run_only_with_one(suite: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--suite", suite, "--list", "--op", "gru", "--filter", "H512"]) == 0
    assert "gru/B16-T512-I512-H512-bf16" in capsys.readouterr().out.splitlines()
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="no CUDA device"):
            cli.main(["--suite", suite])


def test_rows_tell_the_time_of_a_step_in_a_forward_pass_only() -> None:
    case = RecurrentCase(2, 6, 3, 4, layers=2, bidirectional=True)
    time = timing.Timing((2.4, 2.4, 2.4))
    assert measure._step_us(case, FORWARD, time) == pytest.approx(200)  # 2.4 ms over 6 steps of 2 layers
    assert measure._step_us(case, BACKWARD, time) is None
    ours = measure._Entry("triton", "triton", "T1", None, model_step_us=1.5)
    peer = measure._Entry("torch.nn.LSTM", "", "cuDNN STANDARD", None)
    rows = [measure._row(case, mode, ours, time, peer, None, peer) for mode in MODES]
    assert [(row.step_us, row.model_step_us) for row in rows] == [(pytest.approx(200), 1.5), (None, None)]


def test_rows_of_pooling_tell_the_bandwidth_of_x() -> None:
    case = PoolCase(4, 20, 8, dtype="bf16")
    assert case.traffic(FORWARD) == 4 * 20 * 8 * 2
    assert case.traffic(BACKWARD) == 3 * 4 * 20 * 8 * 2  # x read twice, dx written
    valid = int(cases.ragged_lengths(4, 20).sum())
    assert replace(case, ragged=True).traffic(FORWARD) == valid * 8 * 2
    assert measure._bandwidth(case, FORWARD, timing.Timing((1e-3,) * 3)) == pytest.approx(1.28)  # GB/s
    assert measure._bandwidth(RecurrentCase(1, 2, 3, 4), FORWARD, timing.Timing((1.0,) * 3)) is None


def test_bandwidth_of_a_copy_counts_bytes_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "COPIED_BYTES", 1000)
    monkeypatch.setattr(ceilings, "_best_seconds", lambda run: run() or 1e-6)
    found = ceilings.measure_copy(CPU)
    assert found == ceilings.Ceilings(copy=pytest.approx(16.0)) and found.rate("fp32") is None


def test_new_columns_are_written_and_read_and_shown_where_there_are_values(tmp_path: Path) -> None:
    row = replace(ROW, step_us=2.5, model_step_us=1.25, gflops=None)
    path, table = results.write(measured(row), tmp_path)
    assert results.read(path).rows == [row]
    assert "step_us" in table.read_text().splitlines()[0]
    columns = [column.header for column in report._table("lstm", [row, ROW]).columns]
    assert "us a step" in columns and "model's" in columns and "GB/s" not in columns
    columns = [column.header for column in report._table("lstm", [ROW]).columns]
    assert "us a step" not in columns and "GFLOP/s" in columns


def test_older_files_load_render_and_merge(tmp_path: Path) -> None:
    added = {"step_us", "model_step_us", "bandwidth", "baseline_bandwidth"}
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    assert files
    for file in files:
        old = results.read(file)
        assert section([old], [[]])
        both = results.merged(old, measured(replace(ROW, step_us=1.0)))
        assert results.read(results.write(both, tmp_path)[0]) == both
    without = json.loads(results.write(measured(ROW), tmp_path)[0].read_text())
    for row in without["rows"]:
        for name in added:
            del row[name]
    for run in without["runs"]:
        del run["ceilings"]["copy"], run["environment"]["torchrl"], run["environment"]["flashrnn"]
    (tmp_path / "old.json").write_text(json.dumps(without))
    assert results.read(tmp_path / "old.json").rows == [ROW]


def test_room_is_estimated_before_a_case_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = RecurrentCase(16, 512, 512, 512), RecurrentCase(256, 1024, 2048, 2048)
    kept = 256 * 1024 * 2048 * (4 + 2) * 8  # gates, c and y of the truth
    assert 2 * kept < room.bytes_needed(large) < 8 * kept
    assert room.bytes_needed(replace(small, layers=2)) > 1.5 * room.bytes_needed(small)
    assert room.bytes_needed(PoolCase(128, 2048, 1024, A=128)) > 2 * 128 * 2048 * 1024 * 8
    assert all(room.bytes_needed(case) < 80e9 for case in CORE)
    assert room.objection(small, 60 * 10**9) == "" and "60 GB free" in room.objection(large, 60 * 10**9)

    monkeypatch.setattr(room, "bytes_free", lambda device: 1000)
    device: Any = SimpleNamespace(type="cuda")
    rows = [row for _, found in cli._rows(small, [], device, 0.0) for row in found]
    assert [row.mode for row in rows] == list(MODES)
    assert all(row.note.startswith(results.NO_ROOM) and not row.counts and not row.failed for row in rows)
    text = section([measured(*rows)], [[]])
    assert f"left out of these means: {results.NO_ROOM} (2)." in text  # the figures apart


def test_a_case_that_fails_leaves_rows_and_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(case: object, device: object) -> None:
        raise errors[-1]

    errors: list[RuntimeError] = []
    monkeypatch.setattr(room, "bytes_free", lambda device: 10**12)
    monkeypatch.setattr(cli, "experiment", fails)
    device: Any = SimpleNamespace(type="cuda")
    for error, failed in ((torch.OutOfMemoryError("CUDA out of memory"), False), (RuntimeError("cuDNN error"), True)):
        errors.append(error)
        rows = [row for _, found in cli._rows(LAYERS[0], [], device, 0.0) for row in found]
        assert [row.failed for row in rows] == [failed] * 2
    with pytest.raises(RuntimeError):
        list(cli._rows(LAYERS[0], [], CPU, 0.0))


def test_peers_that_are_not_installed_sit_out(monkeypatch: pytest.MonkeyPatch) -> None:
    case = RecurrentCase(2, 3, 4, 5)
    monkeypatch.setattr(gpu_peers, "missing", lambda: list(gpu_peers.PACKAGES))
    assert gpu_peers.sequence_peers(case, nn.LSTM(4, 5), torch.zeros(3, 2, 4)) == []
    lines = cli._left_out([case], torch.device("cuda"))
    assert lines == [
        f"{package} is left out: pip install rnnattn[bench-gpu-peers] for it" for package in ("torchrl", "flashrnn")
    ]
    assert cli._left_out([PoolCase(1, 2, 3)], torch.device("cuda")) == []


def test_peers_sit_out_what_they_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_peers, "missing", lambda: [])

    def names(**changes: Any) -> list[str]:
        found = gpu_peers.sequence_peers(
            replace(RecurrentCase(2, 3, 4, 128), **changes), nn.LSTM(4, 128), torch.empty(0)
        )
        return [f"{peer.name} {peer.kernel()}" for peer in found]

    assert names() == ["torchrl Triton", "FlashRNN cuda_fused", "FlashRNN cuda"]
    assert names(H=64)[-1] == "FlashRNN triton_fused"
    assert names(dtype="bf16") == ["FlashRNN cuda_fused", "FlashRNN cuda"]
    assert names(op="gru") == ["torchrl Triton"]
    assert names(op="rnn") == names(ragged=True) == names(bidirectional=True) == []


def _flashrnn(Wx: Tensor, R: Tensor, b: Tensor, function: str, backend: str, dtype: str) -> tuple[Tensor, Tensor]:
    """What FlashRNN documents: Wx [B, T, 4, N, D], R [4, N, D, D], b [4, N, D] -> states [2, B, T, N, D]."""
    h = c = Wx.new_zeros(*Wx.shape[:1], *Wx.shape[3:])
    states = []
    for gates in Wx.unbind(1):
        i, f, g, o = (gates + torch.einsum("gndp,bnp->bgnd", R, h) + b).unbind(1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        states.append(torch.stack([h, c]))
    return torch.stack(states, 2), states[-1][:, :, None]


def test_flashrnn_is_given_torchs_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashrnn", _module(flashrnn=_flashrnn))
    module, x = nn.LSTM(4, 5, 2), torch.randn(3, 2, 4, requires_grad=True)
    _assert_the_same(module, x, gpu_peers._flashrnn(module, x, "cuda"))


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_torchrl_is_given_torchs_parameters(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its module takes a torch.nn module that has the batch first, and a dictionary with x and is_init."""
    made: dict[str, Any] = {}

    def layer_of(**settings: Any) -> Any:
        made.update(settings)
        return lambda data: {"y": settings[kind.lower()](data["x"])[0]}

    monkeypatch.setitem(sys.modules, "torchrl", _module())
    monkeypatch.setitem(sys.modules, "torchrl.modules", _module(**{f"{kind}Module": layer_of}))
    monkeypatch.setitem(sys.modules, "tensordict", _module(TensorDict=lambda values, shape: values))
    module, x = getattr(nn, kind)(4, 5, 2), torch.randn(3, 2, 4, requires_grad=True)
    _assert_the_same(module, x, gpu_peers._torchrl(module, x))
    assert made["recurrent_backend"] == "triton" and made["default_recurrent_mode"]
    assert len(made["in_keys"]) == len(made["out_keys"]) == (3 if kind == "LSTM" else 2)


def _module(**members: Any) -> ModuleType:
    module = ModuleType("stand-in")
    vars(module).update(members)
    return module


def _assert_the_same(module: nn.RNNBase, x: Tensor, forward: Any) -> None:
    """Output and the gradients of x and of the module's own parameters."""
    y, dy = module(x)[0], torch.randn(*x.shape[:2], module.hidden_size)
    found = forward()
    torch.testing.assert_close(found, y)
    inputs = [x, *module.parameters()]
    torch.testing.assert_close(torch.autograd.grad(found, inputs, dy), torch.autograd.grad(y, inputs, dy))


def test_a_first_call_that_compiles_is_no_slow_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a contender runs twice before its seconds count, and its first call never does."""
    calls: list[float] = []

    def run() -> list[Tensor]:
        calls.append(30.0 if not calls else 0.001)
        clock[0] += calls[-1]
        return [torch.ones(1)]

    clock = [0.0]
    for module in (measure, timing):
        monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
        monkeypatch.setattr(module, "synchronize", lambda device: None)
    device: Any = SimpleNamespace(type="cuda")
    entry = measure._Entry("torch.compile", "", "", timing.Contender(run))
    checked = measure._checked(entry, [torch.ones(1).double()], device)
    assert checked.seconds == pytest.approx(0.001) and measure._left_out(checked, [checked]) is checked
    calls.clear()
    assert timing._estimate(timing.Contender(run), device) == pytest.approx(0.001)
    calls.clear()
    assert timing._estimate(timing.Contender(run), CPU) == pytest.approx(30.0)


def test_kernels_are_compiled_by_short_runs_of_every_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiling.shortened(RecurrentCase(16, 1024, 768, 768)) == RecurrentCase(16, compiling.STEPS, 768, 768)
    pool = PoolCase(2, 512, 8)
    assert compiling.shortened(pool) == pool
    case = RecurrentCase(2, 5, 3, 4)
    assert compiling.compile_case(case, CPU, ["reference"]) == []
    (failure,) = {text.partition(",")[2] for text in compiling.compile_case(case, CPU, ["cuda"])[:1]}
    assert failure == " forward: BackendError"
    ran: list[str] = []
    peer = measure.Peer("other", str, lambda: ran.append("other") or torch.zeros(5, 2, 4))
    made = recurrent.experiment(case, CPU)
    monkeypatch.setattr(compiling, "experiment", lambda case, device: replace(made, peers=[peer]))
    compiling.compile_case(case, CPU, [])
    assert ran == ["other"] * len(case.modes)
    monkeypatch.setattr(compiling, "experiment", lambda case, device: 1 / 0)
    assert compiling._compiled((case, "cpu", ())) == f"not compiled {cases.name(case)}: division by zero"


def test_compilation_alone_measures_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = ["--suite", "quick", "--filter", "lstm/B1-T64-I128-H128-fp32", "--backend", "auto"]
    assert cli.main([*case, "--compile", "1", "--compile-only", "--out", str(tmp_path)]) == 0
    assert "compiled lstm/B1-T64-I128-H128-fp32" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_kernels_are_compiled_in_processes_side_by_side() -> None:
    work = [RecurrentCase(2, 5, 3, 4), PoolCase(2, 5, 8)]
    lines = sorted(compiling.compile_all(work, CPU, ["reference"], workers=2))
    assert lines == ["compiled attention_pool/linear-B2-T5-D8-fp32", "compiled lstm/B2-T5-I3-H4-fp32"]
