"""The equations in plain PyTorch: the specification that every backend is checked against.

Notation, used throughout the package: B batch, T time, I input size, H hidden size, R output
size of a layer (H, or the projection size), D feature size, A attention size, K directions of a
layer. Gates stand in torch's order i, f, g, o.
"""

from rnnattn.reference.attention_pool import attention_pool_backward, attention_pool_forward
from rnnattn.reference.lstm import (
    DIRECTIONS,
    LayerWeights,
    layer_gradients,
    lstm_layer_backward,
    lstm_layer_forward,
    split_weights,
    valid_steps,
)

__all__ = [
    "DIRECTIONS",
    "LayerWeights",
    "attention_pool_backward",
    "attention_pool_forward",
    "layer_gradients",
    "lstm_layer_backward",
    "lstm_layer_forward",
    "split_weights",
    "valid_steps",
]
