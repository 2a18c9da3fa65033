"""Zoneout, locked dropout, dropped weights, layer norm and forget bias in the modules."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import F32, F64, backend_parameters, device_of
from recurrent_cases import each_mode
from tolerances import close
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnattn

KINDS = {"LSTM": "LSTM", "GRU": "GRU", "RNN_TANH": "RNN", "RNN_RELU": "RNN"}
kinds = pytest.mark.parametrize("kind", ("LSTM", "GRU", "RNN"))


I, H, B, T = 4, 5, 3, 6


def module(kind: str, **options: Any) -> Any:
    torch.manual_seed(1)
    made = getattr(rnnattn, kind)(I, H, dtype=F64, **options)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if name.startswith("norm"):
                p.add_(torch.randn_like(p) * 0.2)
    return made


def sequence(*shape: int) -> Tensor:
    return torch.randn(*(shape or (T, B, I)), generator=torch.Generator().manual_seed(2), dtype=F64)


def normed(v: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    centred = v - v.mean(-1, keepdim=True)
    return gain * centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() + shift


def test_lstm_with_layer_norm_and_the_mean_of_zoneout_by_hand() -> None:
    m = module("LSTM", layer_norm=True, zoneout=(0.3, 0.2)).eval()
    x, h, c, ys = sequence(), torch.zeros(B, H, dtype=F64), torch.zeros(B, H, dtype=F64), []
    for x_t in x:
        a = normed(x_t @ m.weight_ih_l0.T, m.norm_ih_l0, m.bias_ih_l0)
        b = normed(h @ m.weight_hh_l0.T, m.norm_hh_l0, m.bias_hh_l0)
        i, f, g, o = (a + b).chunk(4, -1)
        fresh = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = 0.3 * h + 0.7 * o.sigmoid() * normed(fresh, m.norm_c_l0, m.norm_c_bias_l0).tanh()
        c = 0.2 * c + 0.8 * fresh
        ys.append(h)
    y, (h_n, c_n) = m(x)
    close([y, h_n[0], c_n[0]], [torch.stack(ys), h, c])


def test_gru_with_layer_norm_and_the_mean_of_zoneout_by_hand() -> None:
    m = module("GRU", layer_norm=True, zoneout=0.3).eval()
    x, h, ys = sequence(), torch.zeros(B, H, dtype=F64), []
    for x_t in x:
        a_r, a_z, a_n = normed(x_t @ m.weight_ih_l0.T, m.norm_ih_l0, m.bias_ih_l0).chunk(3, -1)
        b_r, b_z, b_n = normed(h @ m.weight_hh_l0.T, m.norm_hh_l0, m.bias_hh_l0).chunk(3, -1)
        z = (a_z + b_z).sigmoid()
        h = 0.3 * h + 0.7 * ((1 - z) * (a_n + (a_r + b_r).sigmoid() * b_n).tanh() + z * h)
        ys.append(h)
    close(m(x)[0], torch.stack(ys))


@kinds
def test_off_is_the_plain_layer(kind: str) -> None:
    plain, off = module(kind), module(kind, zoneout=0.0, input_dropout=0.0, layer_norm=False)
    assert off.state_dict().keys() == plain.state_dict().keys()
    assert repr(off) == repr(plain)
    assert off._regularisation() is None
    close(off(sequence()), plain(sequence()))


@kinds
def test_the_dropouts_are_off_in_evaluation(kind: str) -> None:
    m = module(kind, input_dropout=0.5, recurrent_dropout=0.5, weight_dropout=0.5, num_layers=2, bidirectional=True)
    plain = module(kind, num_layers=2, bidirectional=True)
    close(m.eval()(sequence()), plain(sequence()))
    assert not torch.allclose(m.train()(sequence())[0], plain(sequence())[0])


@kinds
@pytest.mark.parametrize("training", (True, False))
def test_zoneout_of_1_keeps_the_states(kind: str, training: bool) -> None:
    m = module(kind, zoneout=1.0).train(training)
    states = tuple(sequence(1, B, H) for _ in range(2 if kind == "LSTM" else 1))
    y, final = m(sequence(), states if kind == "LSTM" else states[0])
    close(y, states[0].expand(T, B, H))
    close(final, states if kind == "LSTM" else states[0])


def test_zoneout_keeps_its_share_of_units() -> None:
    m = rnnattn.RNN(I, 400, dtype=F64, zoneout=0.25)
    y, _ = m(sequence(20, B, I))
    kept = (y[1:] == y[:-1]).double().mean((0, 2))
    assert kept.sub(0.25).abs().max() < 0.03  # of 7,600: five standard deviations


def test_zoneout_of_h_leaves_c_alone() -> None:
    m = module("LSTM", zoneout=(1.0, 0.0))
    y, (_, c_n) = m(sequence())
    assert not y.any() and c_n.abs().min() > 0


def test_a_locked_input_mask_is_the_same_at_every_step_and_another_in_every_row() -> None:
    m = rnnattn.RNN(40, 40, nonlinearity="relu", bias=False, dtype=F64, input_dropout=0.5)
    with torch.no_grad():
        m.weight_ih_l0.copy_(torch.eye(40))
        m.weight_hh_l0.zero_()
    y, _ = m(torch.ones(T, B, 40, dtype=F64))
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert (y == y[0]).all()
    assert (y[0, 0] != y[0, 1]).any()


def test_a_locked_state_mask_is_the_same_at_every_step() -> None:
    m = rnnattn.RNN(1, 40, nonlinearity="relu", bias=False, dtype=F64, recurrent_dropout=0.5)
    with torch.no_grad():
        m.weight_ih_l0.zero_()
        m.weight_hh_l0.copy_(torch.eye(40))
    y, _ = m(torch.zeros(T, B, 1, dtype=F64), torch.ones(1, B, 40, dtype=F64))
    assert set(y[0].unique().tolist()) == {0.0, 2.0}
    close(y, torch.stack([y[0] ** (t + 1) for t in range(T)]))


@kinds
def test_dropped_weights_are_others_in_every_call(kind: str) -> None:
    m = module(kind, weight_dropout=0.5)
    before, gradients = copy.deepcopy(m.state_dict()), []
    for _ in range(2):
        (gradient,) = torch.autograd.grad(m(sequence())[0].sum(), m.weight_hh_l0)
        gradients.append(gradient == 0)
    assert 0.2 < gradients[0].double().mean() < 0.8
    assert (gradients[0] != gradients[1]).any()
    close(dict(m.state_dict()), dict(before))


@pytest.mark.parametrize("kind, bias", (("LSTM", True), ("LSTM", False), ("GRU", True), ("RNN", True)))
def test_the_parameters_of_layer_norm(kind: str, bias: bool) -> None:
    torch.manual_seed(0)
    m = getattr(rnnattn, kind)(I, H, num_layers=2, bidirectional=True, bias=bias, layer_norm=True)
    rows = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind] * H
    names = {"norm_ih": rows, "norm_hh": rows}
    if kind == "LSTM":
        names |= {"norm_c": H, "norm_c_bias": H} if bias else {"norm_c": H}
    expected = {n + s: size for n, size in names.items() for s in ("_l0", "_l0_reverse", "_l1", "_l1_reverse")}
    found = {name: p for name, p in m.named_parameters() if name.startswith("norm")}
    assert {name: p.numel() for name, p in found.items()} == expected
    assert all((p == (0 if "bias" in name else 1)).all() for name, p in found.items())
    m(torch.randn(T, B, I))[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in m.parameters())


def test_forget_bias() -> None:
    m = rnnattn.LSTM(I, H, num_layers=2, forget_bias=1.5)
    for _ in range(2):
        for layer in range(2):
            forget = [getattr(m, f"bias_{which}_l{layer}")[H : 2 * H] for which in ("ih", "hh")]
            assert (sum(forget) == 1.5).all()
        m.reset_parameters()
    assert m.bias_ih_l0[:H].abs().max() > 0
    assert m._regularisation() is None  # nothing but a beginning


ALL: dict[str, Any] = {
    "zoneout": 0.2, "input_dropout": 0.2, "recurrent_dropout": 0.3, "weight_dropout": 0.2, "layer_norm": True
}  # fmt: skip


@pytest.mark.parametrize("backend, mode", each_mode("cpp", "triton"))
def test_a_seed_gives_the_same_numbers_on_every_backend(backend: str, mode: str) -> None:
    options = {"nonlinearity": mode[4:].lower()} if mode.startswith("RNN") else {}
    device, results = device_of(backend), []
    m = getattr(rnnattn, KINDS[mode])(I, H, bidirectional=True, **ALL, **options).to(device)
    x = torch.randn(3, 2, I, device=device, requires_grad=True)
    for name in ("reference", backend):
        torch.manual_seed(7)
        with rnnattn.use_backend(name):
            y, _ = m(x, lengths=[3, 1])
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), [x, *m.parameters()])])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@kinds
def test_a_seed_gives_the_same_numbers_again(kind: str) -> None:
    m, results = module(kind, num_layers=2, bidirectional=True, **ALL), []
    for _ in range(2):
        torch.manual_seed(7)
        y, _ = m(sequence())
        results.append([y.detach(), *torch.autograd.grad(y.sum(), list(m.parameters()))])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("kind", ("LSTM", "GRU"))
def test_a_packed_sequence(kind: str) -> None:
    m, lengths = module(kind, layer_norm=True, zoneout=0.3).eval(), torch.tensor([2, 6, 3])
    y, states = m(pack_padded_sequence(sequence(), lengths, enforce_sorted=False))
    close((pad_packed_sequence(y)[0], states), m(sequence(), lengths=lengths))


@pytest.mark.parametrize("backend", backend_parameters("reference", "cpp"))
@kinds
def test_double_backward(kind: str, backend: str) -> None:
    m = module(kind, layer_norm=True, zoneout=0.3).eval()
    x = sequence(3, 2, I).requires_grad_()
    with rnnattn.use_backend(backend):
        assert torch.autograd.gradgradcheck(lambda x: m(x, lengths=[3, 1])[0], x)


def test_the_transforms_of_torch_func() -> None:
    m = module("LSTM", layer_norm=True, zoneout=0.3).eval()
    x, tangent = sequence(2, T, B, I), sequence(2, T, B, I).flip(0)
    close(torch.func.vmap(lambda x: m(x)[0])(x), torch.stack([m(part)[0] for part in x]))

    def loss(x: Tensor) -> Tensor:
        return m(x)[0].square().sum()

    gradient = torch.func.grad(loss)(x[0])
    _, along = torch.func.jvp(loss, (x[0],), (tangent[0],))
    close(along, (gradient * tangent[0]).sum())


@pytest.mark.parametrize("backend", backend_parameters("reference", "cpp"))
def test_compiled_whole(backend: str) -> None:
    m = module("LSTM", layer_norm=True, zoneout=0.3, num_layers=2).eval()
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    x = sequence().requires_grad_()
    results = []
    with rnnattn.use_backend(backend):
        for run in (compiled, m):
            y, _ = run(x)
            results.append([y.detach(), *torch.autograd.grad(y.square().sum(), [x, *m.parameters()])])
        m.train()
        assert compiled(x)[0].shape == (T, B, H)
    close(*results)


def test_autocast_to_16_bits() -> None:
    m = rnnattn.LSTM(I, H, **ALL)
    x = torch.randn(T, B, I)
    with torch.autocast("cpu", torch.bfloat16):
        y, (h_n, c_n) = m(x)
    assert {t.dtype for t in (y, h_n, c_n)} == {torch.bfloat16}
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == F32 for p in m.parameters())


@pytest.mark.parametrize("backend", backend_parameters("reference", "cpp"))
def test_the_cell_states_of_every_step(backend: str) -> None:
    m = module("LSTM", zoneout=(0.2, 0.3), layer_norm=True, num_layers=2, bidirectional=True).eval()
    x, lengths = sequence(), [6, 0, 3]
    with rnnattn.use_backend(backend):
        y, (_, c_n), cells = m(x, lengths=lengths, return_cells=True)
        close(y, m(x, lengths=lengths)[0])
        forward, backward = cells.chunk(2, -1)
        close(torch.stack([forward[5, 0], torch.zeros(H, dtype=F64), forward[2, 2]]), c_n[2])
        close(torch.stack([backward[0, 0], torch.zeros(H, dtype=F64), backward[0, 2]]), c_n[3])
        assert not cells[3:, 2].any()
        m = module("LSTM", zoneout=(0.2, 0.3), layer_norm=True, bidirectional=True).eval()
        torch.autograd.gradcheck(
            lambda x: m(x, lengths=[3, 1], return_cells=True)[2], sequence(3, 2, I).requires_grad_()
        )


@kinds
def test_copies_and_repr(kind: str) -> None:
    m = module(kind, **ALL).eval()
    for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert repr(twin) == repr(m)
        close(twin(sequence()), m(sequence()))
    words = "zoneout=0.2, input_dropout=0.2, recurrent_dropout=0.3, weight_dropout=0.2, layer_norm=True"
    assert words in repr(m)
    other = getattr(rnnattn, kind)(I, H, dtype=F64, **ALL).eval()
    other.load_state_dict(m.state_dict())
    close(other(sequence()), m(sequence()))


def test_settings_may_change() -> None:
    m = module("GRU")
    m(sequence())  # what follows must not take the direct way to the kernels that this call has found
    m.zoneout = 1.0
    assert not m(sequence())[0].any()
    m.zoneout = 2.0
    with pytest.raises(ValueError, match=r"zoneout: expected a probability from 0 to 1, got 2\.0"):
        m(sequence())


WRONG: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("LSTM", {"zoneout": 1.5}, ValueError, "zoneout: expected a probability from 0 to 1, got 1.5"),
    ("LSTM", {"zoneout": (0.1, 0.2, 0.3)}, ValueError, "zoneout: expected a number, or a pair for h and c, got (0.1"),
    ("GRU", {"zoneout": (0.1, 0.2)}, ValueError, "zoneout: expected a number, got (0.1, 0.2)"),
    ("LSTM", {"zoneout": "0.1"}, TypeError, "zoneout: expected a number, got str"),
    ("RNN", {"input_dropout": -0.1}, ValueError, "input_dropout: expected a probability from 0 to 1, got -0.1"),
    ("RNN", {"recurrent_dropout": True}, TypeError, "recurrent_dropout: expected a number, got bool"),
    ("GRU", {"weight_dropout": 7}, ValueError, "weight_dropout: expected a probability from 0 to 1, got 7"),
    ("LSTM", {"layer_norm": True, "proj_size": 2}, ValueError, "layer_norm: expected proj_size=0 with it, got 2"),
    ("LSTM", {"zoneout": 0.1, "recompute": "chunk"}, ValueError, "zoneout: expected recompute=None with it, got 'chu"),
    ("LSTM", {"forget_bias": "1"}, TypeError, "forget_bias: expected a number, got str"),
    ("GRU", {"forget_bias": 1.0}, ValueError, "forget_bias: expected None without a forget gate, got 1.0"),
    ("LSTM", {"forget_bias": 1.0, "bias": False}, ValueError, "forget_bias: expected None without biases, got 1.0"),
]


@pytest.mark.parametrize("kind, options, error, words", WRONG)
def test_wrong_settings(kind: str, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error) as raised:
        getattr(rnnattn, kind)(I, H, **options)
    assert words in str(raised.value)


def test_parameters_that_do_not_fit() -> None:
    m, x = module("LSTM", layer_norm=True), sequence()
    m.norm_hh_l0 = nn.Parameter(torch.ones(1, dtype=F64))
    with pytest.raises(
        RuntimeError, match=r"norm_hh_l0: expected shape \[20\] on cpu with layer_norm, got shape \[1\]"
    ):
        m(x)
    m.norm_hh_l0 = None
    with pytest.raises(RuntimeError, match=r"norm_hh_l0: expected shape \[20\] on cpu with layer_norm, got None"):
        m(x)
    plain = module("GRU")
    plain.layer_norm = True
    with pytest.raises(RuntimeError, match="norm_ih_l0: expected shape"):
        plain(x)


def test_zeros_are_off() -> None:
    m = rnnattn.LSTM(I, H, zoneout=(0.0, 0.0), input_dropout=0.5)
    assert m._may_be_regularised() and not m.eval()._may_be_regularised()
    assert rnnattn.unswap(nn.Sequential(rnnattn.LSTM(I, H, zoneout=(0.0, 0.0), forget_bias=1.0))).swapped == ["0"]


def test_with_a_projection() -> None:
    m = rnnattn.LSTM(I, H, proj_size=2, input_dropout=0.3, weight_dropout=0.3)
    assert m(torch.randn(T, B, I))[0].shape == (T, B, 2)


# --- what cannot have it ---------------------------------------------------------------------------


def test_unswap_leaves_what_torch_cannot_do() -> None:
    model = nn.Sequential(rnnattn.GRU(I, H, zoneout=0.1), rnnattn.GRU(I, H))
    report = rnnattn.unswap(model)
    assert report.left == {"0": "torch's GRU knows no zoneout"}
    assert report.swapped == ["1"]


def test_prepare_inference_refuses() -> None:
    with pytest.raises(ValueError, match="expected a module without zoneout and layer_norm"):
        rnnattn.LSTM(I, H, zoneout=0.1).eval().prepare_inference()
    with pytest.raises(RuntimeError, match="expected evaluation mode"):
        rnnattn.LSTM(I, H, recurrent_dropout=0.1).prepare_inference()
    m = rnnattn.LSTM(I, H, recurrent_dropout=0.1).eval()
    x = torch.randn(T, B, I)
    with torch.no_grad():
        torch.testing.assert_close(m.prepare_inference()(x), m(x))


def test_backend_torch_refuses() -> None:
    m = rnnattn.GRU(I, H, zoneout=0.1)
    with rnnattn.use_backend("torch"), pytest.raises(rnnattn.BackendError, match="knows no zoneout"):
        m(torch.randn(T, B, I))


def test_zoneout_does_not_depend_on_the_default_dtype() -> None:
    y = []
    for dtype in (F32, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            m = module("GRU", zoneout=0.3)
            torch.manual_seed(5)
            y.append(m(sequence())[0])
        finally:
            torch.set_default_dtype(F32)
    assert torch.equal(y[0] == 0, y[1] == 0)


def test_dropout_of_1_drops_all() -> None:
    m = module("RNN", input_dropout=1.0, bias=False)
    assert not m(sequence())[0].any()
    assert F.dropout(torch.ones(3), 1.0).sum() == 0  # as torch's own
