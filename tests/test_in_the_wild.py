"""What programs do with modules: processes, threads, modes, wrappers, hooks, quantization, several ranks.

Elsewhere: what is done to their weights (test_changed_weights), what direct calls leave to the long way
(test_direct_calls, test_direct_forms), the engine's threads and processes (test_threads), torch.func
(test_torch_func), swap.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from cases import F32, F64
from tolerances import close
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import stateless
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from twins import TABLE, H, I, flat, hh, inputs, loss_of, pair_of, same, scale, smaller, train

import rnnattn

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
each = pytest.mark.parametrize("name", TABLE)
linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks")


# --- processes and threads -------------------------------------------------------------------------


def trained(model: Any, x: Any) -> list[Tensor]:
    """Parameters and gradients after a step on each of x. By hand: an optimizer takes long to import in a process."""
    for t in x:
        model.zero_grad(set_to_none=False)
        sum(r.square().mean() for r in flat(model(t))).backward()
        with torch.no_grad():
            used = [p for p in model.parameters() if p.grad is not None]
            for p in used:
                p.sub_(p.grad, alpha=0.1)
    return [t.detach().clone() for p in used for t in (p, p.grad)]


@linux_only
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_weights_in_shared_memory_are_trained_by_another_process(method: str) -> None:
    theirs, ours = pair_of("lstm")
    same(theirs, ours.share_memory())
    ours.zero_grad()
    x = [inputs(ours) for _ in range(3)]
    process = mp.get_context(method).Process(target=trained, args=(ours, x), daemon=True)
    process.start(), process.join(60)
    assert process.exitcode == 0
    trained(theirs, x), same(theirs, ours)


@linux_only
@each
def test_two_forked_workers_infer_while_the_parent_trains(name: str) -> None:
    theirs, ours = pair_of(name)
    same(theirs, ours)
    x = [inputs(ours) for _ in range(4)]
    infer = torch.no_grad()(lambda t: flat(ours(t)))
    want = [[t.detach() for t in flat(theirs(t))] for t in x]
    loader = DataLoader(x, None, num_workers=2, collate_fn=infer, multiprocessing_context="fork")  # type: ignore[arg-type]
    for n, got in enumerate(loader):
        close(got, want[n])  # by the weights of the time when they forked
        same(theirs, ours), scale(theirs), scale(ours)


@each
def test_eight_threads_share_a_module_that_was_never_called(name: str) -> None:
    """Without gradients, and with those of all calls added up in the parameters."""
    theirs, ours = pair_of(name)
    x = [inputs(ours, 1 + n % 3) for n in range(32)]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(torch.no_grad()(lambda t: flat(ours(t))), x))
        list(pool.map(lambda t: loss_of(ours(t)).backward(), x))
    for t, results in zip(x, got, strict=True):
        want = flat(theirs(t))
        close(results, [r.detach() for r in want])
        loss_of(want).backward()
    close([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])


# --- modes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@each
def test_inference_then_training(name: str, mode: Callable[[], AbstractContextManager[None]]) -> None:
    theirs, ours = pair_of(name)
    for _ in range(2):
        with mode():
            x = inputs(ours)
            for _ in range(2):
                close(flat(ours.eval()(x)), flat(theirs.eval()(x)))
        same(theirs.train(), ours.train())
        for module in (theirs, ours) if x.is_inference() else ():
            with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
                module(x)


@each
def test_anomaly_mode(name: str) -> None:
    theirs, ours = pair_of(name)
    with torch.autograd.detect_anomaly():
        same(theirs, ours)
        for module in (theirs, ours):
            module.get_parameter(hh(module)).data[0] = torch.nan
            with pytest.raises(RuntimeError, match="returned nan values"):
                train(module, inputs(module))


@each
def test_settings_of_the_process(name: str) -> None:
    """Deterministic algorithms, another default dtype, and meta as the device until the weights are loaded."""
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        torch.use_deterministic_algorithms(True)
        torch.set_default_dtype(F64)
        theirs, ours = pair_of(name, dtype=None)
        same(theirs, ours)
        torch.set_default_device("meta")
        empty = pair_of(name)
        for x_grad in (False, True):
            want, got = (train(module, inputs(module), x_grad=x_grad) for module in empty)
            assert got["results"][0].is_meta
            torch.testing.assert_close(got, want)  # shapes and dtypes
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(F32)
        torch.use_deterministic_algorithms(True, warn_only=warn_only)
    for module in (empty[1], copy.deepcopy(ours).to("meta")):
        torch.testing.assert_close(train(module, inputs(module)), want)
        module.to_empty(device="cpu").load_state_dict(theirs.state_dict())
        same(theirs, module)


@each
def test_complex_numbers(name: str) -> None:
    """No kernel of ours has them: torch's own run."""
    pair, results = pair_of(name, dtype=torch.complex128), []
    x = inputs(pair[1]).requires_grad_()
    for module in pair:
        outputs = flat(module(x))
        loss = sum(t.abs().square().sum() for t in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, [x, *module.parameters()])])
    close(results[1], results[0])


# --- wrappers and hooks ----------------------------------------------------------------------------


def under(context: Callable[[], Any]) -> Callable[[nn.Module, Tensor], Any]:
    def call(module: nn.Module, x: Tensor) -> Any:
        with context():
            return module(x)

    return call


def replica(module: Any, x: Tensor) -> list[Any]:
    """As torch.nn.parallel.replicate makes one: in the places of the parameters are tensors that lead to them."""
    other, results = module._replicate_for_data_parallel(), []
    for factor in (0.5, 0.7):
        for key, p in module.named_parameters():
            setattr(other, key, p * factor)
        results.append(other(x))
    return results


WRAPPERS: dict[str, Callable[[Any, Tensor], Any]] = {
    "checkpoint": lambda m, x: checkpoint(m, x, use_reentrant=False),
    "checkpoint, reentrant": lambda m, x: checkpoint(m, x, use_reentrant=True),
    "saved as arrays": under(lambda: saved_tensors_hooks(lambda t: t.detach().numpy().copy(), torch.from_numpy)),
    "save_on_cpu": under(save_on_cpu),
    "DataParallel": lambda m, x: DataParallel(m)(x),
    "replica": replica,
    "two modules of the same weights": lambda m, x: [m(x), copy.copy(m)(x * 2)],
    "functional_call": lambda m, x: torch.func.functional_call(m, smaller(m), (x,)),
    "stateless": lambda m, x: stateless.functional_call(m, smaller(m), (x,)),
}


@pytest.mark.parametrize("call", WRAPPERS.values(), ids=WRAPPERS)
@each
def test_wrappers(name: str, call: Callable[[Any, Tensor], Any]) -> None:
    pair = pair_of(name)
    for _ in range(2):
        same(*pair)
        x = inputs(pair[0])
        want, got = (train(module, x, lambda t, module=module: call(module, t)) for module in pair)
        close(got, want)


@each
def test_checkpoint_of_a_module_that_was_never_called(name: str) -> None:
    """What a backward computes again has to be what the first call kept, though later ones may go another way."""
    theirs, ours = pair_of(name)
    x = inputs(theirs)
    want, got = (train(m, x, lambda t, m=m: checkpoint(m, t, use_reentrant=False)) for m in (theirs, ours))
    close(got, want)


@each
def test_hooks(name: str) -> None:
    """They see what torch.nn's see, and change results and gradients as they do there."""
    seen: list[list[Any]] = [[], []]
    pair = pair_of(name)
    for module, log in zip(pair, seen, strict=True):
        weight = module.get_parameter(hh(module))
        weight.register_hook(lambda d: d * 2)
        weight.register_post_accumulate_grad_hook(lambda p, log=log: log.append(p.grad.clone()))
        module.register_forward_pre_hook(lambda m, x: (x[0] * 3,))
        module.register_forward_hook(lambda m, x, r: r * 1.5 if isinstance(r, Tensor) else (r[0] * 1.5, r[1]))
        module.register_full_backward_pre_hook(lambda m, d: tuple(t if t is None else t * 0.5 for t in d))
        module.register_full_backward_hook(lambda m, dx, dy, log=log: log.extend([*dx, *dy]))
    same(*pair), same(*pair)
    assert len(seen[1]) >= 4 * 3
    close(seen[1], seen[0])


@each
def test_a_training_loop(name: str) -> None:
    """Gradients of two backwards, scaled, clipped; a step left out for an infinite one; averaged weights."""
    results, pair = [], pair_of(name)
    batches = [[inputs(pair[0]), inputs(pair[0]) / (n < 2)] for n in range(3)]
    for module in pair:
        optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        averaged, norms = torch.optim.swa_utils.AveragedModel(module), []
        for batch in batches:
            optimizer.zero_grad()
            for x in batch:
                scaler.scale(loss_of(module(x))).backward()
            scaler.unscale_(optimizer)
            norms.append(nn.utils.clip_grad_norm_(module.parameters(), 0.5))
            scaler.step(optimizer), scaler.update(), averaged.update_parameters(module)
        assert scaler.get_scale() == 512 and norms[0] > 0.5
        outputs = [t.detach() for t in flat([averaged(batches[0][0]), module(batches[0][0])])]
        results.append([norms[:2], outputs, averaged.state_dict(), module.state_dict()])
    close(results[1], results[0])


class Tagger(nn.Module):
    """Ours between layers that can be quantized; `unused` is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(I, I), nn.Linear(H, 3)
        self.quant, self.dequant = torch.ao.quantization.QuantStub(), torch.ao.quantization.DeQuantStub()
        self.layer, self.cell, self.unused = rnnattn.LSTM(I, H), rnnattn.GRUCell(H, H), rnnattn.GRU(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.cell(self.layer(self.dequant(self.first(self.quant(x))))[0][-1])
        return self.dequant(self.last(self.quant(h)))


@pytest.mark.parametrize("way", ["dynamic", "static"])
def test_quantization_leaves_ours_alone(way: str) -> None:
    model, x = Tagger().eval(), torch.randn(4, 3, I)
    want = model(x)
    if way == "dynamic":
        quantized = torch.ao.quantization.quantize_dynamic(model)
    else:
        model.qconfig = torch.ao.quantization.get_default_qconfig(torch.backends.quantized.engine)
        prepared = torch.ao.quantization.prepare(model)
        for _ in range(2):
            torch.testing.assert_close(prepared(x), want, rtol=1e-6, atol=1e-6)
        quantized = torch.ao.quantization.convert(prepared)
    assert type(quantized.layer) is rnnattn.LSTM and type(quantized.cell) is rnnattn.GRUCell
    assert type(quantized.first) is not nn.Linear and type(quantized.last) is not nn.Linear
    for _ in range(2):
        torch.testing.assert_close(quantized(x), want, rtol=0, atol=0.05)  # of 8 bits
        assert not torch.equal(quantized(x), want)


DDP: list[dict[str, bool]] = [{"find_unused_parameters": True}, {}, {"gradient_as_bucket_view": True}]


def rank(number: int, store: str, models: list[Tagger], x: Tensor, want: list[list[Tensor]]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    for options, model, expected in zip(DDP, models, want, strict=True):
        own = copy.deepcopy(model)  # what it was sent is in memory that all processes share
        close(trained(DistributedDataParallel(own, **options), x[:, :, 2 * number :][:, :, :2]), expected)
    torch.distributed.barrier()  # none leaves while the other still hears from it
    torch.distributed.destroy_process_group()
    os._exit(0)  # a process that ends by itself was seen to abort, rarely, in a thread of torch's that was still there


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not available")
def test_distributed_data_parallel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two processes has half of the batch, and ends where torch.nn's layers end with the whole."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    models, x = [Tagger().double() for _ in DDP], torch.randn(2, 4, 4, I, dtype=F64)
    for model in models[1:]:
        del model.unused
    want = [trained(rnnattn.unswap(copy.deepcopy(model)).model, x) for model in models]
    mp.spawn(rank, (os.fspath(tmp_path / "store"), models, x, want), nprocs=2)
