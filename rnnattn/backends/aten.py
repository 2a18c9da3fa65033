"""torch's own kernels (oneDNN, cuDNN) as a backend: taken where they measured faster.

Unlike the others it covers a whole stack of layers and leaves autograd to torch, so it offers
`recurrent` and `attention_pool` instead of the operations of one layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from rnnattn.backends.base import Backend, Call
from rnnattn.reference import valid_steps
from rnnattn.reference.attention_pool import kept_steps
from rnnattn.transforms import is_tracing


class Torch(Backend):
    name = "torch"
    reads_packed = True

    def unsupported(self, call: Call) -> str | None:
        if call.recurrent and call.compiling and not call.traced:
            return f"torch.compile unrolls torch's own {call.op.upper()} over time"
        if call.resets:
            return f"torch's own {call.op.upper()} takes no resets"
        if call.regularised:
            return f"torch's own {call.op.upper()} knows no zoneout, locked dropout, dropped weights or layer norm"
        if call.in_chunks:
            return f"torch's own {call.op.upper()} keeps what it computed of all steps"
        if call.cells:
            return f"torch's own {call.op.upper()} gives the cell state of the last step alone"
        if call.recurrent and call.ragged and (call.compiling or call.device == "meta"):
            return "torch packs by the values of lengths"
        if call.recurrent and call.B == 0:
            return f"torch's own {call.op.upper()} refuses an empty batch in some builds"
        return None

    def kernel(self, call: Call) -> str:
        if call.op == "attention_pool":
            return "eager scores, masked softmax and bmm"
        return cudnn_branch(call) if call.device == "cuda" else cpu_kernel(call)

    def recurrent(
        self,
        mode: str,
        x: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        weights: list[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        training: bool,
        bidirectional: bool,
        lengths: Tensor | None,
        batch_sizes: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """A stack of layers: y, h_n, c_n; x [T, B, I], h0 [L * K, B, R], c0 [L * K, B, H] (LSTM).

        batch_sizes: of packed rows in the place of x, and of y.
        """
        run = getattr(torch._VF, mode.lower())
        # cuDNN's backward wants training mode; without dropout the two modes compute the same. A graph is traced with
        # gradients, and checked without.
        training = training or (dropout == 0 and torch.is_grad_enabled() and not is_tracing())
        settings = (has_biases, num_layers, dropout, training, bidirectional)
        if batch_sizes is not None:
            y, h_n, *rest = run(x, batch_sizes, h0 if c0 is None else (h0, c0), weights, *settings)
            return y, h_n, rest[0] if rest else None
        if lengths is None:
            y, h_n, *rest = run(x, h0 if c0 is None else (h0, c0), weights, *settings, False)
            return y, h_n, rest[0] if rest else None
        # torch packs no empty row: such a row runs one step, on zeros, that is then discarded.
        valid = valid_steps(lengths, x.shape[0])[..., None]
        x = torch.where(valid, x, 0)
        packed = pack_padded_sequence(x, lengths.clamp(min=1).cpu(), enforce_sorted=False)
        order, back = packed.sorted_indices, packed.unsorted_indices
        assert order is not None and back is not None
        initial = (h0,) if c0 is None else (h0, c0)
        sorted_states = tuple(state.index_select(1, order) for state in initial)
        data, *finals = run(
            packed.data, packed.batch_sizes, sorted_states[0] if c0 is None else sorted_states, weights, *settings
        )
        y, _ = pad_packed_sequence(PackedSequence(data, packed.batch_sizes, order, back), total_length=x.shape[0])
        empty = (lengths == 0)[None, :, None]
        h_n, *rest = (
            torch.where(empty, state, final.index_select(1, back)) for state, final in zip(initial, finals, strict=True)
        )
        return torch.where(valid, y, 0), h_n, rest[0] if rest else None

    def attention_pool(
        self,
        x: Tensor,
        v: Tensor,
        w: Tensor | None,
        b: Tensor | None,
        lengths: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """pooled [B, D] and weights [B, T] in the form most user code has."""
        keep = kept_steps(x, lengths, mask)
        x = x if keep is None else torch.where(keep[..., None], x, 0)  # 0 * NaN in the bmm would be NaN
        scores = x @ v if w is None else torch.tanh(F.linear(x, w, b)) @ v
        if keep is None:
            p = scores.softmax(1)
            return torch.bmm(p[:, None], x)[:, 0], p
        p = torch.where(keep, scores.masked_fill(~keep, -torch.inf).softmax(1), 0)
        return torch.where(keep.any(1, keepdim=True), torch.bmm(p[:, None], x)[:, 0], 0), p


def cpu_kernel(call: Call) -> str:
    """What at::lstm, at::gru and at::rnn_* run on a CPU (aten/src/ATen/native/RNN.cpp; use_mkldnn is asked for
    an LSTM only)."""
    onednn = (
        call.op == "lstm"
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and call.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and not call.projection
        and not call.ragged
    )
    return "oneDNN LSTM" if onednn else f"ATen {call.op.upper()} (a GEMM and pointwise kernels per step)"


def cudnn_branch(call: Call) -> str:
    """The algorithm torch picks for cuDNN (aten/src/ATen/native/cudnn/RNN.cpp, get_algo)."""
    B, H, plain = call.B, call.hidden, call.op == "rnn"
    if not torch.backends.cudnn.is_available() or not torch.backends.cudnn.enabled:
        return (
            "ATen RNN (a GEMM and pointwise kernels per step)" if plain else f"ATen {call.op.upper()} with fused cells"
        )
    if call.projection or call.ragged:
        return "cuDNN STANDARD"
    widest = (256 if plain else 128) if call.grad else (384 if plain else 192)
    if call.dtype != torch.float64 and H <= widest:
        return "cuDNN PERSIST_STATIC_SMALL_H"
    fp16_single = call.dtype == torch.float16 and call.layers == 1 and call.directions == 1
    shape_fits = H <= 1024 and H % 128 == 0 and call.features % 128 == 0 and B % 8 == 0 and B <= 128
    slow_there = call.op == "gru" or (plain and B >= 96 and H >= 896)
    return "cuDNN PERSIST_STATIC" if fp16_single and shape_fits and not slow_there else "cuDNN STANDARD"
