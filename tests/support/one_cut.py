"""A small graph, cut and masked: both must agree on two probes, and with ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx import helper, numpy_helper

from optin_deploy.cutting.graph import cut
from optin_deploy.cutting.proof import prove
from optin_deploy.network.graph import Network
from optin_deploy.network.run import Program
from optin_deploy.structure.find import find
from optin_deploy.structure.groups import Layout

Feeds = Mapping[str, np.ndarray]


def graph(
    nodes: Sequence[onnx.NodeProto],
    weights: Feeds,
    probe: Feeds,
    *,
    version: int = 20,
    outputs: Sequence[str] = ("out",),
) -> onnx.ModelProto:
    """Make a graph whose real inputs are as wide as in the probe; other sizes are free."""
    inputs = []
    for name, value in probe.items():
        sizes: list[str | int] = [f"{name}{axis}" for axis in range(value.ndim)]
        if value.dtype.kind == "f":
            sizes[-1] = value.shape[-1]
        inputs.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), sizes))
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    made = helper.make_graph(
        nodes, "one", inputs, [helper.make_empty_tensor_value_info(name) for name in outputs], stored
    )
    opsets = [helper.make_opsetid("", version), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(made, opset_imports=opsets, ir_version=11)


def tensors(feeds: Feeds) -> dict[str, torch.Tensor]:
    """Feeds as torch has them."""
    return {name: torch.from_numpy(value) for name, value in feeds.items()}


def run(network: Network, feeds: Feeds) -> list[np.ndarray]:
    """What ONNX Runtime computes, without any rewriting of the graph."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    model = ir.to_proto(network.model).SerializeToString()
    return list(onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, dict(feeds)))


def holds(
    model: onnx.ModelProto, probes: Sequence[Feeds], expected: Mapping[tuple[int, str], int], *, atol: float = 1e-4
) -> Layout:
    """Assert that these groups are found, and that cuts of each and of all are what their masks are.

    Args:
        model: the graph.
        probes: inputs of two sizes.
        expected: how many groups there are of some size and kind.
        atol: between ONNX Runtime's run of the cut graph and that by torch.
    """
    network, given = Network(ir.from_proto(model), "a test"), [tensors(feeds) for feeds in probes]
    layout = find(network, given)
    assert not layout.structure.problems, layout.structure.problems
    found = Counter((group.units, group.kind) for group in layout.groups)
    assert found == Counter(expected), f"{found} {layout.frozen}"
    some = {group.name: [unit for unit in range(group.units) if unit % 3 != 1] for group in layout.groups}
    for keep in (some, *({name: units[-1:]} for name, units in some.items())) if some else ():
        smaller = cut(layout, keep)
        assert prove(layout, keep, smaller, given).dense > 1e-4, keep
        for feeds, same in zip(probes, given, strict=True):
            torched = Program(smaller)(same).outputs.values()
            for one, other in zip(run(smaller, feeds), torched, strict=True):
                np.testing.assert_allclose(one, other, atol=atol)
    return layout
