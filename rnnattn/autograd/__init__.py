"""One custom operator pair and one autograd Function per operation.

The operators (`torch.ops.rnnattn.*`) have fakes, so that torch.compile and torch.export see one
opaque node per operation; the Functions tell autograd how forward and backward belong together.
Derivatives without kernels are those of the reference equations (`equations`).
"""

from rnnattn.autograd.attention_pool import attention_pool
from rnnattn.autograd.chunks import recurrent_layer_in_chunks
from rnnattn.autograd.recurrent import recurrent_layer
from rnnattn.autograd.regularised import regularised_scan

__all__ = ["attention_pool", "recurrent_layer", "recurrent_layer_in_chunks", "regularised_scan"]
