"""SequenceClassifier beside torch's modules over its parameters; modules inside modules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import F64
from test_pooling_module import composed
from tolerances import close
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnattn

pytestmark = pytest.mark.usefixtures("chosen")
I, H = 5, 6


@pytest.mark.parametrize("score", ["linear", "additive"])
def test_classifier(score: str) -> None:
    model = rnnattn.SequenceClassifier(3, H, I, num_embeddings=11, num_layers=2, score=score, dropout=0.5).double()
    ids, lengths = torch.randint(1, 11, (4, 6)), torch.tensor([6, 2, 1, 4])
    theirs = nn.LSTM(I, H, 2, batch_first=True, bidirectional=True, dtype=F64)
    theirs.load_state_dict(model.recurrent.state_dict())
    model.eval()
    packed, _ = theirs(pack_padded_sequence(model.embedding(ids), lengths, batch_first=True, enforce_sorted=False))
    states, _ = pad_packed_sequence(packed, batch_first=True)
    pooled, weights = composed(model.pool, states, torch.arange(6) < lengths[:, None])
    want = model.classes(pooled)
    logits, p = model(ids, lengths, return_weights=True)
    close((logits, p), (want, weights))
    close(model(ids, lengths), want)
    model.train()
    torch.manual_seed(3)
    first = model(ids, lengths)
    assert not torch.allclose(first, want)
    first.logsumexp(1).sum().backward()
    assert all(q.grad is not None and q.grad.isfinite().all() for q in model.parameters())
    assert not model.embedding.weight.grad[0].any()  # padding


def test_classifier_of_features_ignores_padding() -> None:
    model = rnnattn.SequenceClassifier(2, H, I, bidirectional=False)
    x = torch.randn(3, 5, I)
    want = model(x, [2, 5, 1])
    x[0, 2:], x[2, 1:] = torch.nan, torch.inf
    assert torch.equal(model(x, [2, 5, 1]), want)


def test_classifier_learns() -> None:
    """Which of two markers stands anywhere in a noisy sequence: from chance to certain."""
    model = rnnattn.SequenceClassifier(2, 8, 4, num_embeddings=8)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    ids, labels = torch.randint(1, 6, (32, 6)), torch.arange(32) % 2
    ids[torch.arange(32), torch.randint(0, 6, (32,))] = 6 + labels
    losses = []
    for _ in range(25):
        loss = F.cross_entropy(model(ids), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.6
    assert losses[-1] < 0.1
    assert (model(ids).argmax(1) == labels).all()


def test_nested_modules_move_and_freeze() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.ModuleDict(
                {"rnn": rnnattn.LSTM(I, H, batch_first=True), "pool": rnnattn.AttentionPool(H)}
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder["pool"](self.encoder["rnn"](x)[0])

    net, x = Net(), torch.randn(2, 4, I)
    want = net(x)
    torch.testing.assert_close(net.double()(x.double()).float(), want, rtol=1e-5, atol=1e-6)
    for p in net.encoder["rnn"].parameters():
        p.requires_grad_(False)
    net(x.double()).sum().backward()
    assert net.encoder["pool"].v.grad is not None
    assert all(p.grad is None for p in net.encoder["rnn"].parameters())
