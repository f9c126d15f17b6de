"""The same networks as other tools write them: optimised, fused, in fewer bits, slimmed, in other operator sets."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.zoo.export import Export, export, quiet
from benchmarks.zoo.families import HEADS, HIDDEN

FAMILIES = ("bert", "vit", "llama", "swin", "resnet")
FUSIONS = {"bert": "bert", "vit": "vit", "llama": "gpt2", "swin": "swin"}
"""Family to the kind of model that ONNX Runtime's script of fusions is told."""
FORM = 2
"""Number to be raised when a dialect must be made anew although no version changed."""
Maker = Callable[[Export, Path], None]
"""Reads an export and writes its dialect."""


def dialect(family: str, name: str) -> Export:
    """Return a family in a dialect, made from its export by dynamo unless the dialect says otherwise.

    Raises: whatever the tool raises that cannot do it.
    """
    if name in EXPORTED:
        return EXPORTED[name](family)
    source = export(family, "dynamo")
    tools = "-".join(version(package) for package in ("onnxruntime", "onnxslim", "onnxconverter-common"))
    path = source.path.with_name(f"{source.path.stem}.{name}.{FORM}.{tools}.onnx")
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder, quiet():
            made = Path(folder) / path.name
            MADE[name](source, made)
            made.replace(path)
    return Export(source.family, path, source.model)


def optimised(source: Export, path: Path, *, level: str) -> None:
    """Write what ONNX Runtime's own optimiser makes of it at a level, on a CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(source.path), options, providers=["CPUExecutionProvider"])


def fused(source: Export, path: Path, *, exporter: str) -> None:
    """Fuse attention, biases and normalizations by ONNX Runtime's script for transformers."""
    optimizer: Any = import_module("onnxruntime.transformers.optimizer")
    kind = FUSIONS[source.family.name]
    network = export(source.family.name, exporter)
    found = optimizer.optimize_model(
        str(network.path), model_type=kind, num_heads=HEADS, hidden_size=HIDDEN, opt_level=0
    )
    found.save_model_to_file(str(path))


def half(source: Export, path: Path) -> None:
    """Write weights and activations in 16 bits, inputs and outputs in 32."""
    float16: Any = import_module("onnxconverter_common.float16")
    kept = [*float16.DEFAULT_OP_BLOCK_LIST, "Cast"]  # else it takes the result of a Cast to float32 for float16
    onnx.save(float16.convert_float_to_float16(onnx.load(source.path), keep_io_types=True, op_block_list=kept), path)


def static(source: Export, path: Path, *, form: str) -> None:
    """Quantise weights and activations to 8 bits, by the ranges that random inputs give."""
    tools: Any = import_module("onnxruntime.quantization")
    names = {value.name for value in onnx.load(source.path).graph.input}
    feeds = [
        {name: value.numpy() for name, value in source.family.feeds(seed=seed).items() if name in names}
        for seed in range(3)
    ]

    class Reader(tools.CalibrationDataReader):  # type: ignore[misc]  # untyped base
        def __init__(self) -> None:
            self.left: Iterator[dict[str, np.ndarray]] = iter(feeds)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    tools.quantize_static(
        str(source.path),
        str(path),
        Reader(),
        quant_format=getattr(tools.QuantFormat, form),
        per_channel=True,
        activation_type=tools.QuantType.QInt8 if form == "QDQ" else tools.QuantType.QUInt8,
        weight_type=tools.QuantType.QInt8,
    )


def dynamic(source: Export, path: Path) -> None:
    """Quantise weights to 8 bits, and activations while it runs."""
    tools: Any = import_module("onnxruntime.quantization")
    tools.quantize_dynamic(str(source.path), str(path), weight_type=tools.QuantType.QInt8)


def four_bits(source: Export, path: Path, *, symmetric: bool) -> None:
    """Store the weights of products in 4 bits, in blocks of 16 along the axis that is contracted."""
    tools: Any = import_module("onnxruntime.quantization.matmul_nbits_quantizer")
    quantizer = tools.MatMulNBitsQuantizer(onnx.load(source.path), block_size=16, is_symmetric=symmetric)
    quantizer.process()
    onnx.save(quantizer.model.model, path)


def slimmed(source: Export, path: Path) -> None:
    """Write what onnxslim leaves of it."""
    onnxslim: Any = import_module("onnxslim")
    onnx.save(onnxslim.slim(onnx.load(source.path)), path)  # given paths it prints a table


EXPORTED: Mapping[str, Callable[[str], Export]] = {
    "opset-13": partial(export, exporter="torchscript", opset=13),
    "opset-17": partial(export, exporter="torchscript", opset=17),
    "opset-20": partial(export, exporter="dynamo", opset=20),
    "opset-23": partial(export, exporter="dynamo", opset=23),
    "opset-23-attention": partial(export, exporter="dynamo", opset=23, sdpa=True),
    "bf16": partial(export, exporter="dynamo", opset=22, bf16=True),
}
MADE: Mapping[str, Maker] = {
    "ort-1": partial(optimised, level="BASIC"),
    "ort-2": partial(optimised, level="EXTENDED"),
    "ort-99": partial(optimised, level="ALL"),
    "fused": partial(fused, exporter="dynamo"),
    "fused-torchscript": partial(fused, exporter="torchscript"),
    "fp16": half,
    "int8-qdq": partial(static, form="QDQ"),
    "int8-operators": partial(static, form="QOperator"),
    "int8-dynamic": dynamic,
    "4-bit": partial(four_bits, symmetric=True),
    "4-bit-zeros": partial(four_bits, symmetric=False),
    "onnxslim": slimmed,
}
DIALECTS = (*EXPORTED, *MADE)
"""Names of all dialects. `opset-17` and `opset-20` are the usual exports."""
NOT_MADE = (("swin", "opset-23-attention"), ("resnet", "bf16"))
"""Torch's exporter fails at the first, and folds the second's BatchNorms into weights of another type, which no file
may have."""


def offered(family: str) -> tuple[str, ...]:
    """Dialects that a family has: what fuses attention has nothing to do in a convolutional network."""
    plain = family in FUSIONS
    return tuple(
        name
        for name in DIALECTS
        if (family, name) not in NOT_MADE and (plain or ("fused" not in name and "attention" not in name))
    )
