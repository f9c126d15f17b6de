"""Small ONNX models in all forms that files come in, made by onnx alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
WIDTH = 24
"""A square weight of this width takes 2,304 bytes: enough to be mapped."""


def value(name: str, *shape: int | str, dtype: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def weight(name: str, *shape: int, seed: int = 0) -> TensorProto:
    generator = np.random.default_rng(seed)
    return numpy_helper.from_array(generator.standard_normal(shape).astype(np.float32), name)


def model_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    weights: Sequence[TensorProto] = (),
    *,
    opset: int = 17,
    ir_version: int = 8,
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, functions=functions)


def chain(opset: int = 17, ir_version: int = 8) -> onnx.ModelProto:
    """Two products with a ReLU between them."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "first"),
        helper.make_node("Relu", ["h"], ["r"], "act"),
        helper.make_node("MatMul", ["r", "v"], ["y"], "second"),
    ]
    weights = [weight("w", WIDTH, WIDTH), weight("v", WIDTH, WIDTH, seed=1)]
    inputs = [value("x", "batch", WIDTH)]
    if ir_version < 4:
        inputs += [value(tensor.name, WIDTH, WIDTH) for tensor in weights]
    return model_of(nodes, inputs, [value("y", "batch", WIDTH)], weights, opset=opset, ir_version=ir_version)


def constants() -> onnx.ModelProto:
    """Every weight and number is a Constant node; one is an output."""
    held = {
        "w": {"value": weight("", WIDTH, WIDTH)},
        "one": {"value_float": 1.0},
        "some": {"value_floats": [1.0] * WIDTH},
        "shape": {"value_ints": [-1, 2, WIDTH // 2]},
        "out": {"value_int": 7},
    }
    nodes = [helper.make_node("Constant", [], [name], **attributes) for name, attributes in held.items()]
    nodes += [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Add", ["a", "one"], ["b"]),
        helper.make_node("Add", ["b", "some"], ["c"]),
        helper.make_node("Reshape", ["c", "shape"], ["y"]),
    ]
    outputs = [value("y", "batch", 2, WIDTH // 2), value("out", dtype=INT64)]
    return model_of(nodes, [value("x", "batch", WIDTH)], outputs)


def functions() -> onnx.ModelProto:
    """A function that calls another one, called twice; a weight lies in a function."""
    inner = helper.make_function(
        "own",
        "Scale",
        ["a"],
        ["b"],
        [
            helper.make_node("Constant", [], ["k"], value=weight("k", WIDTH, WIDTH)),
            helper.make_node("MatMul", ["a", "k"], ["b"], "node"),
        ],
        [helper.make_opsetid("", 17)],
    )
    outer = helper.make_function(
        "own",
        "Twice",
        ["a"],
        ["c"],
        [helper.make_node("Scale", ["a"], ["b"], domain="own"), helper.make_node("Scale", ["b"], ["c"], domain="own")],
        [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)],
    )
    nodes = [
        helper.make_node("Twice", ["x"], ["h"], domain="own"),
        helper.make_node("Twice", ["h"], ["y"], domain="own"),
    ]
    ends = [value("x", "batch", WIDTH)], [value("y", "batch", WIDTH)]
    return model_of(nodes, *ends, functions=[inner, outer])


def branches() -> onnx.ModelProto:
    """An If whose branches read the outer graph, hold weights, and use a name of the outer graph again."""
    then = helper.make_graph(
        [helper.make_node("MatMul", ["h", "k"], ["p"]), helper.make_node("Relu", ["p"], ["then_out"])],
        "then",
        [],
        [value("then_out", "batch", WIDTH)],
        [weight("k", WIDTH, WIDTH, seed=2)],
    )
    other = helper.make_graph(
        [
            helper.make_node("Constant", [], ["c"], value=weight("", WIDTH)),
            helper.make_node("Add", ["h", "c"], ["else_out"]),
        ],
        "else",
        [],
        [value("else_out", "batch", WIDTH)],
    )
    nodes = [
        helper.make_node("If", ["flag"], ["y"], "choice", then_branch=then, else_branch=other),
        helper.make_node("MatMul", ["x", "w"], ["h"], "first"),
    ]
    inputs = [value("x", "batch", WIDTH), value("flag", dtype=BOOL)]
    return model_of(nodes[::-1], inputs, [value("y", "batch", WIDTH)], [weight("w", WIDTH, WIDTH)])


def text(rows: int = 97, length: int | str = "length") -> onnx.ModelProto:
    """Word and type tables, a mask, and a product."""
    nodes = [
        helper.make_node("Cast", ["ids"], ["cast"], to=INT64),
        helper.make_node("Gather", ["words", "cast"], ["a"]),
        helper.make_node("Gather", ["kinds", "types"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["c"]),
        helper.make_node("Cast", ["mask"], ["m"], to=FLOAT),
        helper.make_node("Unsqueeze", ["m", "last"], ["n"]),
        helper.make_node("Mul", ["c", "n"], ["d"]),
        helper.make_node("MatMul", ["d", "w"], ["y"]),
    ]
    inputs = [value(name, "batch", length, dtype=INT64) for name in ("ids", "types", "mask")]
    weights = [
        weight("words", rows, WIDTH),
        weight("kinds", 2, WIDTH),
        weight("w", WIDTH, WIDTH),
        numpy_helper.from_array(np.array([-1]), "last"),
    ]
    return model_of(nodes, inputs, [value("y", "batch", length, WIDTH)], weights)


def sizes() -> onnx.ModelProto:
    """Numbers of the file say how large values are."""
    numbers = {"zero": 0, "limit": WIDTH, "step": 1, "filled": [1, WIDTH], "wide": [1, WIDTH], "times": [1, 1]}
    numbers |= {"pads": [0, 0, 0, 0], "split": [WIDTH // 2, WIDTH // 2], "start": [0], "end": [WIDTH]}
    nodes = [
        helper.make_node("Range", ["zero", "limit", "step"], ["range"]),
        helper.make_node("Slice", ["range", "start", "end", "start", "step_of"], ["part"]),
        helper.make_node("Expand", ["part", "wide"], ["rows"]),
        helper.make_node("ConstantOfShape", ["filled"], ["ones"], value=helper.make_tensor("", INT64, [1], [1])),
        helper.make_node("Tile", ["ones", "times"], ["tiled"]),
        helper.make_node("Pad", ["tiled", "pads"], ["padded"]),
        helper.make_node("Add", ["rows", "padded"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["real"], to=FLOAT),
        helper.make_node("Split", ["real", "split"], ["left", "right"], axis=1),
        helper.make_node("Concat", ["right", "left"], ["turned"], axis=1),
        helper.make_node("Add", ["x", "turned"], ["shifted"]),
        helper.make_node("MatMul", ["shifted", "w"], ["h"]),
        helper.make_node("MatMul", ["h", "v"], ["y"]),
    ]
    stored = [numpy_helper.from_array(np.array(number), name) for name, number in numbers.items()]
    stored += [numpy_helper.from_array(np.array([1]), "step_of")]
    stored += [weight("w", WIDTH, WIDTH), weight("v", WIDTH, WIDTH, seed=1)]
    return model_of(nodes, [value("x", "batch", WIDTH)], [value("y", "batch", WIDTH)], stored)


FORMS = {form.__name__: form for form in (chain, constants, functions, branches, text, sizes)}
"""Every form by name."""


def feeds(model: onnx.ModelProto, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of one of these models, five rows of seven."""
    generator = np.random.default_rng(seed)
    sizes = {"batch": 5, "length": 7}
    stored = {tensor.name for tensor in model.graph.initializer}
    found: dict[str, np.ndarray] = {}
    for port in model.graph.input:
        shape = [sizes.get(size.dim_param, size.dim_value) for size in port.type.tensor_type.shape.dim]
        if port.name in stored:
            continue
        if port.type.tensor_type.elem_type == FLOAT:
            found[port.name] = generator.standard_normal(shape).astype(np.float32)
        elif port.type.tensor_type.elem_type == BOOL:
            found[port.name] = np.array(bool(seed % 2))
        else:
            found[port.name] = generator.integers(0, 2, shape)
    return found


def outputs(model: onnx.ModelProto | str, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """What ONNX Runtime computes, without changing the graph."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    source = model if isinstance(model, str) else model.SerializeToString()
    found: list[np.ndarray] = ort.InferenceSession(source, options).run(None, dict(inputs))
    return found
