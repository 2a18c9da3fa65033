"""PyTorch's own inputs for its recurrent modules, good and bad, given to ours: results, gradients, names, errors."""

from __future__ import annotations

import copy
import pickle
from collections import defaultdict
from statistics import median
from typing import Any

import pytest
import torch
from cases import F32, F64, backend_parameters
from tolerances import relative_error
from torch import Tensor, nn
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db
from torch.utils._pytree import tree_leaves, tree_map

import rnnattn

on_each_backend = pytest.mark.usefixtures("chosen")
OURS: dict[Any, Any] = {
    nn.LSTM: rnnattn.LSTM, nn.GRU: rnnattn.GRU, nn.RNN: rnnattn.RNN,
    nn.LSTMCell: rnnattn.LSTMCell, nn.GRUCell: rnnattn.GRUCell, nn.RNNCell: rnnattn.RNNCell,
}  # fmt: skip
INFOS = {info.module_cls.__name__: info for info in module_db if info.module_cls in OURS}
each_class = pytest.mark.parametrize("name", INFOS)
EPS = 32  # of float64, of the relative L2 difference: sums of a gradient run in another order than torch's


def test_all_six_are_here() -> None:
    assert len(INFOS) == 6


def inputs_of(name: str, dtype: torch.dtype, training: bool = True) -> list[Any]:
    info = INFOS[name]
    return info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)


def twins(name: str, given: Any, dtype: torch.dtype = F64, training: bool = True) -> tuple[nn.Module, nn.Module]:
    """torch.nn's module of an input and ours with the same parameters."""
    theirs_type, constructor = INFOS[name].module_cls, given.constructor_input
    theirs = theirs_type(*constructor.args, **constructor.kwargs).to(dtype).train(training)
    ours = OURS[theirs_type](*constructor.args, **constructor.kwargs).to(dtype).train(training)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def fresh(value: Any) -> Any:
    """Copies with gradients of their own, strides kept."""
    return tree_map(lambda t: t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t, value)


def results(module: nn.Module, args: Any, kwargs: Any) -> list[Tensor]:
    """Outputs, and their gradients with random cotangents with respect to parameters and arguments."""
    args, kwargs = fresh((args, kwargs))
    outputs = tensors(module(*args, **kwargs))
    draw = torch.Generator().manual_seed(3)
    cotangents = [torch.randn(t.shape, generator=draw).to(t.dtype) for t in outputs]  # the same in every dtype
    leaves = [*module.parameters(), *(t for t in tensors((args, kwargs)) if t.requires_grad)]
    return [*outputs, *torch.autograd.grad(outputs, leaves, cotangents)]


def same(got: list[Tensor], want: list[Tensor]) -> None:
    for mine, theirs in zip(got, want, strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype == F64
        assert relative_error(mine, theirs) <= EPS * torch.finfo(F64).eps


@on_each_backend
@each_class
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_results_and_gradients(name: str, training: bool) -> None:
    for given in inputs_of(name, F64, training):
        theirs, ours = twins(name, given, F64, training)
        args, kwargs = given.forward_input.args, given.forward_input.kwargs
        want = results(theirs, args, kwargs)
        for _ in range(2):  # the second time a layer may go directly to its kernels
            same(results(ours, args, kwargs), want)


@each_class
@pytest.mark.parametrize("backend", backend_parameters("cpp"))
def test_errors_are_at_most_torchs_in_fp32(name: str, backend: str) -> None:
    """The median error of every result over 20 seeds, beside float64, for some of the settings."""
    eps, errors = torch.finfo(F32).eps, defaultdict[tuple[int, int], list[tuple[float, float]]](list)
    for seed in range(20):
        torch.manual_seed(seed)
        for setting, given in enumerate(inputs_of(name, F32)[::3]):
            theirs, ours = twins(name, given, F32)
            args, kwargs = given.forward_input.args, given.forward_input.kwargs
            torchs = results(theirs, args, kwargs)
            with rnnattn.use_backend(backend):
                mine = results(ours, args, kwargs)
            wide = tree_map(
                lambda t: t.detach().double().requires_grad_() if isinstance(t, Tensor) else t, (args, kwargs)
            )
            for n, truth in enumerate(results(theirs.double(), *wide)):
                errors[setting, n].append((relative_error(mine[n], truth), relative_error(torchs[n], truth)))
    assert len(errors) >= 6
    for samples in errors.values():
        own, others = (median(column) for column in zip(*samples, strict=True))
        assert own <= max(1.5 * others, 4 * eps)


@on_each_backend
@each_class
def test_names_and_copies(name: str) -> None:
    for given in inputs_of(name, F64):
        theirs, ours = twins(name, given)
        args, kwargs = given.forward_input.args, given.forward_input.kwargs
        assert repr(ours) == repr(theirs)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
        assert set(theirs.__constants__) <= set(ours.__constants__)
        want = results(ours, args, kwargs)
        for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert repr(twin) == repr(theirs)
            same(results(twin, args, kwargs), want)


@on_each_backend
@each_class
def test_arguments_of_any_layout(name: str) -> None:
    """Not contiguous, and of another memory format: with gaps between elements, or dimensions swapped."""

    def gaps(t: Any) -> Any:
        if not isinstance(t, Tensor) or t.dim() == 0:
            return t
        apart = torch.full((*t.shape, 2), torch.nan, dtype=t.dtype)
        apart[..., 0] = t.detach()
        return apart[..., 0].requires_grad_(t.requires_grad)

    def swapped(t: Any) -> Any:
        if not isinstance(t, Tensor) or t.dim() < 2:
            return t
        return t.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_(t.requires_grad)

    for given in inputs_of(name, F64):
        theirs, ours = twins(name, given)
        args, kwargs = given.forward_input.args, given.forward_input.kwargs
        want, inference = results(theirs, args, kwargs), outputs_only(theirs, args, kwargs)
        for change in (gaps, swapped):
            arguments = tree_map(change, (args, kwargs))
            for _ in range(2):
                same(outputs_only(ours, *arguments), inference)
                same(results(ours, *arguments), want)


def in_float64(value: Any) -> Any:
    return value.detach().double().requires_grad_() if isinstance(value, Tensor) else value


def outputs_only(module: nn.Module, args: Any, kwargs: Any) -> list[Tensor]:
    with torch.no_grad():
        return tensors(module(*args, **kwargs))


@on_each_backend
@each_class
def test_parameters_of_any_layout(name: str) -> None:
    for given in inputs_of(name, F64):
        theirs, ours = twins(name, given)
        args, kwargs = given.forward_input.args, given.forward_input.kwargs
        want = results(theirs, args, kwargs)
        for parameter in ours.parameters():
            parameter.data = torch.stack([parameter.data, torch.full_like(parameter.data, torch.nan)], -1)[..., 0]
        for _ in range(2):
            same(results(ours, args, kwargs), want)


@on_each_backend
@each_class
def test_moves_and_factory_arguments(name: str) -> None:
    """device and dtype, as every module of torch.nn takes them, and what to() and its like do."""
    for given in inputs_of(name, F64)[:4]:
        constructor, args = given.constructor_input, given.forward_input.args
        ours_type = OURS[INFOS[name].module_cls]
        made = ours_type(*constructor.args, **(constructor.kwargs | {"device": "meta", "dtype": torch.float16}))
        assert {(p.device.type, p.dtype) for p in made.parameters()} == {("meta", torch.float16)}
        theirs, ours = twins(name, given)
        want = outputs_only(theirs, args, given.forward_input.kwargs)
        for moved in (ours.half().double(), ours.to("cpu"), ours.to(F32).to(F64), ours.type(F64), ours.share_memory()):
            assert moved is ours
        ours.load_state_dict(theirs.state_dict())
        same(outputs_only(ours, args, given.forward_input.kwargs), want)


@on_each_backend
@each_class
def test_bad_inputs_raise_the_same(name: str) -> None:
    info = INFOS[name]
    given = info.module_error_inputs_func(info, device="cpu", dtype=F64, requires_grad=False, training=True)
    assert given
    for error in given:
        constructor = error.module_error_input.constructor_input
        raised = []
        for kind in (info.module_cls, OURS[info.module_cls]):
            with pytest.raises(error.error_type, match=error.error_regex) as caught:
                module = kind(*constructor.args, **constructor.kwargs)
                if error.error_on is ModuleErrorEnum.FORWARD_ERROR:
                    forward = error.module_error_input.forward_input
                    module(*forward.args, **forward.kwargs)
            raised.append((caught.type, str(caught.value)))
        assert raised[0] == raised[1]
