"""`return_cells`: the cell states of every step, in all that a layer's input may be, with all their derivatives.

The shared cases have rows of it for every backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import F32, F64
from recurrent_cases import RecurrentCase
from tolerances import close
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import rnnattn
from rnnattn import backends
from rnnattn import functional as RF
from rnnattn.backends import Call

I, H, B, T = 3, 4, 3, 6
LENGTHS = (4, 6, 1)
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stack": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "projection": {"proj_size": 2, "bidirectional": True},
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def layer(kind: str = "plain", **settings: Any) -> Any:
    return rnnattn.LSTM(I, H, dtype=F64, **(KINDS[kind] | settings))


def initial(module: nn.RNNBase) -> tuple[Tensor, Tensor]:
    LK = module.num_layers * (1 + module.bidirectional)
    h0, c0 = (torch.randn(LK, B, n, dtype=F64, requires_grad=True) for n in (module.proj_size or H, H))
    return h0, c0


def sequence(module: nn.RNNBase) -> Tensor:
    return torch.randn(*((B, T) if module.batch_first else (T, B)), I, dtype=F64, requires_grad=True)


def in_a_row(results: Any) -> list[Tensor]:
    output, states, cells = results
    return [output, *states, cells]


def differentiated(outputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """With cotangents that depend on the shapes alone."""
    draw = torch.Generator().manual_seed(3)
    cotangents = [torch.randn(value.shape, generator=draw, dtype=F64) for value in outputs]
    return list(torch.autograd.grad(outputs, leaves, cotangents))


def agree(got: list[Tensor], want: list[Tensor], leaves: list[Tensor]) -> None:
    close(got, want)
    close(differentiated(got, leaves), differentiated(want, leaves))


# --- what they are ---------------------------------------------------------------------------------


@pytest.mark.parametrize("with_resets", [False, True], ids=["whole", "episodes"])
@pytest.mark.parametrize("settings", [{}, {"num_layers": 2, "proj_size": 2}], ids=["one", "stack"])
def test_they_are_c_n_of_single_steps(settings: dict[str, Any], with_resets: bool, own_backend: str) -> None:
    module = layer(**settings)
    x, hx, resets = sequence(module), initial(module), torch.rand(T, B) < 0.4 if with_resets else None
    got = module(x, hx, resets=resets, return_cells=True)
    steps, state = [], hx
    for t in range(T):
        y, state = module(x[t : t + 1], state, resets=None if resets is None else resets[t : t + 1])
        steps.append((y, state[1][-1:]))
    y, cells = (torch.cat(parts) for parts in zip(*steps, strict=True))
    agree(in_a_row(got), [y, *state, cells], [x, *hx, *module.parameters()])


@each_kind
def test_the_other_results_are_the_same(kind: str, own_backend: str) -> None:
    module = layer(kind)
    x, hx = sequence(module), initial(module)
    for lengths in (None, LENGTHS):
        output, states = module(x, hx, lengths=lengths)
        got = module(x, hx, lengths=lengths, return_cells=True)
        assert type(got) is tuple and len(got) == 3
        close([got[0], *got[1]], [output, *states])
        with torch.no_grad():
            close(in_a_row(module(x, hx, lengths=lengths, return_cells=True)), [v.detach() for v in in_a_row(got)])
        with torch.inference_mode():
            close(in_a_row(module(x, hx, lengths=lengths, return_cells=True)), [v.detach() for v in in_a_row(got)])
    plain = layer()
    want, _, cells = plain(x.view(T, B, I), return_cells=True)
    close(plain(x.view(T, B, I))[0], want)
    close(plain(x.view(T, B, I), return_cells=True)[2], cells)  # not what goes directly to the kernels
    assert len(plain(x.view(T, B, I), None, None, None, False)) == 2


def test_the_functional(own_backend: str) -> None:
    module = layer("stack")
    x, hx = sequence(module), initial(module)
    weights = list(module.parameters())
    got = RF.lstm(x, hx, weights, num_layers=2, bidirectional=True, batch_first=True, return_cells=True)
    close(list(got), in_a_row(module(x, hx, return_cells=True)))


def test_dropout_is_before_the_last_layer(own_backend: str) -> None:
    module, layers = layer(num_layers=2, dropout=0.5), [layer(), rnnattn.LSTM(H, H, dtype=F64)]
    for n, own in enumerate(layers):
        own.load_state_dict({f"{name[:-1]}0": p for name, p in module.named_parameters() if name.endswith(f"l{n}")})
    x = sequence(module)
    torch.manual_seed(5)
    _, _, cells = module(x, return_cells=True)
    torch.manual_seed(5)
    between = nn.functional.dropout(layers[0](x)[0], 0.5)
    close(cells, layers[1](between, return_cells=True)[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F32])
def test_their_dtype_is_the_outputs(dtype: torch.dtype, own_backend: str) -> None:
    module = rnnattn.LSTM(I, H, bidirectional=True)
    x = torch.randn(T, B, I)
    want = in_a_row(module(x, lengths=LENGTHS, return_cells=True))
    with torch.autocast("cpu", dtype, enabled=dtype != F32):
        got = in_a_row(module(x, lengths=LENGTHS, return_cells=True))
    assert {value.dtype for value in got} == {dtype}
    for mine, full in zip(got, want, strict=True):
        torch.testing.assert_close(mine.float(), full, rtol=0.05, atol=0.02)
    got[3].float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


# --- what the input may be -------------------------------------------------------------------------


@each_kind
def test_a_packed_sequence(kind: str, own_backend: str) -> None:
    module = layer(kind)
    x, hx, lengths, first = sequence(module), initial(module), torch.tensor(LENGTHS), module.batch_first
    packed = pack_padded_sequence(x, lengths, batch_first=first, enforce_sorted=False)
    output, states, cells = module(packed, hx, return_cells=True)
    assert isinstance(cells, PackedSequence) and torch.equal(cells.batch_sizes, packed.batch_sizes)
    got = [pad_packed_sequence(p, batch_first=first)[0] for p in (output, cells)]
    want = in_a_row(module(x, hx, lengths=lengths, return_cells=True))
    agree([got[0], *states, got[1]], want, [x, *hx, *module.parameters()])


@pytest.mark.filterwarnings("ignore")
@each_kind
def test_a_nested_tensor(kind: str, own_backend: str) -> None:
    module = layer(kind)
    rows, hx = [torch.randn(n, I, dtype=F64, requires_grad=True) for n in LENGTHS], initial(module)
    output, states, cells = module(torch.nested.as_nested_tensor(rows, layout=torch.jagged), hx, return_cells=True)
    assert cells.is_nested and cells.layout == torch.jagged
    x = nn.utils.rnn.pad_sequence(rows, batch_first=module.batch_first)
    padded, *rest, padded_cells = in_a_row(module(x, hx, lengths=LENGTHS, return_cells=True))
    kept = [s if module.batch_first else s.transpose(0, 1) for s in (padded, padded_cells)]
    want = [s[b, :n] for s in kept for b, n in enumerate(LENGTHS)]
    agree([*output.unbind(), *cells.unbind(), *states], [*want, *rest], [*rows, *hx, *module.parameters()])


@each_kind
def test_an_unbatched_sequence(kind: str, own_backend: str) -> None:
    module = layer(kind)
    x, dim = torch.randn(T, I, dtype=F64), 0 if module.batch_first else 1
    output, states, cells = module(x, resets=torch.arange(T) == 3, return_cells=True)
    begins = (torch.arange(T) == 3).unsqueeze(dim)
    want, finals, want_cells = module(x.unsqueeze(dim), resets=begins, return_cells=True)
    close([output, *states, cells], [want.squeeze(dim), *(s.squeeze(1) for s in finals), want_cells.squeeze(dim)])


# --- who looks on ----------------------------------------------------------------------------------


def test_compiled(own_backend: str) -> None:
    module = layer("stack", proj_size=2)
    x, hx = sequence(module), initial(module)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, *hx: in_a_row(module(x, hx, lengths=torch.tensor(LENGTHS), return_cells=True)),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    want = in_a_row(module(x, hx, lengths=LENGTHS, return_cells=True))
    agree(compiled(x, *hx), want, [x, *hx, *module.parameters()])
    with torch.no_grad():
        close(compiled(x, *hx), [value.detach() for value in want])
    torch._dynamo.reset()


CASES = {
    "ragged": RecurrentCase(2, 2, 2, 3, "", cells=True, states=True, lengths=(2, 1), direction="bidirectional", R=2),
    "stack": RecurrentCase(2, 2, 2, 2, "", cells=True, states=True, layers=2),
    "episodes": RecurrentCase(2, 3, 2, 3, "", cells=True, states=True, resets="some", to_initial=True),
}


def checked(name: str) -> tuple[Callable[..., Any], list[Tensor]]:
    case = CASES[name]
    t = case.tensors(F64)

    def layers(x: Tensor, h0: Tensor, c0: Tensor, *weights: Tensor) -> Any:
        return case.call(x, (h0, c0), weights, t["lengths"], t["resets"])

    return layers, [p.requires_grad_() for p in (t["x"], t["h0"], t["c0"], *t["weights"])]


@pytest.mark.parametrize("name", CASES)
def test_double_backward_and_forward_mode(name: str, own_backend: str) -> None:
    layers, inputs = checked(name)
    assert torch.autograd.gradgradcheck(layers, inputs, fast_mode=True)
    assert torch.autograd.gradcheck(layers, inputs, fast_mode=True, check_forward_ad=True)


def test_gradients_of_many_cotangents_at_once(own_backend: str) -> None:
    layers, inputs = checked("stack")
    assert torch.autograd.gradcheck(lambda *a: layers(*a)[3], inputs, check_batched_grad=True)


def test_transforms(own_backend: str) -> None:
    module = layer("projection")
    x, parameters = sequence(module).detach(), dict(module.named_parameters())

    def cells_of(x: Tensor, parameters: Any = parameters) -> Tensor:
        return functional_call(module, parameters, (x,), {"lengths": LENGTHS, "return_cells": True})[2]

    def loss(parameters: Any, x: Tensor) -> Tensor:
        return cells_of(x, parameters).square().sum()

    many = torch.stack([x, 2 * x])
    close(vmap(cells_of)(many), torch.stack([cells_of(one) for one in many]))
    samples = vmap(grad(loss), in_dims=(None, 0))(parameters, many)
    for n, one in enumerate(many):
        want = torch.autograd.grad(loss(parameters, one), list(parameters.values()))
        close(list(grad(loss)(parameters, one).values()), list(want))
        close([d[n] for d in samples.values()], list(want))
    tangent = torch.randn_like(x)
    of_cells = jacfwd(cells_of)(x)
    close(jacrev(cells_of)(x), of_cells)
    close(jvp(cells_of, (x,), (tangent,))[1], torch.tensordot(of_cells, tangent, 3))
    close(grad(lambda x: grad(loss, 1)(parameters, x).square().sum())(x), 2 * _hessian_of(loss, parameters, x))


def _hessian_of(loss: Callable[..., Tensor], parameters: Any, x: Tensor) -> Tensor:
    """The Hessian with respect to x times the gradient."""
    x = x.clone().requires_grad_()
    (d,) = torch.autograd.grad(loss(parameters, x), x, create_graph=True)
    return torch.autograd.grad(d, x, d.detach())[0]


# --- who gives none, and says so -------------------------------------------------------------------


def test_recompute_keeps_none() -> None:
    module = rnnattn.LSTM(I, H, recompute="chunk")
    with pytest.raises(ValueError, match="recompute: expected no return_cells with 'chunk'"):
        module(torch.randn(T, B, I), return_cells=True)
    assert len(module(torch.randn(T, B, I))) == 2


def test_torch_has_none() -> None:
    reason = backends.get("torch").unsupported(Call("lstm", "cpu", F32, 2, 3, 4, 5, cells=True))
    assert reason == "torch's own LSTM gives the cell state of the last step alone"
    module, x = rnnattn.LSTM(I, H), torch.randn(T, B, I)
    with rnnattn.use_backend("torch"), pytest.raises(rnnattn.BackendError, match="cell state of the last step alone"):
        module(x, return_cells=True)
    (decision,) = rnnattn.explain(module.bfloat16(), x.bfloat16(), return_cells=True)
    assert decision.call.cells and decision.others["torch"] == reason
    assert decision.backend == ("reference" if backends.unavailable("cpp") else "cpp")


@pytest.mark.parametrize("kind", ["GRU", "RNN"])
def test_other_cells_have_none(kind: str) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'return_cells'"):
        getattr(rnnattn, kind)(I, H)(torch.randn(T, B, I), return_cells=True)
