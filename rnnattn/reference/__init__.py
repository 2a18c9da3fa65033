"""The equations in plain PyTorch: the specification that every backend is checked against.

Notation, used throughout the package: B batch, T time, I input size, H hidden size, R output
size of a layer (H, or the projection size), D feature size, A attention size, K directions of a
layer, G blocks of H rows in a cell's weights. Gates stand in torch's order: i, f, g, o; r, z, n.
"""

from rnnattn.reference.attention_pool import attention_pool_backward, attention_pool_forward
from rnnattn.reference.cells import CELLS
from rnnattn.reference.layout import (
    DIRECTIONS,
    STACK,
    LayerWeights,
    Resets,
    accumulation_dtype,
    has_projection,
    previous_states,
    reverses_of,
    scan_resets,
    split_weights,
    valid_steps,
    zero_invalid,
)
from rnnattn.reference.recurrent import recurrent_layer_forward
from rnnattn.reference.recurrent_backward import layer_gradients, recurrent_layer_backward
from rnnattn.reference.regularised import NORM_EPS, regularised_scan_forward
from rnnattn.reference.stack import stack_backward, stack_forward

__all__ = [
    "CELLS",
    "DIRECTIONS",
    "NORM_EPS",
    "STACK",
    "LayerWeights",
    "Resets",
    "accumulation_dtype",
    "attention_pool_backward",
    "attention_pool_forward",
    "has_projection",
    "layer_gradients",
    "previous_states",
    "recurrent_layer_backward",
    "recurrent_layer_forward",
    "regularised_scan_forward",
    "reverses_of",
    "scan_resets",
    "split_weights",
    "stack_backward",
    "stack_forward",
    "valid_steps",
    "zero_invalid",
]
