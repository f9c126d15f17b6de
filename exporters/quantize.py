"""Turn a float32 ONNX file into an int8 one with Q/DQ pairs, which TensorRT and ONNX Runtime both read.

Weights per output channel, activations per tensor, both symmetric (TensorRT takes nothing else); only products with
constant weights are quantised, so the attention products stay in float. What follows from weights alone is folded
first, so that a weight behind a Transpose is one too. A product whose activations lose too much, as those after a GELU
often do, stays in float too: each one's own damage to the output is measured first.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from optin_deploy.errors import BadInput
from optin_deploy.exporters.passes.folded import folded
from optin_deploy.exporters.passes.opset import raised
from optin_deploy.network.read_onnx import read_file
from optin_deploy.network.write import write
from optin_deploy.runtimes.base import Feeds
from optin_deploy.runtimes.ort import PROVIDER, import_onnxruntime

NEEDS_SAMPLES = "int8 needs calibration samples to measure the range of activations; none were given."
PRODUCTS = ("MatMul", "Gemm", "Conv")
NOISE_LIMIT = 0.003
"""Share of the output's variance that rounding activations may add in all; the most harmful ones stay in float.
Mean cosine to float32 of all-MiniLM-L6-v2: every product in int8 0.84, under this limit 0.99."""
ROWS = 8
"""Samples on which the damage is measured."""
STEPS = 127
OPSET = 13
"""The first in which weights have a scale for each channel."""
SETTINGS = {
    "ActivationSymmetric": True,
    "WeightSymmetric": True,
    "QuantizeBias": False,  # TensorRT dequantises no int32
    "OpTypesToExcludeOutputQuantization": list(PRODUCTS),  # sums stay in float until the bias is added
    "DefaultTensorType": 1,  # float32: what ONNX cannot infer behind operators that are not its own
}


def quantize_int8(source: Path, out: Path, feeds: Sequence[Feeds]) -> None:
    """Measure the range of every quantised tensor on the feeds and write the Q/DQ graph.

    Raises: BadInput: no feeds, or a source that is no ONNX file. MissingDependency: no ONNX Runtime, whose quantiser
        does the work.
    """
    if not feeds:
        raise BadInput(NEEDS_SAMPLES)
    import_onnxruntime()
    network = folded(raised(read_file(source), OPSET, "int8"))
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary) / "folded.onnx"
        write(network, whole)
        _quantize(whole, out, [{port.name: feed[port.name] for port in network.inputs} for feed in feeds])


def _quantize(source: Path, out: Path, feeds: Sequence[Feeds]) -> None:
    import onnx

    proto = onnx.load(source)
    readers = _readers(proto.graph)
    weighted = {name for names in readers.values() for name in names}
    in_float = [node.name for node in proto.graph.node if node.op_type in PRODUCTS and node.name not in weighted]
    quantization = import_module("onnxruntime.quantization")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]  # untyped base
        def __init__(self) -> None:
            self.left: Iterator[Feeds] = iter(feeds)

        def get_next(self) -> dict[str, np.ndarray] | None:
            feed = next(self.left, None)
            return None if feed is None else dict(feed)

    with _quiet():
        quantization.quantize_static(
            str(source),
            str(out),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=list(PRODUCTS),
            nodes_to_exclude=[*in_float, *_fragile(proto, readers, feeds[0])],
            per_channel=True,
            activation_type=quantization.QuantType.QInt8,
            weight_type=quantization.QuantType.QInt8,
            extra_options=SETTINGS,
        )


def _fragile(proto: Any, readers: Mapping[str, Sequence[str]], feed: Feeds) -> list[str]:
    """Names of the products that stay in float, so that all others together stay under NOISE_LIMIT."""
    sizes = {port.name: port.type.tensor_type.shape.dim for port in proto.graph.input}
    free = {name for name, axes in sizes.items() if axes and not axes[0].dim_value}
    few = {name: values[:ROWS] if name in free else values for name, values in feed.items()}
    kept_noise, fragile = 0.0, list[str]()
    for tensor, noise in sorted(_damage(proto, readers, few).items(), key=lambda item: item[1]):
        kept_noise += noise
        if not kept_noise <= NOISE_LIMIT:
            fragile += readers[tensor]
    return fragile


def _readers(graph: Any) -> dict[str, list[str]]:
    """Activation -> names of the products with constant weights that read it."""
    constants = {tensor.name for tensor in graph.initializer}
    readers: dict[str, list[str]] = {}
    for node in graph.node:
        if node.op_type in PRODUCTS and node.input[1] in constants and node.input[0] not in constants:
            readers.setdefault(node.input[0], []).append(node.name)
    return readers


def _damage(proto: Any, readers: Mapping[str, Sequence[str]], feed: Feeds) -> dict[str, float]:
    """Variance that rounding one activation to int8 adds to the main output, over the output's own variance."""
    ort = import_onnxruntime()
    output = proto.graph.output[0].name
    session = ort.InferenceSession(_gated(proto, readers).SerializeToString(), providers=[PROVIDER])

    def run(gates: Mapping[str, float]) -> np.ndarray:
        values = {_gate(tensor): np.array(gates.get(tensor, 0), np.float32) for tensor in readers}
        found: np.ndarray = session.run([output], {**feed, **values})[0]
        return found.astype(np.float64)

    exact = run({})
    return {tensor: float(np.mean((run({tensor: 1}) - exact) ** 2) / np.var(exact)) for tensor in readers}


def _gated(proto: Any, readers: Mapping[str, Sequence[str]]) -> Any:
    """The graph with each tensor t replaced, where products read it, by t + gate * (rounded(t) - t)."""
    from onnx import ModelProto, TensorProto, helper

    gated = ModelProto()
    gated.CopyFrom(proto)
    graph = gated.graph
    nodes = list(graph.node)
    for node in nodes:
        if node.name in readers.get(next(iter(node.input), ""), ()):
            node.input[0] = f"{node.input[0]}/gated"
    after: dict[str, list[Any]] = {}
    for tensor in readers:
        names = {part: f"{tensor}/{part}" for part in ("abs", "max", "step", "int8", "back", "error", "part", "gated")}
        zero, steps = f"{tensor}/zero", f"{tensor}/steps"
        graph.input.append(helper.make_tensor_value_info(_gate(tensor), TensorProto.FLOAT, []))
        graph.initializer.append(helper.make_tensor(zero, TensorProto.INT8, [], [0]))
        graph.initializer.append(helper.make_tensor(steps, TensorProto.FLOAT, [], [STEPS]))
        after[tensor] = [
            helper.make_node("Abs", [tensor], [names["abs"]]),
            helper.make_node("ReduceMax", [names["abs"]], [names["max"]], keepdims=0),
            helper.make_node("Div", [names["max"], steps], [names["step"]]),
            helper.make_node("QuantizeLinear", [tensor, names["step"], zero], [names["int8"]]),
            helper.make_node("DequantizeLinear", [names["int8"], names["step"], zero], [names["back"]]),
            helper.make_node("Sub", [names["back"], tensor], [names["error"]]),
            helper.make_node("Mul", [names["error"], _gate(tensor)], [names["part"]]),
            helper.make_node("Add", [tensor, names["part"]], [names["gated"]]),
        ]
    del graph.node[:]
    inputs = {value.name for value in graph.input}
    for tensor in (t for t in readers if t in inputs):
        graph.node.extend(after[tensor])
    for node in nodes:  # each rounding right behind what it rounds, as the order of a graph must be
        graph.node.append(node)
        for tensor in (o for o in node.output if o in after):
            graph.node.extend(after[tensor])
    return gated


def _gate(tensor: str) -> str:
    return f"{tensor}/gate"


@contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser advises a preparation for convolutions on the root logger; it does not concern these graphs."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
