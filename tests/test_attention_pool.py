"""Attention pooling on every backend: numbers, exact promises, determinism, what is not computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import F32, F64, OWN, backend_parameters, device_of, moved, runs, truth
from pool_cases import POOL_CASES, SATURATED_POOL_CASES, PoolCase
from tolerances import TOLERANCES, assert_close, relative_error

import rnnattn
from rnnattn import functional as RF
from rnnattn import reference

CPU = torch.device("cpu")


def test_case_ids_are_unique() -> None:
    assert len({case.id for case in POOL_CASES}) == len(POOL_CASES)


@pytest.mark.parametrize("name, case, dtype", runs(POOL_CASES))
def test_forward_and_backward(name: str, case: PoolCase, dtype: torch.dtype) -> None:
    got = case.run(moved(case.tensors(dtype), device_of(name)), name)
    assert_close(got, truth(case, dtype), case.op, dtype, name)
    dropped, empty = ~case.kept(), ~case.kept().any(1)
    assert not got["dx"].cpu()[dropped].any()
    assert not got["pooled"].cpu()[empty].any()
    if "p" in got:
        assert not got["p"].cpu()[dropped].any()


@pytest.mark.parametrize("name, case, dtype", runs(SATURATED_POOL_CASES))
def test_saturation_stays_finite(name: str, case: PoolCase, dtype: torch.dtype) -> None:
    got, want = case.run(moved(case.tensors(dtype), device_of(name)), name), truth(case, dtype)
    forward = ("pooled", "p")
    assert_close({key: got[key] for key in forward}, {key: want[key] for key in forward}, case.op, dtype, name)
    assert all(value.isfinite().all() for value in got.values())


SOME = [case for case in POOL_CASES if case.reason.startswith(("the plain", "ragged with", "a mask with holes"))]


@pytest.mark.parametrize("name, case, dtype", runs(SOME, few=True))
def test_two_runs_are_bit_equal(name: str, case: PoolCase, dtype: torch.dtype) -> None:
    t = moved(case.tensors(dtype), device_of(name))
    first, second = case.run(t, name), case.run(t, name)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.parametrize("name, case, dtype", runs(SOME))
def test_pooled_does_not_depend_on_asking_for_weights(name: str, case: PoolCase, dtype: torch.dtype) -> None:
    t = moved(case.tensors(dtype), device_of(name))
    arguments = {"lengths": t["lengths"], "mask": t["mask"]}
    with rnnattn.use_backend(name):
        pooled, nothing = RF.attention_pool(t["x"], t["v"], t["w"], t["b"], **arguments)
        assert nothing is None
        again, p = RF.attention_pool(t["x"], t["v"], t["w"], t["b"], **arguments, need_weights=True)
    want = truth(case, dtype)
    for value in (pooled, again):
        assert_close({"pooled": value}, {"pooled": want["pooled"]}, case.op, dtype, name)
    assert p is not None
    assert_close({"p": p}, {"p": want["p"]}, case.op, dtype, name)


@pytest.mark.parametrize("name, case, dtype", runs(SOME, OWN))
def test_lse(name: str, case: PoolCase, dtype: torch.dtype) -> None:
    """The backward pass needs it: [B] in the accumulation type, -inf where nothing is kept."""
    t = moved(case.tensors(dtype), device_of(name))
    inputs = [t[key] for key in ("x", "v", "w", "b", "lengths", "mask")]
    _, _, want = reference.attention_pool_forward(*moved(inputs, F64))
    _, _, lse = torch.ops.rnnattn.attention_pool(*inputs, False, name)
    assert lse.dtype == (F64 if dtype == F64 else F32)
    kept = case.kept().any(1)
    assert torch.equal(lse.cpu().isinf(), ~kept)
    allowed = TOLERANCES["attention_pool"][lse.dtype] * torch.finfo(lse.dtype).eps
    assert relative_error(lse.cpu()[kept], want.cpu()[kept]) <= allowed


@pytest.mark.parametrize("backend", backend_parameters("reference", "cpp"))
@pytest.mark.parametrize(
    "case",
    [
        PoolCase(2, 4, 3, 0, "linear", lengths=(4, 2)),
        PoolCase(2, 3, 3, 2, "additive, masked", mask="holes"),
        PoolCase(3, 3, 2, 2, "rows that keep nothing", mask="empty_rows", bias=False),
    ],
    ids=lambda case: case.id,
)
def test_gradcheck(backend: str, case: PoolCase) -> None:
    t = case.tensors(F64)

    def pool(x: Any, v: Any, w: Any = None, b: Any = None) -> Any:
        with rnnattn.use_backend(backend):
            return RF.attention_pool(x, v, w, b, lengths=t["lengths"], mask=t["mask"], need_weights=True)

    assert torch.autograd.gradcheck(pool, [t[k].requires_grad_() for k in ("x", "v", "w", "b") if t[k] is not None])


ADDITIVE = PoolCase(3, 5, 6, 4, "additive")


@pytest.mark.parametrize("differentiable", [("x",), ("v",), ("w", "b"), ("x", "v", "w", "b")], ids="_".join)
def test_partial_gradients(backend: str, differentiable: tuple[str, ...]) -> None:
    t, want = moved(ADDITIVE.tensors(F32), device_of(backend)), truth(ADDITIVE, F32)
    for key in differentiable:
        t[key].requires_grad_()
    with rnnattn.use_backend(backend):
        pooled, p = RF.attention_pool(t["x"], t["v"], t["w"], t["b"], need_weights=True)
    torch.autograd.backward([pooled, p], [t["dpooled"], t["dp"]])
    for key in ("x", "v", "w", "b"):
        if key in differentiable:
            assert_close({"d" + key: t[key].grad}, {"d" + key: want["d" + key]}, ADDITIVE.op, F32)
        else:
            assert t[key].grad is None


def test_weights_without_a_cotangent(backend: str) -> None:
    """Weights that were asked for, and not differentiated through, change nothing in the gradients."""
    t = moved(ADDITIVE.tensors(F32), device_of(backend))
    t["x"].requires_grad_()
    with rnnattn.use_backend(backend):
        with_weights, _ = RF.attention_pool(t["x"], t["v"], t["w"], t["b"], need_weights=True)
        without, _ = RF.attention_pool(t["x"], t["v"], t["w"], t["b"])
    (a,), (b,) = (torch.autograd.grad(pooled, t["x"], t["dpooled"]) for pooled in (with_weights, without))
    assert a.abs().sum() > 0
    assert torch.equal(a, b)


def test_inputs_are_not_written(backend: str) -> None:
    t = moved(ADDITIVE.tensors(F32), device_of(backend))
    before = {key: value.clone() for key, value in t.items() if value is not None}
    ADDITIVE.run(t, backend)
    assert all(torch.equal(t[key], value) for key, value in before.items())


# --- the operators -------------------------------------------------------------------------------

OP_CASES = [
    PoolCase(3, 5, 6, 4, "additive, ragged", lengths=(5, 0, 2)),
    PoolCase(3, 5, 6, 0, "linear, masked", mask="holes"),
]


def _op_inputs(case: PoolCase, backend: str) -> tuple[dict[str, Any], list[Any]]:
    t = moved(case.tensors(F32), device_of(backend))
    return t, [t[key] for key in ("x", "v", "w", "b", "lengths", "mask")]


@pytest.mark.parametrize("case", OP_CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("grad", [False, True], ids=["plain", "grad"])
def test_opcheck(backend: str, case: PoolCase, grad: bool) -> None:
    _, inputs = _op_inputs(case, backend)
    for p in inputs[:4] if grad else ():
        if p is not None:
            p.requires_grad_()
    for need_weights in (False, True):
        torch.library.opcheck(torch.ops.rnnattn.attention_pool.default, (*inputs, need_weights, backend))


@pytest.mark.parametrize("case", OP_CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("given", [("dpooled", "dp"), ("dpooled",), ("dp",)], ids="_".join)
def test_opcheck_backward(backend: str, case: PoolCase, given: tuple[str, ...]) -> None:
    t, inputs = _op_inputs(case, backend)
    pooled, _, lse = torch.ops.rnnattn.attention_pool(*inputs, True, backend)
    cotangents = [t[name] if name in given else None for name in ("dpooled", "dp")]
    torch.library.opcheck(
        torch.ops.rnnattn.attention_pool_backward.default, (*cotangents, *inputs, pooled, lse, backend)
    )


@pytest.mark.parametrize("case", OP_CASES, ids=lambda case: case.id)
def test_results_are_contiguous_and_own_their_memory(backend: str, case: PoolCase) -> None:
    t, inputs = _op_inputs(case, backend)
    results = list(torch.ops.rnnattn.attention_pool(*inputs, True, backend))
    results += torch.ops.rnnattn.attention_pool_backward(
        t["dpooled"], t["dp"], *inputs, results[0], results[2], backend
    )
    results = [r for r in results if r.numel() > 0]
    assert all(r.is_contiguous() for r in results)
    memory = [r.untyped_storage().data_ptr() for r in (*results, *(p for p in inputs if p is not None))]
    assert len(set(memory)) == len(memory)


# --- accuracy beside torch -----------------------------------------------------------------------


BESIDE = [PoolCase(2, 24, 16, 0, "linear"), PoolCase(2, 24, 16, 8, "additive")]


@pytest.mark.parametrize("name, case, dtype", runs(BESIDE, OWN, few=True))
def test_error_is_at_most_torchs(name: str, case: PoolCase, dtype: torch.dtype) -> None:
    """The median error over 20 seeds is at most 1.1 times torch's (1.5 from fp32 on), or under 4 eps."""
    ours: dict[str, list[float]] = {}
    theirs: dict[str, list[float]] = {}
    for seed in range(20):
        t, want = moved(case.tensors(dtype, seed), device_of(name)), truth(case, dtype, seed)
        for errors, got in ((ours, case.run(t, name)), (theirs, _composed(case, t))):
            for key, value in got.items():
                errors.setdefault(key, []).append(relative_error(value, want[key]))
    eps, factor = torch.finfo(dtype).eps, 1.5 if dtype in (F32, F64) else 1.1
    for key, errors in ours.items():
        mine, torchs = (torch.tensor(e).median().item() for e in (errors, theirs[key]))
        assert mine <= max(factor * torchs, 4 * eps), f"{key}: {mine / eps:.2f} eps, torch {torchs / eps:.2f} eps"


def _composed(case: PoolCase, t: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The lines of PyTorch that `rnnattn.functional.attention_pool` says it is equivalent to."""
    leaves = {key: t[key].clone().requires_grad_() for key in ("x", "v", "w", "b") if t[key] is not None}
    x, v = leaves["x"], leaves["v"]
    scores = torch.tanh(F.linear(x, leaves["w"], leaves["b"])) @ v if case.A else x @ v
    p = scores.softmax(1)
    pooled = (p[:, None] @ x)[:, 0]
    gradients = torch.autograd.grad([pooled, p], list(leaves.values()), [t["dpooled"], t["dp"]])
    return {"pooled": pooled, "p": p} | {"d" + key: g for key, g in zip(leaves, gradients, strict=True)}
