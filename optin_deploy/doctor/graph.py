"""What in an ONNX graph stops TensorRT or surprises an engine: pure functions over the parsed file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from math import prod

import onnx
from onnx import TensorProto

from optin_deploy.common.formatting import listed, named
from optin_deploy.doctor.findings import Finding
from optin_deploy.network.onnx_data import all_nodes, all_tensors

ATTENTION_OPSET = 23
"""First opset in which ai.onnx has an Attention node."""
AGAIN = "export again with `optin build`"
STANDARD = ("", "ai.onnx")
TENSORRT_OWN = ("trt.plugins",)
"""Domain of TensorRT's own plugins."""
UNSUPPORTED = """
    AffineGrid Bernoulli BitCast BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor CenterCropPad Col2Im Compress
    ConcatFromSequence ConvInteger CumProd DFT DeformConv Det DynamicQuantizeLinear ImageDecoder MatMulInteger
    MaxRoiPool MaxUnpool MelWeightMatrix Multinomial NegativeLogLikelihoodLoss Optional OptionalGetElement
    OptionalHasElement QLinearConv QLinearMatMul RegexFullMatch SequenceAt SequenceConstruct SequenceEmpty
    SequenceErase SequenceInsert SequenceLength SequenceMap SoftmaxCrossEntropyLoss SplitToSequence StringConcat
    StringNormalizer StringSplit SwiGLU TfIdfVectorizer Unique
"""
"""Operators of ai.onnx (onnx 1.23) to which `OnnxParser.supports_operator` of TensorRT-RTX 1.7.1.116 says no.

A hint for machines without a parser: the full TensorRT may know a few more, and a known operator may still be refused.
"""


def check_graph(proto: onnx.ModelProto, subject: str) -> list[Finding]:
    """What all CHECKS find, in their order.

    Args: subject: name of the file, for the findings.
    """
    return [finding for check in CHECKS for finding in check(proto, subject)]


def versions(proto: onnx.ModelProto, subject: str) -> Iterator[Finding]:
    """Opset and IR version, and whether the installed onnx package knows them."""
    opset = _opset(proto)
    if opset == 0:
        yield Finding("problem", subject, "imports no opset of ai.onnx, so no engine can read its nodes.", AGAIN)
        return
    known, known_ir = onnx.defs.onnx_opset_version(), onnx.IR_VERSION
    text = f"opset {opset}, IR version {proto.ir_version}, {len(proto.graph.node)} nodes."
    if opset > known or proto.ir_version > known_ir:
        text += f" The installed onnx package knows opset {known} and IR version {known_ir} at most."
        yield Finding("warning", subject, text, "pip install -U onnx, or " + AGAIN)
    else:
        yield Finding("ok", subject, text)


def attention(proto: onnx.ModelProto, subject: str) -> Iterator[Finding]:
    """A float32 Attention node passes TensorRT's parser, and then its builder gives no engine (float16 builds)."""
    if _opset(proto) < ATTENTION_OPSET:
        return
    types = _types(proto)
    nodes = [node for node in all_nodes(proto) if node.op_type == "Attention" and node.domain in STANDARD]
    kinds = {types.get(node.input[0], TensorProto.FLOAT) for node in nodes if node.input}
    if TensorProto.FLOAT in kinds:
        what = f"opset {_opset(proto)} with {len(nodes)} float32 Attention node{'s' if len(nodes) > 1 else ''}"
        yield Finding(
            "problem",
            subject,
            f"{what}: TensorRT parses this, but builds no engine.",
            "export with opset 22 or lower (`optin build` does), or in fp16",
        )


def foreign_nodes(proto: onnx.ModelProto, subject: str) -> Iterator[Finding]:
    """Nodes outside ai.onnx that are neither functions inside the file nor TensorRT's own plugins."""
    inside = {(function.domain, function.name) for function in proto.functions}
    found = Counter(
        f"{node.domain}:{node.op_type}"
        for node in all_nodes(proto)
        if node.domain not in (*STANDARD, *TENSORRT_OWN) and (node.domain, node.op_type) not in inside
    )
    if found:
        counts = listed(f"{count} x {named(name)}" for name, count in found.most_common())
        yield Finding(
            "problem",
            subject,
            f"nodes outside ai.onnx: {counts}. ONNX Runtime may run them; TensorRT and others refuse them.",
            "give engines the graph as it was exported, not one that ONNX Runtime or its optimiser wrote",
        )


def dynamic_quantization(proto: onnx.ModelProto, subject: str) -> Iterator[Finding]:
    """TensorRT reads int8 as pairs of QuantizeLinear and DequantizeLinear with fixed scales."""
    count = sum(node.op_type == "DynamicQuantizeLinear" for node in all_nodes(proto))
    if count:
        yield Finding(
            "problem",
            subject,
            f"{count} x DynamicQuantizeLinear: TensorRT refuses it; it reads int8 as Q/DQ with fixed scales.",
            "quantize statically: QuantizeLinear / DequantizeLinear pairs",
        )


def double_precision(proto: onnx.ModelProto, subject: str) -> Iterator[Finding]:
    """TensorRT computes float64 in float32; GPUs are slow at it elsewhere."""
    stored = {tensor.name for tensor in all_tensors(proto) if tensor.data_type == TensorProto.DOUBLE}
    typed = {name for name, kind in _types(proto).items() if kind == TensorProto.DOUBLE}
    cast = {
        node.output[0]
        for node in all_nodes(proto)
        if node.op_type == "Cast"
        and node.output
        and any(a.name == "to" and a.i == TensorProto.DOUBLE for a in node.attribute)
    }
    if doubles := sorted(stored | typed | cast):
        yield Finding(
            "warning",
            subject,
            f"{len(doubles)} tensors in float64 ({listed(map(named, doubles), 3)}): TensorRT computes them in float32.",
            "turn the model to float32 before the export: model.float()",
        )


def zero_sizes(proto: onnx.ModelProto, subject: str) -> Iterator[Finding]:
    """An emptied branch must be its bias, not a product with a (n, 0) matrix: engines differ in what they do there."""
    # Shapes and axes are integers and may be empty; so may the unused regions of Resize.
    regions = {name for node in all_nodes(proto) if node.op_type == "Resize" for name in node.input[1:3]}
    floats = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
    stored = [
        t.name for t in all_tensors(proto) if t.data_type in floats and prod(t.dims) == 0 and t.name not in regions
    ]
    typed = [
        entry.name
        for entry in (*proto.graph.value_info, *proto.graph.output)
        if entry.type.tensor_type.elem_type in floats
        and any(d.HasField("dim_value") and d.dim_value == 0 for d in entry.type.tensor_type.shape.dim)
    ]
    if empty := sorted({*stored, *typed} - regions):
        yield Finding(
            "problem",
            subject,
            f"{len(empty)} tensors have no element ({listed(map(named, empty), 3)}); engines refuse or crash on them.",
            "replace the emptied branch by its bias (`optin rewrite` does)",
        )


def dynamic_axes(proto: onnx.ModelProto, subject: str) -> Iterator[Finding]:
    """Batch (and for text the length) must be open for an engine with a range of shapes."""
    stored = {tensor.name for tensor in proto.graph.initializer}
    inputs = [entry for entry in proto.graph.input if entry.name not in stored]
    fixed = []
    for entry in inputs:
        dims = entry.type.tensor_type.shape.dim
        is_text = len(dims) == 2 and entry.type.tensor_type.elem_type in (TensorProto.INT32, TensorProto.INT64)
        sizes = list(zip(("batch", "length"), dims, strict=False))[: 2 if is_text else 1]
        fixed += [f"{what} of {named(entry.name)} is {d.dim_value}" for what, d in sizes if d.dim_value]
    if fixed:
        text = f"fixed sizes: {listed(fixed)}. The graph runs at these only."
        yield Finding("warning", subject, text, AGAIN + ", which leaves them open")
    else:
        yield Finding("ok", subject, f"batch and length are open in {listed(named(entry.name) for entry in inputs)}.")


CHECKS: tuple[Callable[[onnx.ModelProto, str], Iterator[Finding]], ...] = (
    versions,
    attention,
    foreign_nodes,
    dynamic_quantization,
    double_precision,
    zero_sizes,
    dynamic_axes,
)


def unsupported_by_list(proto: onnx.ModelProto, subject: str) -> Iterator[Finding]:
    """Operators that TensorRT's parser is known not to take; for machines where it cannot be asked."""
    unsupported = frozenset(UNSUPPORTED.split())
    found = Counter(n.op_type for n in all_nodes(proto) if n.domain in STANDARD and n.op_type in unsupported)
    if found:
        counts = listed(f"{count} x {op}" for op, count in found.most_common())
        text = f"probably not in TensorRT, by a stored list: {counts}."
        yield Finding("warning", subject, text, "for its parser's own word: pip install 'optin-deploy[trt-rtx]'")


def _opset(proto: onnx.ModelProto) -> int:
    return max((entry.version for entry in proto.opset_import if entry.domain in STANDARD), default=0)


def _types(proto: onnx.ModelProto) -> dict[str, int]:
    """Element type of each tensor whose type the file states."""
    entries = (*proto.graph.input, *proto.graph.value_info, *proto.graph.output)
    stored = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    return {entry.name: entry.type.tensor_type.elem_type for entry in entries} | stored
