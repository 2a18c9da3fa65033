"""A real model on real data: handwritten digits, before and after the swap.

Each 8 x 8 image is a sequence of 8 rows: bidirectional LSTM -> additive attention pooling -> 10
classes. The model is plain PyTorch. It is trained on torch.nn, then `rnnattn.swap` and
`AttentionPool` take over its parameters, and on every backend the same numbers must come out.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rnnattn
from benchmarks.experiments import true_fp32
from benchmarks.extras import optional
from benchmarks.results import ModelRow
from benchmarks.timing import Contender, Context, Timing, compare

ROWS, CLASSES, HELD_OUT, BATCH = 8, 10, 449, 128
EPOCHS, LEARNING_RATE = 25, 0.02  # a larger batch and fewer steps let rounding errors grow less
FIRST_LOSSES = 20
MIN_ACCURACY, MAX_LOSS_DIFFERENCE, MAX_IMAGES_APART = 0.96, 1e-4, 2


class AdditivePooling(nn.Module):
    """Attention pooling as it stands in user code."""

    def __init__(self, D: int, A: int) -> None:
        super().__init__()
        self.project = nn.Linear(D, A)
        self.score = nn.Linear(A, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        p = self.score(torch.tanh(self.project(x))).softmax(1)  # [B, T, 1]
        return (p * x).sum(1)  # type: ignore[no-any-return]


class Digits(nn.Module):
    """Images as sequences of rows [B, 8, 8] -> logits [B, 10]."""

    def __init__(self, H: int = 64, A: int = 64) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(ROWS, H, batch_first=True, bidirectional=True)
        self.pool: nn.Module = AdditivePooling(2 * H, A)
        self.classes = nn.Linear(2 * H, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.recurrent(x)
        return self.classes(self.pool(y))  # type: ignore[no-any-return]


def swapped(model: Digits) -> Digits:
    """A copy of the model on rnnattn: the LSTM by `swap`, the pooling by its counterpart."""
    model = copy.deepcopy(model)
    rnnattn.swap(model)
    theirs = model.pool
    assert isinstance(theirs, AdditivePooling)
    A, D = theirs.project.weight.shape
    ours = rnnattn.AttentionPool(D, "additive", A)
    values = theirs.project.weight, theirs.project.bias, theirs.score.weight[0]  # the same memory, [1, A] seen as [A]
    ours.weight, ours.bias, ours.v = (nn.Parameter(value.detach()) for value in values)
    model.pool = ours
    return model


@dataclass(frozen=True)
class Data:
    x: Tensor  # [images, 8, 8] in [0, 1]
    labels: Tensor
    held_out_x: Tensor
    held_out_labels: Tensor


def load(device: torch.device) -> Data:
    """scikit-learn's bundled digits, a quarter of them held out, split by a fixed seed."""
    digits = optional("sklearn.datasets").load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(digits.images, dtype=torch.float32)[order].to(device) / 16
    labels = torch.tensor(digits.target, dtype=torch.int64)[order].to(device)
    return Data(x[HELD_OUT:], labels[HELD_OUT:], x[:HELD_OUT], labels[:HELD_OUT])


def new_model(device: torch.device) -> Digits:
    torch.manual_seed(0)
    return Digits().to(device)


def train(model: Digits, data: Data, epochs: int) -> list[float]:
    """Trains in place, in the same order of batches every time; the loss of every step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    steps = epochs * -(-len(data.x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    shuffle = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(epochs):
        order = torch.randperm(len(data.x), generator=shuffle).to(data.x.device)
        for n in range(0, len(order), BATCH):
            batch = order[n : n + BATCH]
            losses.append(_step(model, optimizer, data.x[batch], data.labels[batch]))
            schedule.step()
    return torch.stack(losses).tolist()


def _step(model: Digits, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor) -> Tensor:
    loss = F.cross_entropy(model(x), labels)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def correct(model: Digits, data: Data) -> int:
    return int((model(data.held_out_x).argmax(1) == data.held_out_labels).sum())


def measure(
    backends: Sequence[str],
    device: torch.device,
    epochs: int = EPOCHS,
    seconds: float = 2.0,
    advance: Callable[[str], None] = lambda stage: None,
) -> list[ModelRow]:
    """A row per backend asked for; `advance` is told each stage as it ends (1 + len(backends))."""
    with true_fp32():  # so that losses can agree to 1e-4
        data = load(device)
        trained = new_model(device)
        losses = train(trained, data, epochs)
        advance("digits, trained on torch.nn")
        rows = []
        for name in backends:
            rows.append(_row(name, trained, losses, data, epochs, seconds))
            advance(f"digits, {name}")
    return rows


def _row(name: str, trained: Digits, losses: list[float], data: Data, epochs: int, seconds: float) -> ModelRow:
    with rnnattn.use_backend(name):
        after_swap = swapped(trained)
        training = _ran(after_swap, data.x[:BATCH])
        with torch.no_grad():
            predicting = _ran(after_swap, data.held_out_x)
            difference = (after_swap(data.held_out_x) - trained(data.held_out_x)).abs().max().item()
        again = swapped(new_model(data.x.device))
        losses_again = train(again, data, epochs)
        right = correct(again, data)
    first, first_again = losses[:FIRST_LOSSES], losses_again[:FIRST_LOSSES]
    loss_difference = max(abs(a - b) for a, b in zip(first, first_again, strict=True))
    baseline_right, images = correct(trained, data), len(data.held_out_x)
    (step, step_after), (predict, predict_after) = _times(name, trained, after_swap, data, seconds)
    return ModelRow(
        requested=name,
        backend=_merged(training, predicting, 0),
        kernel=_merged(training, predicting, 1),
        logit_difference=difference,
        loss_difference=loss_difference,
        losses=first_again,
        correct=right,
        baseline_correct=baseline_right,
        images=images,
        train_ms=step_after.median_ms,
        train_spread=step_after.spread,
        baseline_train_ms=step.median_ms,
        baseline_train_spread=step.spread,
        predict_ms=predict_after.median_ms,
        predict_spread=predict_after.spread,
        baseline_predict_ms=predict.median_ms,
        baseline_predict_spread=predict.spread,
        checks={
            f"torch.nn's accuracy is at least {MIN_ACCURACY:.0%}": baseline_right >= MIN_ACCURACY * images,
            f"the first {FIRST_LOSSES} losses agree to {MAX_LOSS_DIFFERENCE:g}": loss_difference <= MAX_LOSS_DIFFERENCE,
            f"accuracy within {MAX_IMAGES_APART} images": abs(right - baseline_right) <= MAX_IMAGES_APART,
        },
    )


def _ran(model: Digits, x: Tensor) -> dict[str, tuple[str, str]]:
    """Operation -> the backend and the kernel that run it, with gradients as they are enabled here."""
    return {decision.call.op: (decision.backend, decision.kernel) for decision in rnnattn.explain(model, x)}


def _merged(training: dict[str, tuple[str, str]], predicting: dict[str, tuple[str, str]], part: int) -> str:
    """One of the two words for each operation; both of it where training and predicting differ."""
    texts = []
    for op, words in training.items():
        differs = predicting[op][part] != words[part]
        texts.append(f"{op} {words[part]}" + (f" (predicting: {predicting[op][part]})" if differs else ""))
    return ", ".join(texts)


def _times(name: str, before: Digits, after: Digits, data: Data, seconds: float) -> tuple[list[Timing], list[Timing]]:
    """Of a training step on a batch and of predicting all held-out images: before, after."""
    models = [copy.deepcopy(before), copy.deepcopy(after)]
    contexts: list[Context] = [contextlib.nullcontext, functools.partial(rnnattn.use_backend, name)]
    x, labels = data.x[:BATCH], data.labels[:BATCH]

    def step(model: Digits) -> Callable[[], object]:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
        return lambda: _step(model, optimizer, x, labels)

    def predict(model: Digits) -> Callable[[], object]:
        return lambda: model(data.held_out_x)

    def times(runs: list[Callable[[], object]]) -> list[Timing]:
        contenders = [Contender(run, context) for run, context in zip(runs, contexts, strict=True)]
        return compare(contenders, seconds, data.x.device)

    training = times([step(model) for model in models])
    with torch.no_grad():
        return training, times([predict(model) for model in models])
