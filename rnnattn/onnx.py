"""Export to ONNX: recurrent layers as the standard nodes LSTM, GRU and RNN, attention pooling as standard operators.

Operators: https://onnx.ai/onnx/operators. torch.onnx.export does the rest of a model; it needs the packages onnx
and onnxscript (`pip install rnnattn[onnx]`).
"""

from __future__ import annotations

import importlib.util
import math
import os
from typing import Any

import torch
from torch import nn

from rnnattn.transforms import own_operators

OPSET = 18  # the first with all operators below in the form that is used here
# torch's blocks of rows in ONNX's order: i, f, g, o to i, o, f, c; r, z, n to z, r, h.
NODES: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "LSTM": ("LSTM", (0, 3, 1, 2), {}),
    "GRU": ("GRU", (1, 0, 2), {"linear_before_reset": 1}),
    "RNN_TANH": ("RNN", (0,), {"activations": ["Tanh"]}),
    "RNN_RELU": ("RNN", (0,), {"activations": ["Relu"]}),
}


def onnx_export(
    model: nn.Module,
    args: tuple[Any, ...],
    path: str | os.PathLike[str] | None = None,
    *,
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    **options: Any,
) -> Any:
    """Exports a model for inference to ONNX, with one standard node for each of our recurrent layers.

    Args:
        model: any module that torch.onnx.export takes; it is exported as in evaluation mode, and left as it was.
        args, kwargs: example inputs.
        path: file to write; None for none.
        dynamic_shapes: as torch.export.export takes it, e.g. `({0: "batch", 1: "time"},)`; B and T may be dynamic.
        options: others of torch.onnx.export, such as input_names and output_names.

    Returns:
        torch.onnx.ONNXProgram. Lengths become the nodes' sequence_lens; rows of length 0 return their initial state.

    Raises:
        ModuleNotFoundError: onnx or onnxscript is not installed.
        torch.onnx.OnnxExporterError: torch cannot export the model; what ONNX has no node for is among the causes, as
            a projection or resets.
    """
    missing = [package for package in ("onnx", "onnxscript") if importlib.util.find_spec(package) is None]
    if missing:
        raise ModuleNotFoundError(f"onnx_export needs {' and '.join(missing)}: pip install rnnattn[onnx]")
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), own_operators():
            return torch.onnx.export(
                model, args, path, kwargs=kwargs, dynamic_shapes=dynamic_shapes, dynamo=True,
                opset_version=options.pop("opset_version", OPSET),
                custom_translation_table={
                    torch.ops.rnnattn.recurrent_layer.default: _recurrent_layer,
                    torch.ops.rnnattn.regularised_scan.default: _regularised_scan,
                    torch.ops.rnnattn.attention_pool.default: _attention_pool,
                },
                **options,
            )  # fmt: skip
    finally:
        for module, training in modes:
            module.training = training


def _operators() -> Any:
    from onnxscript import opset18

    return opset18


def _recurrent_layer(  # type: ignore[no-untyped-def]
    x, h0, c0, weights, lengths, resets, reset_to_initial, has_biases, direction, mode, save, backend
):
    """y, h_n, c_n of one layer; what the cell has not, and what only a backward reads, is anything."""
    op = _operators()
    kind, order, settings = NODES[mode]
    K = 2 if direction == "bidirectional" else 1
    per_direction, H = len(weights) // K, int(weights[1].shape[1])
    if resets is not None:
        raise NotImplementedError(f"onnx_export: the {kind} node of ONNX has no resets")
    if per_direction != (4 if has_biases else 2):
        raise NotImplementedError(f"onnx_export: the {kind} node of ONNX has no projection (proj_size)")

    def ints(*values: int) -> Any:
        return op.Constant(value_ints=values)

    def stacked(n: int) -> Any:
        """Weight n of every direction, [K, rows, ...], blocks of rows in ONNX's order."""
        directions = []
        for k in range(K):
            w = weights[k * per_direction + n]
            blocks = [op.Slice(w, ints(at * H), ints((at + 1) * H), ints(0)) for at in order]
            directions.append(op.Unsqueeze(op.Concat(*blocks, axis=0), ints(0)))
        return op.Concat(*directions, axis=0)

    bias = op.Concat(stacked(2), stacked(3), axis=1) if has_biases else None
    sequence_lens = None if lengths is None else op.Cast(lengths, to=6)  # int32
    states = (h0,) if c0 is None else (h0, c0)
    node = getattr(op, kind)
    if kind == "RNN":
        settings = {"activations": settings["activations"] * K}
    y, *finals = node(
        x, stacked(0), stacked(1), bias, sequence_lens, *states, direction=direction, hidden_size=H, **settings,
    )  # fmt: skip
    y = op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), ints(0, 0, -1))
    if lengths is not None:  # a row without steps keeps its state, of which ONNX says nothing
        empty = op.Unsqueeze(op.Equal(lengths, op.Constant(value_int=0)), ints(0, 2))
        finals = [op.Where(empty, before, after) for before, after in zip(states, finals, strict=True)]
    unused = [op.Constant(value_float=0.0) for _ in range(4 - len(finals))]
    return y, *finals, *unused


def _regularised_scan(*_, **__):  # type: ignore[no-untyped-def]
    raise NotImplementedError("onnx_export: the recurrent nodes of ONNX have no zoneout and no layer norm")


def _attention_pool(x, v, w, b, lengths, mask, need_weights, backend):  # type: ignore[no-untyped-def]
    """pooled, p and lse; see `rnnattn.reference.attention_pool`."""
    op = _operators()

    def last(t: Any) -> Any:
        return op.Unsqueeze(t, op.Constant(value_ints=[-1]))

    steps = op.Constant(value_ints=[1])
    keep = mask
    if lengths is not None:
        T = op.Squeeze(op.Shape(x, start=1, end=2))
        zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
        keep = op.Less(op.Unsqueeze(op.Range(zero, T, one), op.Constant(value_ints=[0])), last(lengths))
    nothing = op.CastLike(op.Constant(value_float=0.0), x)
    if keep is not None:
        x = op.Where(last(keep), x, nothing)
    u = x
    if w is not None:
        product = op.MatMul(x, op.Transpose(w, perm=[1, 0]))
        u = op.Tanh(product if b is None else op.Add(product, b))
    scores = op.Squeeze(op.MatMul(u, last(v)), op.Constant(value_ints=[-1]))
    if keep is not None:
        scores = op.Where(keep, scores, op.CastLike(op.Constant(value_float=-math.inf), x))
    p = op.Softmax(scores, axis=1)
    if keep is not None:  # in a row that keeps nothing p was NaN
        p = op.Where(keep, p, nothing)
    lse = op.ReduceLogSumExp(scores, steps, keepdims=0)
    pooled = op.Squeeze(op.MatMul(op.Unsqueeze(p, steps), x), steps)
    return pooled, p if need_weights else op.Constant(value_float=0.0), lse


__all__ = ["onnx_export"]
