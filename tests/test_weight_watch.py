"""What prepare_inference() returns refuses to run once the weights have changed, and its copies do as it does."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tolerances import close
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrizations

import rnnattn
from rnnattn import backends
from rnnattn.backends import cpp
from rnnattn.nn.weight_watch import PARTS

reason = backends.unavailable("cpp")
pytestmark = pytest.mark.skipif(bool(reason), reason=f"backend cpp: {reason}")
I, H = 5, 6


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# --- changes of the weights ------------------------------------------------------------------------


def _set(module: Any, name: str, value: Any) -> None:
    setattr(module, name, value)


AT_ONCE: dict[str, Callable[[Any, str, Tensor], Any]] = {
    "in place": lambda m, name, p: p.mul_(1.5),
    "one number in place": lambda m, name, p: p.view(-1)[-1].add_(1),
    "load_state_dict": lambda m, name, p: m.load_state_dict(m.state_dict() | {name: p + 1}),
    "load_state_dict, assign": lambda m, name, p: m.load_state_dict(m.state_dict() | {name: p + 1}, assign=True),
    "replaced": lambda m, name, p: _set(m, name, nn.Parameter(p + 1)),
    "deleted": lambda m, name, p: delattr(m, name),
    "None": lambda m, name, p: m.register_parameter(name, None),
    "replace .data": lambda m, name, p: _set(p, "data", p + 1),
    "another dtype": lambda m, name, p: m.half(),
    "parametrized": lambda m, name, p: parametrizations.weight_norm(m, name, dim=None),
    "reset_parameters": lambda m, name, p: m.reset_parameters(),
    "an optimizer's step": lambda m, name, p: _step(p),
}


def _step(p: Tensor) -> None:
    p.grad = torch.ones_like(p)
    torch.optim.SGD([p], 0.1).step()


UNSEEN: dict[str, Callable[[Tensor], Any]] = {
    "all of .data": lambda p: p.data.mul_(1.5),
    "one number of .data": lambda p: p.data.view(-1)[p.numel() // 2].add_(1),
    "the sign of a zero": lambda p: p.data.view(-1)[3].neg_(),
    "the last number of .data": lambda p: p.data.view(-1)[-1].add_(1),
    "numpy": lambda p: p.detach().numpy().__setitem__(0, 7.0),
    "another order": lambda p: setattr(p, "data", p.data.t() if p.dim() == 2 else p.data[:-1]),
    "another shape": lambda p: setattr(p, "data", p.data[:-1]),
}
WATCHED: dict[str, Callable[[], Any]] = {
    "stack": lambda: rnnattn.LSTM(8, 8, 2, bidirectional=True, proj_size=4),
    "large": lambda: rnnattn.GRU(40, 50),
    "tiny": lambda: rnnattn.RNN(1, 4, bias=False),
    "cell": lambda: rnnattn.LSTMCell(3, 4),
}
watched = pytest.mark.parametrize("make", WATCHED.values(), ids=WATCHED)


def call(prepared: Any, times: int = 1) -> None:
    for _ in range(times):
        prepared(torch.randn(2, *([2] if hasattr(prepared, "batch_first") else []), prepared.input_size))


@pytest.mark.parametrize("change", AT_ONCE.values(), ids=AT_ONCE)
@watched
def test_changes_that_torch_sees_are_found_at_once(make: Callable[[], Any], change: Callable[..., Any]) -> None:
    names = [name for name, _ in make().named_parameters()]
    for name in names:
        module = make()
        prepared = module.prepare_inference()
        call(prepared, 3)
        change(module, name, module.get_parameter(name))
        for _ in range(2):  # and found again
            with pytest.raises(RuntimeError, match=r"weights changed after prepare_inference\(\) .*; call it again"):
                call(prepared)


@pytest.mark.parametrize("change", UNSEEN.values(), ids=UNSEEN)
@watched
def test_changes_that_torch_does_not_see_are_found_within_parts(make: Any, change: Callable[[Tensor], Any]) -> None:
    names = [name for name, _ in make().named_parameters()]
    for name in (names[0], names[len(names) // 2], names[-1]):
        module = make()
        for p in module.parameters():
            p.view(-1)[3] = 0
        prepared = module.prepare_inference()
        call(prepared, 5)
        change(module.get_parameter(name))
        with pytest.raises(RuntimeError, match=rf"weights changed .*\({name} "):
            call(prepared, PARTS)


def test_what_changes_no_weight_is_no_change() -> None:
    module = rnnattn.LSTM(I, H, 2)
    module.weight_hh_l0[0, 0] = torch.nan  # not equal to itself
    prepared = module.prepare_inference()
    module.train().eval().requires_grad_(False).to("cpu").float()
    module.zero_grad()
    module(torch.randn(3, 2, I))
    pickle.dumps(module), copy.deepcopy(module).weight_ih_l0.zero_(), module.state_dict()
    with torch.enable_grad():
        module.requires_grad_()(torch.randn(3, 2, I))[0].sum().backward()
    call(prepared, 2 * PARTS)


@pytest.mark.parametrize("write", [lambda p: p.mul_(2), lambda p: p.numpy().fill(2)], ids=["in place", "numpy"])
def test_inference_tensors_count_no_writes(write: Callable[[Tensor], Any]) -> None:
    with torch.inference_mode():
        module = rnnattn.LSTM(I, H)
        assert module.weight_hh_l0.is_inference()
        prepared = module.prepare_inference()
        call(prepared, PARTS)
        write(module.weight_hh_l0)
        with pytest.raises(RuntimeError, match=r"weights changed .*\(weight_hh_l0 "):
            call(prepared, PARTS)


@pytest.mark.parametrize("kind", ["LSTM", "GRUCell"])
def test_the_module_may_go_and_its_memory_with_it(kind: str) -> None:
    module = getattr(rnnattn, kind)(I, H)
    prepared = module.prepare_inference()
    call(prepared)
    p = weakref.ref(module.weight_hh_l0 if kind == "LSTM" else module.weight_hh)
    storage = StorageWeakRef(p().untyped_storage())
    del module
    gc.collect()
    assert p() is None and storage.expired()
    call(prepared, 2)


# --- copies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["LSTM", "RNN", "LSTMCell", "GRUCell"])
@pytest.mark.parametrize("precision", ["float", "int8"])
def test_copies_have_the_same_results(kind: str, precision: str) -> None:
    with torch.inference_mode():
        prepared = getattr(rnnattn, kind)(I, H).prepare_inference(precision)
    x = torch.randn(*([4] if "Cell" not in kind else []), 3, I)
    for other in (copy.copy(prepared), copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        close(other(x), prepared(x))
        close(other(x, other(x)[1] if "Cell" not in kind else other(x)),
              prepared(x, prepared(x)[1] if "Cell" not in kind else prepared(x)))  # fmt: skip
        assert repr(other) == repr(prepared)
        assert not other.state_dict() and not list(other.children()) and not list(other.parameters())


def test_a_deep_copy_watches_the_module_or_its_copy() -> None:
    model = nn.ModuleDict({"lstm": rnnattn.LSTM(I, H)})
    model["fast"] = model["lstm"].prepare_inference()
    alone, both = copy.deepcopy(model["fast"]), copy.deepcopy(model)
    pickled = pickle.loads(pickle.dumps(model["fast"]))
    model["lstm"].weight_hh_l0.add_(1)
    call(both["fast"], PARTS)
    call(pickled, PARTS)
    for prepared in (alone, copy.copy(alone), model["fast"]):
        with pytest.raises(RuntimeError, match="weights changed"):
            call(prepared)
    both["lstm"].weight_hh_l0.data.add_(1)
    with pytest.raises(RuntimeError, match="weights changed"):
        call(both["fast"], PARTS)
    with pytest.raises(RuntimeError, match="weights changed"):
        copy.deepcopy(both)  # its copy would take the changed weights for those that were packed


UNPICKLE = """
import pickle, sys
x, y, data = pickle.loads(sys.stdin.buffer.read())
try:
    prepared = pickle.loads(data)
except RuntimeError as error:
    sys.exit(f"refused: {error}")
import torch
sys.exit(0 if torch.equal(prepared(x)[0], y) else "other numbers")
"""


def unpickled_elsewhere(isa: str) -> str:
    prepared = rnnattn.GRU(I, H).prepare_inference()
    x = torch.randn(3, 2, I)
    message = pickle.dumps((x, prepared(x)[0], pickle.dumps(prepared)))
    done = subprocess.run(
        [sys.executable, "-c", UNPICKLE], input=message, env=os.environ | {"RNNATTN_CPU_ISA": isa}, capture_output=True,
        timeout=120,
    )  # fmt: skip
    return done.stderr.decode()


def test_pickled_to_another_process() -> None:
    assert unpickled_elsewhere(str(backends.build_info()["isa"])) == ""


@pytest.mark.skipif(bool(reason) or len(cpp.build_info()["isas"]) < 2, reason="one instruction set")
def test_the_packed_order_of_another_instruction_set_is_refused() -> None:
    isa = str(backends.build_info()["isas"][-1])
    assert isa != backends.build_info()["isa"]
    assert "refused: prepared weights: expected the layout of rnnattn" in unpickled_elsewhere(isa)
