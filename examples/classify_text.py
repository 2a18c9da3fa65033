"""Classify short texts: word ids -> embedding -> bidirectional LSTM -> attention pooling -> classes.

    python examples/classify_text.py train.csv test.csv [--torch]

Each CSV row is a label and one or more text columns, without a header. Prints the test accuracy, the recall of
each class, and the words attended to most in a few test texts. With --torch the same model runs on torch.nn.
"""

import argparse
import csv
import random
import re
import time
from collections import Counter

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

import rnnattn

PADDING, UNKNOWN = 0, 1
Row = tuple[int, list[str]]  # class, words


class TorchClassifier(nn.Module):
    """rnnattn.SequenceClassifier in plain PyTorch, with the same parameters in the same order."""

    def __init__(
        self, num_classes: int, hidden_size: int, input_size: int, num_embeddings: int, dropout: float
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_embeddings, input_size, PADDING)
        self.recurrent = nn.LSTM(input_size, hidden_size, batch_first=True, bidirectional=True)
        self.score = nn.Sequential(
            nn.Linear(2 * hidden_size, 2 * hidden_size), nn.Tanh(), nn.Linear(2 * hidden_size, 1)
        )
        self.dropout = nn.Dropout(dropout)
        self.classes = nn.Linear(2 * hidden_size, num_classes)

    def forward(self, ids: Tensor, lengths: Tensor, return_weights: bool = False):
        packed = pack_padded_sequence(
            self.dropout(self.embedding(ids)), lengths, batch_first=True, enforce_sorted=False
        )
        x, _ = pad_packed_sequence(self.recurrent(packed)[0], batch_first=True, total_length=ids.shape[1])
        padding = torch.arange(ids.shape[1]) >= lengths[:, None]
        weights = self.score(x).squeeze(-1).masked_fill(padding, -torch.inf).softmax(1)
        logits = self.classes(self.dropout((weights[:, None] @ x).squeeze(1)))
        return (logits, weights) if return_weights else logits


def read(path: str, limit: int, max_words: int) -> tuple[list[str], list[list[str]]]:
    """Labels and lower-case words of each row of a CSV."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if row][: limit or None]
    words = [re.findall(r"[a-z]+|\d+|[$!?]", " ".join(row[1:]).lower())[:max_words] or ["?"] for row in rows]
    return [row[0] for row in rows], words


def batches(rows: list[Row], ids: dict[str, int], size: int, shuffle: bool):
    """Batches of rows of similar length: word ids [B, T], lengths [B], classes [B], row numbers."""
    order = list(range(len(rows)))
    random.shuffle(order)
    order.sort(key=lambda n: len(rows[n][1]) // 8)
    chunks = [order[i : i + size] for i in range(0, len(order), size)]
    if shuffle:
        random.shuffle(chunks)
    for chunk in chunks:
        texts = [torch.tensor([ids.get(word, UNKNOWN) for word in rows[n][1]]) for n in chunk]
        lengths = torch.tensor([len(text) for text in texts])
        yield pad_sequence(texts, True, PADDING), lengths, torch.tensor([rows[n][0] for n in chunk]), chunk


def train(model: nn.Module, rows: list[Row], ids: dict[str, int], args: argparse.Namespace) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    steps = args.steps or args.epochs * -(-len(rows) // args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps)
    stream = (batch for _ in range(steps) for batch in batches(rows, ids, args.batch_size, shuffle=True))
    model.train()
    started = time.perf_counter()
    for _, (text, lengths, classes, _) in zip(track(range(steps), "training"), stream, strict=False):
        # Some words go missing at random, so that no text is recognised by a single one.
        text = text.masked_fill((torch.rand(text.shape) < args.word_dropout) & (text != PADDING), UNKNOWN)
        loss = F.cross_entropy(model(text, lengths), classes, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    print(f"{steps} steps in {time.perf_counter() - started:.1f} s, last loss {loss.item():.3f}")


@torch.inference_mode()
def evaluate(
    model: nn.Module, rows: list[Row], ids: dict[str, int], names: list[str], args: argparse.Namespace
) -> float:
    """Prints accuracy, recall per class and attended words; returns the accuracy."""
    model.eval()
    found, total, shown = Counter(), Counter(), []
    for text, lengths, classes, numbers in batches(rows, ids, 256, shuffle=False):
        logits, weights = model(text, lengths, return_weights=True)
        guesses = logits.argmax(1)
        found.update(classes[guesses == classes].tolist())
        total.update(classes.tolist())
        shown += [(number, int(guess), row) for number, guess, row in zip(numbers, guesses, weights, strict=True)]
    accuracy = sum(found.values()) / len(rows)
    print(f"test accuracy {accuracy:.2%} on {len(rows)} texts")
    for c, name in enumerate(names):
        print(f"  recall of {name}: {found[c] / max(total[c], 1):.2%} of {total[c]}")
    for number, guess, weights in sorted(shown, key=lambda entry: entry[0])[: args.show]:
        label, words = rows[number]
        top = weights.topk(min(5, len(words)))
        attended = ", ".join(f"{words[t]} {p:.2f}" for p, t in zip(top.values, top.indices, strict=True))
        print(f"  {names[guess]} (is {names[label]}): {attended}   | {' '.join(words[:12])} ...")
    return accuracy


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train_csv")
    parser.add_argument("test_csv")
    parser.add_argument("--torch", action="store_true", help="run the same model on torch.nn")
    defaults = {"epochs": 5, "steps": 0, "batch-size": 64, "hidden": 64, "embedding": 128, "lr": 4e-3, "dropout": 0.5}
    defaults |= {"word-dropout": 0.15, "max-words": 96, "limit": 0, "show": 4, "seed": 0}
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"default {value}")
    args = parser.parse_args(argv)
    random.seed(args.seed)
    torch.manual_seed(args.seed)

    labels, words = read(args.train_csv, args.limit, args.max_words)
    test_labels, test_words = read(args.test_csv, args.limit, args.max_words)
    names = sorted(set(labels))
    counts = Counter(word for text in words for word in text)
    ids = {word: n for n, (word, count) in enumerate(counts.most_common(30_000), 2) if count > 1}
    kind = TorchClassifier if args.torch else rnnattn.SequenceClassifier
    model = kind(len(names), args.hidden, args.embedding, num_embeddings=len(ids) + 2, dropout=args.dropout)
    print(f"{kind.__name__}: {len(labels)} training texts, {len(ids)} words, {len(names)} classes")
    train(model, [(names.index(label), text) for label, text in zip(labels, words, strict=True)], ids, args)
    test = [(names.index(label), text) for label, text in zip(test_labels, test_words, strict=True) if label in names]
    return evaluate(model, test, ids, names, args)


if __name__ == "__main__":
    main()
