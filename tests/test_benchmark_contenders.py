"""What the benchmarks time computes the same thing on all sides."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from benchmark_rows import CPU

from benchmarks import cases, digits, measure, pooling, recurrent, runtimes, streaming
from benchmarks.cases import BACKWARD, FORWARD, PoolCase, RecurrentCase, StepCase
from benchmarks.measure import relative_error


def assert_all_are_right(experiment: measure.Experiment, informational: float = 0.02) -> None:
    """All contenders give the exact output, and those that train the exact gradients."""
    modes = (FORWARD, BACKWARD) if experiment.inputs else (FORWARD,)
    for mode in modes:
        exact_dy = replace(experiment, inputs=experiment.exact_inputs, dy=experiment.dy.double())
        exact = measure.call(experiment.exact, exact_dy, mode)
        with torch.inference_mode(mode == FORWARD):
            truth = exact()
            ours = [measure.Peer("ours", str, experiment.ours)]
            if experiment.prepared:
                ours.append(measure.Peer("ours, prepared", str, experiment.prepared, trains=False))
            for peer in (*ours, *experiment.peers):
                if peer.trains or mode == FORWARD:
                    with peer.context():
                        found = measure.call(peer.forward, experiment, mode)()
                    assert len(found) == len(truth)
                    found[0] = peer.seen(found[0])
                    limit = informational if peer.informational else 3e-6
                    assert max(map(relative_error, found, truth)) < limit, peer.name


RECURRENT = [
    RecurrentCase(3, 6, 4, 5, 2, True),
    RecurrentCase(3, 6, 4, 5, ragged=True),
    RecurrentCase(2, 1, 4, 5, op="gru"),
    RecurrentCase(3, 6, 4, 5, 2, True, op="gru"),
    RecurrentCase(3, 6, 4, 5, ragged=True, op="gru"),
    RecurrentCase(3, 6, 4, 5, 2, True, op="rnn"),
    RecurrentCase(3, 6, 4, 5, ragged=True, op="rnn"),
]


@pytest.mark.parametrize("case", RECURRENT, ids=cases.name)
def test_recurrent_contenders_compute_the_same(case: RecurrentCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "missing", lambda: ["onnx"])
    experiment = recurrent.experiment(case, CPU)
    assert len(experiment.peers) == (4 if case.ragged else 2)
    assert {peer.name.partition(",")[0] for peer in experiment.peers} == {f"torch.nn.{case.op.upper()}"}
    assert_all_are_right(experiment)


@pytest.mark.parametrize("case", RECURRENT, ids=cases.name)
def test_other_runtimes_compute_the_same(case: RecurrentCase) -> None:
    for package in runtimes.PACKAGES:
        pytest.importorskip(package)
    experiment = recurrent.experiment(case, CPU)
    names = [peer.name for peer in experiment.peers if not peer.trains]
    int8 = ["ONNX Runtime int8"] if case.op == "lstm" else []
    assert names == ["ONNX Runtime", *int8, "OpenVINO"]
    assert_all_are_right(experiment)


@pytest.mark.parametrize("variant", ["LSTM", "LSTMCell", "LSTM-prepared"])
def test_streaming_contenders_carry_the_state_on(variant: str) -> None:
    case = StepCase(variant, H=8)
    if not streaming.supported(case):
        pytest.skip("rnnattn.LSTM has no prepare_inference")
    experiment = streaming.experiment(case, CPU)
    assert experiment.operations == streaming.STEPS
    assert_all_are_right(experiment, informational=0.05)
    with pytest.MonkeyPatch.context() as patch:  # one step fewer is another output: the last one is what is compared
        patch.setattr(streaming, "STEPS", streaming.STEPS - 1)
        other = streaming.experiment(case, CPU).exact()
    assert relative_error(other, experiment.exact()) > 0.1


@pytest.mark.parametrize(("kind", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_onnx_weights_are_torchs_in_onnx_order(kind: str, gates: int) -> None:
    """ONNX operators, LSTM: iofc; GRU: zrh. torch: ifgo, rzn. Each gate's rows are filled with its letter."""
    theirs, wanted = {"LSTM": ("ifgo", "iofg"), "GRU": ("rzn", "zrn"), "RNN": ("h", "h")}[kind]
    module = getattr(torch.nn, kind)(2, 3, bidirectional=True)
    letters = torch.tensor([float(ord(letter)) for letter in theirs for _ in range(3)])
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            shift = 1000 * ("reverse" in name) + 100000 * ("hh" in name)
            parameter.copy_((letters + shift).view(-1, *[1] * (parameter.dim() - 1)).expand_as(parameter))
    W, R, B = runtimes.layer_weights(module, 0)
    expected = torch.tensor([float(ord(letter)) for letter in wanted for _ in range(3)])
    assert W.shape == (2, gates * 3, 2) and R.shape == (2, gates * 3, 3) and B.shape == (2, 2 * gates * 3)
    for direction in (0, 1):
        assert torch.equal(W[direction, :, 1], expected + 1000 * direction)
        assert torch.equal(R[direction, :, 2], expected + 1000 * direction + 100000)
        assert torch.equal(B[direction], torch.cat([expected, expected + 100000]) + 1000 * direction)


def test_operations_are_counted_as_the_products_say() -> None:
    one_step = 2 * 4 * 7 * (3 + 7)  # 2 G H (I + H)
    assert RecurrentCase(1, 1, 3, 7).flops(FORWARD) == one_step
    assert RecurrentCase(5, 2, 3, 7).flops(BACKWARD) == 3 * 5 * 2 * one_step
    assert RecurrentCase(1, 1, 3, 7, op="gru").flops(FORWARD) == one_step * 3 / 4
    second_layer = 2 * 4 * 7 * (14 + 7)  # reads both directions of the first
    assert RecurrentCase(1, 1, 3, 7, 2, True).flops(FORWARD) == 2 * (one_step + second_layer)
    lengths = cases.ragged_lengths(4, 20)
    assert lengths.min() == 2 and lengths.max() == 20
    assert RecurrentCase(4, 20, 3, 7, ragged=True).flops(FORWARD) == int(lengths.sum()) * one_step


@pytest.mark.parametrize(
    "case", [PoolCase(3, 20, 8), PoolCase(3, 20, 8, ragged=True), PoolCase(3, 20, 8, A=4, ragged=True)], ids=cases.name
)
def test_pooling_contenders_compute_the_same(case: PoolCase) -> None:
    assert_all_are_right(pooling.experiment(case, CPU))


def test_digits_model_after_the_swap_computes_and_learns_the_same() -> None:
    pytest.importorskip("sklearn")
    (row,) = digits.measure(["auto"], CPU, epochs=2, seconds=0.01)
    assert row.logit_difference < 1e-4
    assert len(row.losses) == digits.FIRST_LOSSES and row.losses[-1] < row.losses[0]
    assert row.checks[f"the first {digits.FIRST_LOSSES} losses agree to {digits.MAX_LOSS_DIFFERENCE:g}"]


def test_swapped_digits_model_shares_nothing_with_the_original_but_its_values() -> None:
    model = digits.new_model(CPU)
    after = digits.swapped(model)
    kinds = {type(module).__module__.partition(".")[0] for module in (after.recurrent, after.pool)}
    assert kinds == {"rnnattn"}
    assert {type(module) for module in (model.recurrent, model.pool)} == {torch.nn.LSTM, digits.AdditivePooling}
    assert sum(p.numel() for p in after.parameters()) == sum(p.numel() for p in model.parameters())
