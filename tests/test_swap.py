"""swap and unswap: the same model over the same parameters, hooks and settings."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import rnnattn


class Tagger(nn.Module):
    """All six recurrent modules in a list, a dict and a Sequential, one of them in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.LSTM(6, 6)
        self.stack = nn.ModuleList([nn.GRU(4, 3, 2, bidirectional=True), self.shared, nn.RNN(6, 6, 1, "relu")])
        self.parts = nn.ModuleDict({"again": self.shared, "cell": nn.LSTMCell(6, 5)})
        self.cells = nn.ModuleList([nn.GRUCell(5, 5), nn.RNNCell(5, 5, nonlinearity="relu")])
        self.head = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Sequential(nn.LSTM(4, 2, proj_size=1)))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.stack, self.parts["again"]):
            x, _ = layer(x)
        h, _ = self.parts["cell"](x[-1])
        for cell in self.cells:
            h = cell(h)
        return self.head(h[None])[0]


NAMES = ["shared", "stack.0", "stack.1", "stack.2", "parts.again", "parts.cell", "cells.0", "cells.1", "head.2.0"]
TWINS = {getattr(nn, name): getattr(rnnattn, name) for name in ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")}


def types(model: nn.Module) -> list[type]:
    return [type(model.get_submodule(name)) for name in NAMES]


def test_nested_models_there_and_back() -> None:
    model, x = Tagger().double(), torch.randn(5, 3, 4, dtype=torch.float64)
    parameters, children, want = dict(model.named_parameters()), types(model), model(x)

    report = rnnattn.swap(model)
    assert report.model is model
    assert sorted(report.swapped) == sorted(NAMES)
    assert report.left == {}
    assert str(report).splitlines() == [f"swapped {name}" for name in report.swapped]
    assert types(model) == [TWINS[t] for t in children]
    assert model.stack[1] is model.shared and model.parts["again"] is model.shared
    swapped = dict(model.named_parameters())
    assert list(swapped) == list(parameters)
    assert all(swapped[name] is parameters[name] for name in parameters)
    with rnnattn.use_backend("reference"):
        torch.testing.assert_close(model(x), want, rtol=1e-11, atol=1e-13)

    back = rnnattn.unswap(model)
    assert sorted(back.swapped) == sorted(NAMES)
    assert types(model) == children
    assert model.stack[1] is model.shared
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert torch.equal(model(x), want)


def test_swap_is_idempotent() -> None:
    model = Tagger()
    rnnattn.swap(model)
    modules = list(model.modules())
    report = rnnattn.swap(model)
    assert report.swapped == [] and report.left == {}
    assert str(report) == "no recurrent modules found"
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    plain = Tagger()
    assert rnnattn.unswap(plain).swapped == []


@pytest.mark.parametrize("theirs", TWINS, ids=lambda kind: kind.__name__)
def test_a_root_module_is_replaced_in_the_report(theirs: type[nn.Module]) -> None:
    model, x = theirs(3, 4), torch.randn(5, 3) if theirs.__name__.endswith("Cell") else torch.randn(5, 2, 3)
    report = rnnattn.swap(model)
    assert report.swapped == [""]
    assert str(report) == "swapped (the model itself)"
    assert type(model) is theirs and type(report.model) is TWINS[theirs]
    assert all(p is q for p, q in zip(report.model.parameters(), model.parameters(), strict=True))
    with rnnattn.use_backend("reference"):
        torch.testing.assert_close(report.model(x), model(x), rtol=1e-5, atol=1e-6)
    back = rnnattn.unswap(report.model)
    assert type(back.model) is theirs
    torch.testing.assert_close(back.model(x), model(x), rtol=0, atol=0)


def test_the_nonlinearity_is_kept() -> None:
    model, x = (
        nn.ModuleList([nn.RNN(3, 4, nonlinearity="relu"), nn.RNNCell(3, 4, nonlinearity="relu")]),
        torch.randn(5, 2, 3),
    )
    want = [model[0](x)[0], model[1](x[0])]
    rnnattn.swap(model)
    assert [module.nonlinearity for module in model] == ["relu", "relu"]
    with rnnattn.use_backend("reference"):
        torch.testing.assert_close([model[0](x)[0], model[1](x[0])], want, rtol=1e-5, atol=1e-6)
    rnnattn.unswap(model)
    assert [module.nonlinearity for module in model] == ["relu", "relu"]
    torch.testing.assert_close([model[0](x)[0], model[1](x[0])], want, rtol=0, atol=0)


def test_other_modules_are_left_with_a_reason() -> None:
    class MyLSTM(nn.LSTM):
        pass

    class MyCell(nn.RNNCellBase):
        pass

    normed = parametrizations.weight_norm(nn.GRU(3, 4), "weight_hh_l0")
    model = nn.ModuleDict(
        {"base": nn.RNNBase("GRU", 3, 4), "cell": MyCell(3, 4, True, 1), "mine": MyLSTM(3, 4), "normed": normed,
         "plain": nn.LSTM(3, 4)}
    )  # fmt: skip
    before = dict(model.items())
    report = rnnattn.swap(model)
    assert report.swapped == ["plain"]
    assert set(report.left) == {"base", "cell", "mine", "normed"}
    assert all(model[name] is before[name] for name in report.left)
    assert report.left["base"] == "RNNBase has no counterpart in rnnattn"
    assert report.left["cell"] == "MyCell has no counterpart in rnnattn"
    assert "MyLSTM is a subclass of LSTM" in report.left["mine"]
    assert "ParametrizedGRU is a subclass of GRU" in report.left["normed"]
    assert "left base: RNNBase has no counterpart" in str(report)


class Aliased(nn.Module):
    """Holds its layer a second time where named_modules does not look."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(3, 4, 2, dropout=0.5)
        self.used, self.call = [self.layer], self.layer.__call__

    def forward(self, x: Tensor) -> Tensor:
        return self.used[0](x)[0] + self.call(x)[0]


def test_whoever_else_holds_a_module_holds_ours() -> None:
    model, x = Aliased(), torch.randn(5, 2, 3)
    want = model.eval()(x)
    model.train()
    rnnattn.swap(model)
    assert model.used[0] is model.layer and type(model.layer) is rnnattn.LSTM
    model.eval()
    assert len(rnnattn.explain(model, x)) == 2
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-6)
    rnnattn.unswap(model)
    assert torch.equal(model(x), want)


def test_a_module_that_was_compiled_in_place() -> None:
    model, x = nn.Sequential(nn.LSTM(3, 4)), torch.randn(5, 2, 3)
    model[0].compile(backend="aot_eager")
    want = model(x)[0]
    rnnattn.swap(model)
    for _ in range(2):
        torch.testing.assert_close(model(x)[0], want, rtol=1e-5, atol=1e-6)
    assert len(rnnattn.explain(model, x)) == 1
    rnnattn.unswap(model)
    assert torch.equal(model(x)[0], want)


def test_a_module_whose_forward_was_replaced_is_left() -> None:
    """As accelerate's hooks do."""
    model, x = nn.Sequential(nn.GRU(3, 4)), torch.randn(5, 2, 3)
    before = model[0].forward
    model[0].forward = lambda *args: before(*args)
    want = model(x)[0]
    report = rnnattn.swap(model)
    assert report.swapped == [] and "forward was replaced" in report.left["0"]
    assert type(model[0]) is nn.GRU and torch.equal(model(x)[0], want)


def test_a_module_that_is_left_is_left_under_all_its_names() -> None:
    model = nn.ModuleDict({"a": nn.GRU(3, 4), "b": nn.LSTM(3, 4)})
    model["c"] = model["a"]
    model["a"].forward = model["a"].forward
    report = rnnattn.swap(model)
    assert report.swapped == ["b"] and set(report.left) == {"a", "c"}
    assert type(model["c"]) is nn.GRU


def test_an_attribute_that_is_a_setting_of_ours_is_not_taken_for_one() -> None:
    lstm = nn.LSTM(3, 4)
    lstm.zoneout = 0.3
    report = rnnattn.swap(nn.Sequential(lstm))
    assert report.swapped == []
    assert report.left == {"0": "its attribute zoneout is a setting of rnnattn.LSTM"}


def test_torchs_own_methods() -> None:
    """Which nn.RNNBase has not, or has for one state."""
    theirs, ours = (package.LSTM(3, 4, 2, proj_size=2) for package in (nn, rnnattn))
    h, c, x, order = torch.randn(2, 5, 2), torch.randn(2, 5, 4), torch.randn(6, 5, 3), torch.tensor([1, 0, 4, 3, 2])
    assert ours.get_expected_cell_size(x, None) == theirs.get_expected_cell_size(x, None)
    assert all(map(torch.equal, ours.permute_hidden((h, c), order), theirs.permute_hidden((h, c), order)))
    ours.check_forward_args(x, (h, c), None)
    with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size"):
        ours.check_forward_args(x, (h, h), None)


def test_children_of_a_module_that_asks_for_torchs_class_are_left() -> None:
    class LSTMModule(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 4)

    class Derived(LSTMModule):
        pass

    LSTMModule.__module__, LSTMModule.__qualname__ = "torchrl.modules.tensordict_module.rnn", "LSTMModule"
    report = rnnattn.swap(nn.Sequential(LSTMModule(), Derived(), nn.LSTM(3, 4)))
    assert report.swapped == ["2"]
    assert report.left == dict.fromkeys(("0.lstm", "1.lstm"), "LSTMModule of torchrl asks for torch.nn's class")


def test_hooks_fire_and_can_be_removed() -> None:
    model, fired = nn.Sequential(nn.LSTM(3, 4)), []
    lstm = model[0]

    def forward(module: nn.Module, args: Any, output: Any) -> None:
        fired.append(("forward", type(module)))

    handles = [
        lstm.register_forward_pre_hook(lambda module, args: fired.append(("pre", type(module)))),
        lstm.register_forward_hook(forward),
        lstm.register_full_backward_hook(lambda module, gi, go: fired.append(("backward", type(module)))),
    ]
    x = torch.randn(5, 2, 3, requires_grad=True)
    rnnattn.swap(model)
    model(x)[0].sum().backward()
    assert fired == [(kind, rnnattn.LSTM) for kind in ("pre", "forward", "backward")]
    for handle in handles:
        handle.remove()
    model(x)[0].sum().backward()
    assert len(fired) == 3
    late = model[0].register_forward_hook(forward)
    rnnattn.unswap(model)
    model(x)
    assert fired[3:] == [("forward", nn.LSTM)]
    late.remove()
    model(x)
    assert len(fired) == 4


@pytest.mark.parametrize("training", [True, False])
def test_settings_are_kept(training: bool) -> None:
    lstm = nn.LSTM(3, 4, 2, bias=False, batch_first=True, dropout=0.3, bidirectional=True, proj_size=2)
    lstm.weight_hh_l0.requires_grad_(False)
    lstm.note = "kept"
    model = nn.Sequential(lstm.bfloat16()).train(training)
    want = repr(model)
    rnnattn.swap(model)
    assert repr(model) == want
    assert model[0].training is training
    assert model[0].note == "kept"
    assert model[0].weight_ih_l0.dtype == torch.bfloat16
    assert not model[0].weight_hh_l0.requires_grad
    model.eval().float()
    rnnattn.unswap(model)
    assert not model[0].training and model[0].weight_ih_l0.dtype == torch.float32
    x = torch.randn(2, 3, 3)
    torch.testing.assert_close(model(x)[0], rnnattn.swap(copy.deepcopy(model)).model(x)[0], rtol=1e-5, atol=1e-6)


def test_the_optimizer_goes_on() -> None:
    """Three steps with momentum, the middle one swapped, are three steps of torch.nn."""

    def train(swapped: bool) -> list[Tensor]:
        torch.manual_seed(2)
        model, x = nn.Sequential(nn.LSTM(3, 4)).double(), torch.randn(5, 2, 3, dtype=torch.float64)
        optimizer = torch.optim.Adam(model.parameters(), 0.1)
        for step in range(3):
            if swapped and step == 1:
                rnnattn.swap(model)
            if swapped and step == 2:
                rnnattn.unswap(model)
            optimizer.zero_grad()
            with rnnattn.use_backend("reference"):
                model(x)[0].square().sum().backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    torch.testing.assert_close(train(True), train(False), rtol=1e-9, atol=1e-12)


def test_checkpoints_and_pickles_cross() -> None:
    model, x = Tagger(), torch.randn(5, 3, 4)
    state = copy.deepcopy(model.state_dict())
    rnnattn.swap(model)
    other = Tagger()
    other.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(state, strict=True)
    want = model(x)
    for clone in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(clone.shared) is rnnattn.LSTM
        assert clone.stack[1] is clone.shared and clone.shared is not model.shared
        assert torch.equal(clone(x), want)
    torch.testing.assert_close(other(x), want, rtol=1e-5, atol=1e-6)
    rnnattn.unswap(model)
    assert type(pickle.loads(pickle.dumps(model)).shared) is nn.LSTM


@pytest.mark.parametrize("kind", ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"))
def test_nothing_is_left_of_a_swap(kind: str) -> None:
    """Nor of a module that has been ours from the beginning."""
    model, ours = nn.Sequential(getattr(nn, kind)(3, 4)), nn.Sequential(getattr(rnnattn, kind)(3, 4))
    before, names = pickle.dumps(model), set(vars(model[0]))
    for each in (rnnattn.swap(model).model, ours):
        each(torch.randn(2, 3))
        rnnattn.unswap(each)
        assert type(each[0]) is getattr(nn, kind) and set(vars(each[0])) == names
    assert pickle.dumps(model) == before


def test_a_swapped_module_follows_its_parameters() -> None:
    model, x = nn.Sequential(nn.LSTM(3, 4)), torch.randn(5, 2, 3)
    rnnattn.swap(model)
    before = model(x)[0]
    with torch.no_grad():
        model[0].weight_hh_l0.mul_(2)
    after = model(x)[0]
    assert not torch.allclose(after, before)
    rnnattn.unswap(model)
    torch.testing.assert_close(model(x)[0], after, rtol=1e-5, atol=1e-6)
    model.double()
    assert model(x.double())[0].dtype == torch.float64
