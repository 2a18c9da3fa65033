"""`SequenceClassifier`: embedding or features -> bidirectional LSTM -> attention pooling -> classes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from rnnattn.nn import LSTM, AttentionPool


class SequenceClassifier(nn.Module):
    """Classifies sequences of token ids or of feature vectors.

    Args:
        num_classes: C.
        hidden_size: H of each direction.
        input_size: I, the width of a feature vector; or, with num_embeddings, of an embedding.
        num_embeddings: vocabulary size; None for sequences of feature vectors.
        padding_idx: token id of padding, whose embedding stays zero.
        num_layers, bidirectional: of the LSTM.
        score, attention_size: of the pooling, see `AttentionPool`.
        dropout: on the embeddings, between LSTM layers and on the pooled vector.

    Raises:
        ValueError: a size that is not positive, or an unknown score.
    """

    def __init__(
        self,
        num_classes: int,
        hidden_size: int,
        input_size: int,
        num_embeddings: int | None = None,
        padding_idx: int | None = 0,
        num_layers: int = 1,
        bidirectional: bool = True,
        score: str = "additive",
        attention_size: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if num_classes <= 0:
            raise ValueError(f"num_classes: expected a positive number, got {num_classes}")
        self.embedding = None if num_embeddings is None else nn.Embedding(num_embeddings, input_size, padding_idx)
        self.recurrent = LSTM(
            input_size,
            hidden_size,
            num_layers,
            batch_first=True,
            dropout=dropout if num_layers > 1 else 0.0,
            bidirectional=bidirectional,
        )
        features = hidden_size * (2 if bidirectional else 1)
        self.pool = AttentionPool(features, score, attention_size)
        self.dropout = nn.Dropout(dropout)
        self.classes = nn.Linear(features, num_classes)

    def forward(
        self,
        input: Tensor,
        lengths: Tensor | Sequence[int] | None = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Classifies a batch.

        Args:
            input: token ids [B, T], or features [B, T, I].
            lengths: integers [B] on any device, each in [0, T]; steps behind are not read.
            return_weights: also return what was attended to.

        Returns:
            logits [B, C], and with return_weights the attention weights [B, T].
        """
        expected = 2 if self.embedding is not None else 3
        if input.dim() != expected:
            raise ValueError(
                f"SequenceClassifier: Expected input to be {expected}D "
                f"({'token ids [B, T]' if expected == 2 else 'features [B, T, I]'}), got {input.dim()}D instead"
            )
        x = input if self.embedding is None else self.dropout(self.embedding(input))
        x, _ = self.recurrent(x, lengths=lengths)
        if not return_weights:
            return self.classes(self.dropout(self.pool(x, lengths=lengths)))  # type: ignore[no-any-return]
        pooled, weights = self.pool(x, lengths=lengths, return_weights=True)
        return self.classes(self.dropout(pooled)), weights
