"""One operator in a graph of its own: run by its row, by ONNX Runtime and by onnx's reference evaluator."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from optin_deploy.network.graph import Network
from optin_deploy.network.operators import rows

Feeds = Sequence[np.ndarray | None]


def model_of(
    op: str,
    feeds: Feeds,
    *,
    outputs: int = 1,
    unread: Collection[int] = (),
    stored: Collection[int] = (),
    domain: str = "",
    version: int = 20,
    **attributes: Any,
) -> onnx.ModelProto:
    """A graph of one node; inputs that are None are left out, and those that are stored are weights."""
    names = ["" if feed is None else f"in{place}" for place, feed in enumerate(feeds)]
    given = ["" if place in unread else f"out{place}" for place in range(outputs)]
    node = helper.make_node(op, names, given, "node", domain=domain, **attributes)
    declared = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(feed.dtype), feed.shape)
        for place, (name, feed) in enumerate(zip(names, feeds, strict=True))
        if feed is not None and place not in stored
    ]
    weights = [numpy_helper.from_array(np.asarray(feeds[place]), names[place]) for place in stored]
    graph = helper.make_graph(
        [node], "one", declared, [helper.make_empty_tensor_value_info(name) for name in given if name], weights
    )
    opsets = [helper.make_opsetid("", version), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=11)


def runtime(model: onnx.ModelProto, feeds: Feeds) -> list[np.ndarray]:
    """What ONNX Runtime computes, without any rewriting of the graph."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, _named(model, feeds)))


def reference(model: onnx.ModelProto, feeds: Feeds) -> list[np.ndarray]:
    """What onnx's own evaluator computes."""
    return list(ReferenceEvaluator(model).run(None, _named(model, feeds)))


def _named(model: onnx.ModelProto, feeds: Feeds) -> dict[str, np.ndarray]:
    asked = {port.name for port in model.graph.input}
    return {f"in{place}": np.asarray(feed) for place, feed in enumerate(feeds) if f"in{place}" in asked}


def ours(model: onnx.ModelProto, feeds: Sequence[Tensor | None]) -> list[Tensor | None]:
    """What the row computes, of the outputs that are read."""
    (node,) = Network(ir.from_proto(model), "a test").nodes
    result = rows()[node.domain, node.op].compute(node, *feeds)
    values = result if isinstance(result, tuple) else (result,)
    return [value for name, value in zip(node.outputs, values, strict=False) if name]


def same(
    op: str,
    feeds: Feeds,
    *,
    atol: float = 1e-5,
    judges: str = "runtime",
    steps: float = 0,
    compare: int | None = None,
    **form: Any,
) -> list[np.ndarray]:
    """Assert that the row computes what the judges do, and the right shapes without computing.

    Args:
        op: the operator.
        feeds: its inputs, None where one is left out.
        atol: largest difference of real numbers.
        judges: "runtime", "reference" or "both".
        steps: whole numbers may differ by as much, where engines round the same number up or down.
        compare: how many outputs are compared, where others are free to differ; None: all.
        form: outputs, those unread, inputs that are stored, domain, version of the opset and attributes.

    Returns:
        What the first judge computed.
    """
    model = model_of(op, feeds, **form)
    tensors = [None if feed is None else torch.from_numpy(np.array(feed)) for feed in feeds]
    got = ours(model, tensors)
    wanted = [judge(model, feeds) for judge in (runtime, reference) if judges in (judge.__name__, "both")]
    for expected in wanted:
        assert len(got) == len(expected)
        for place, right in enumerate(expected[:compare]):
            value = got[place]
            assert value is not None
            assert tuple(value.shape) == right.shape, (place, value.shape, right.shape)
            whole = right.dtype.kind in "iu"
            difference = np.abs(value.detach().double().numpy() - right.astype(np.float64))
            assert np.all(np.isfinite(difference)), place
            assert difference.max(initial=0) <= (steps if whole else atol), (place, difference.max())
    (node,) = Network(ir.from_proto(model), "a test").nodes
    numbers = rows()[node.domain, node.op].numbers
    shapes_only = [
        value if value is None or place in numbers else value.to("meta") for place, value in enumerate(tensors)
    ]
    for real, shaped in zip(got, ours(model, shapes_only), strict=True):
        if real is not None:
            assert shaped is not None
            assert shaped.is_meta
            assert (shaped.shape, shaped.dtype) == (real.shape, real.dtype)
    return wanted[0]
