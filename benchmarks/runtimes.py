"""ONNX Runtime and OpenVINO as peers in fp32 inference, where they are installed.

Both run one standard ONNX graph, made here from the parameters of a torch.nn module: an LSTM, GRU
or RNN node per layer (ONNX operators, opset 17), with the outputs of both directions side by side.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.extras import optional
from benchmarks.measure import Peer

PACKAGES = ("onnx", "onnxruntime", "openvino")
OPSET, IR_VERSION = 17, 9
# Rows of torch's weights in ONNX's order: i, f, g, o to i, o, f, c; r, z, n to z, r, h.
GATE_ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}
SPIN = 0.001  # seconds that ONNX Runtime's threads may go on spinning for the next call
SETTLE = 0.01  # seconds: longer than that, and than the threads of torch's last parallel loop spin
INT8 = "int8 weights, another arithmetic than fp32"

Run = Callable[[dict[str, Any]], Sequence[Any]]  # inputs by name -> outputs y and, with states, h_n, c_n


def missing() -> list[str]:
    """The packages that are not installed."""
    return [package for package in PACKAGES if importlib.util.find_spec(package) is None]


def sequence_peers(module: nn.RNNBase, x: Tensor, lengths: Tensor | None) -> list[Peer]:
    """Peers that run the module on x [T, B, I], with zeros behind each row's length where lengths are given."""
    inputs = {"x": x.detach().numpy()}
    if lengths is not None:
        inputs["lengths"] = lengths.int().numpy()

    def forward(run: Run) -> Tensor:
        return torch.from_numpy(run(inputs)[0])

    return _peers(module, functools.partial(graph, module, x.shape, lengths is not None), forward)


def step_peers(module: nn.LSTM, xs: Sequence[Tensor], state: tuple[Tensor, Tensor]) -> list[Peer]:
    """Peers that take a step for each of xs, each [1, 1, I], with the states carried on, and give the last output."""
    steps = [x.numpy() for x in xs]
    h0, c0 = (t.numpy() for t in state)

    def forward(run: Run) -> Tensor:
        y, h, c = steps[0], h0, c0
        for x in steps:
            y, h, c = run({"x": x, "h0": h, "c0": c})
        return torch.from_numpy(y).view(1, -1)

    return _peers(module, functools.partial(graph, module, xs[0].shape, False, states=True), forward)


def _peers(module: nn.RNNBase, new_graph: Callable[[], bytes], forward: Callable[[Run], Tensor]) -> list[Peer]:
    absent, kind = missing(), _kind(module)

    def peer(name: str, kernel: str, new_run: Callable[[], Run], informational: str = "") -> Peer:
        run = functools.cache(new_run)  # built when it is first called, so that a failure is the peer's
        return Peer(
            name, lambda: kernel, lambda: forward(run()), settle=SETTLE, trains=False, prepared=True,
            informational=informational,
        )  # fmt: skip

    peers: list[Peer] = []
    if "onnx" in absent:
        return peers
    if "onnxruntime" not in absent:
        peers.append(peer("ONNX Runtime", f"{kind} node", lambda: _onnxruntime(new_graph())))
        if kind == "LSTM":  # the only one of the three that its quantisation knows
            new_run = functools.partial(_onnxruntime_int8, new_graph)
            peers.append(peer("ONNX Runtime int8", "DynamicQuantizeLSTM node", new_run, INT8))
    if "openvino" not in absent:
        peers.append(peer("OpenVINO", f"{kind} node", lambda: _openvino(new_graph())))
    return peers


def graph(module: nn.RNNBase, shape: Sequence[int], lengths: bool, states: bool = False) -> bytes:
    """A serialised ONNX model: x [T, B, I], lengths [B] -> y [T, B, K * H].

    states: also inputs h0 (and c0) and outputs h_n (and c_n), of one layer.
    """
    onnx = optional("onnx")
    make, FLOAT, INT32 = onnx.helper, onnx.TensorProto.FLOAT, onnx.TensorProto.INT32
    kind, K = _kind(module), 2 if module.bidirectional else 1
    T, B, _ = shape
    H = module.hidden_size
    names = ["h", "c"][: 1 + (kind == "LSTM")] if states else []
    settings: dict[str, Any] = {"hidden_size": H, "direction": "bidirectional" if K == 2 else "forward"}
    if kind == "GRU":
        settings["linear_before_reset"] = 1
    nodes, constants, x = [], {"sizes": torch.tensor([T, B, K * H])}, "x"
    for layer in range(module.num_layers):
        weights = [f"{name}{layer}" for name in ("W", "R", "B")]
        constants.update(zip(weights, layer_weights(module, layer), strict=True))
        inputs = [x, *weights, "lengths" if lengths else "", *(f"{name}0" for name in names)]
        outputs = [f"Y{layer}", *(f"{name}_n" for name in names)]
        x = "y" if layer == module.num_layers - 1 else f"y{layer}"
        nodes += [
            make.make_node(kind, inputs, outputs, **settings),
            make.make_node("Transpose", [f"Y{layer}"], [f"Z{layer}"], perm=(0, 2, 1, 3)),
            make.make_node("Reshape", [f"Z{layer}", "sizes"], [x]),
        ]
    given = [make.make_tensor_value_info("x", FLOAT, shape)]
    given += [make.make_tensor_value_info("lengths", INT32, [B])] if lengths else []
    given += [make.make_tensor_value_info(f"{name}0", FLOAT, [K, B, H]) for name in names]
    wanted = [make.make_tensor_value_info("y", FLOAT, [T, B, K * H])]
    wanted += [make.make_tensor_value_info(f"{name}_n", FLOAT, [K, B, H]) for name in names]
    initial = [onnx.numpy_helper.from_array(value.numpy(), name) for name, value in constants.items()]
    made = make.make_graph(nodes, kind, given, wanted, initial)
    model = make.make_model(made, opset_imports=[make.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def layer_weights(module: nn.RNNBase, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """ONNX's W [K, G * H, I], R [K, G * H, H] and B [K, 2 * G * H] of one layer."""
    order, H = list(GATE_ORDER[_kind(module)]), module.hidden_size

    def stacked(name: str) -> Tensor:
        suffixes = ("", "_reverse") if module.bidirectional else ("",)
        tensors = [getattr(module, f"{name}_l{layer}{suffix}").detach() for suffix in suffixes]
        return torch.stack([t.unflatten(0, (-1, H))[order].flatten(0, 1) for t in tensors])

    return stacked("weight_ih"), stacked("weight_hh"), torch.cat([stacked("bias_ih"), stacked("bias_hh")], 1)


def _kind(module: nn.RNNBase) -> str:
    return module.mode.partition("_")[0]


@contextlib.contextmanager
def _all_processors() -> Iterator[None]:
    """With OMP_PROC_BIND this thread is bound to one processor, and so would be every thread it starts."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    try:
        yield
    finally:
        os.sched_setaffinity(0, mine)


def _onnxruntime(model: bytes) -> Run:
    """Its threads are as many as torch's; they wait spinning for the next call, but not into another's turn."""
    with _all_processors():
        onnxruntime = optional("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
        options.add_session_config_entry("session.intra_op.spin_duration_us", f"{1e6 * SPIN:.0f}")
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)


def _onnxruntime_int8(new_graph: Callable[[], bytes]) -> Run:
    onnx, quantization = optional("onnx"), optional("onnxruntime.quantization")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "int8.onnx")
        logging.disable(logging.WARNING)  # its advice to simplify the graph first
        try:
            quantization.quantize_dynamic(onnx.load_from_string(new_graph()), path, op_types_to_quantize=["LSTM"])
        finally:
            logging.disable(logging.NOTSET)
        return _onnxruntime(path.read_bytes())


def _openvino(model: bytes) -> Run:
    settings = {
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
        "ENABLE_CPU_PINNING": False,
        "ENABLE_HYPER_THREADING": True,  # else it leaves out what looks like one, such as a virtual processor
    }
    with _all_processors():
        openvino = optional("openvino")
        core = openvino.Core()
        request = core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()

    def run(inputs: dict[str, Any]) -> Sequence[Any]:
        return tuple(request.infer(inputs, share_inputs=True).values())

    return run
