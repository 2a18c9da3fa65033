"""The Triton kernels and their launchers. Imports torch and triton only; installed as `rnnattn.kernels`.

One file per idea: `step_forward` and `step_backward` (the pointwise part of a recurrent step), `step_rows`
(what the two share), `regularised_forward` and `regularised_backward` (a step with zoneout, dropout and layer norm,
a whole row at a time), `linear_pool` and `additive_pool` (attention pooling by score function), `pool_parts`
(what these share), `sequence_forward` and `sequence_backward` (a whole layer, or a stack, in one launch each way),
`sequence_products` (what they multiply), `sequence_rows` (where the rows of a step lie), `grid_barrier` (how programs
of one launch wait for each other), `math` (elementwise functions).

Notation: B batch, T time, H hidden size, G blocks of H columns and S saved values a unit of a cell, D feature
size, A attention size; S parts of a row of x that is split over time, N rows of a flattened chunk. Arithmetic
is fp32, tensors are fp32, bf16 or fp16.
"""

from rnnattn.kernels.additive_pool import additive_pool_backward, additive_pool_forward
from rnnattn.kernels.linear_pool import linear_pool_backward, linear_pool_forward
from rnnattn.kernels.regularised_backward import regularised_backward
from rnnattn.kernels.regularised_forward import regularised_forward
from rnnattn.kernels.sequence_backward import sequence_backward
from rnnattn.kernels.sequence_forward import sequence_forward
from rnnattn.kernels.step_backward import step_backward
from rnnattn.kernels.step_forward import step_forward

__all__ = [
    "additive_pool_backward",
    "additive_pool_forward",
    "linear_pool_backward",
    "linear_pool_forward",
    "regularised_backward",
    "regularised_forward",
    "sequence_backward",
    "sequence_forward",
    "step_backward",
    "step_forward",
]
