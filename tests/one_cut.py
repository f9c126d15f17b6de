"""Cut a small graph by brute force, and compare it with its masked self."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx import numpy_helper

from optin_deploy.network.graph import Network
from optin_deploy.network.run import Program
from optin_deploy.structure.axes import kept, size
from optin_deploy.structure.find import find
from optin_deploy.structure.groups import Layout

Feeds = Mapping[str, np.ndarray]


def layout_of(model: onnx.ModelProto, probes: Sequence[Feeds]) -> Layout:
    """What is found in a graph that keeps its order of work."""
    return find(Network(ir.from_proto(model), "a test"), [tensors(feeds) for feeds in probes])


def tensors(feeds: Feeds) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in feeds.items()}


def cut(model: onnx.ModelProto, layout: Layout, keep: Mapping[str, Sequence[int]]) -> onnx.ModelProto:
    """Index every weight by what is kept, and write the sizes."""
    smaller = onnx.ModelProto()
    smaller.CopyFrom(model)
    leaves = layout.leaves(keep)
    sizes = {leaf: len(units) for leaf, units in leaves.items()}
    weights = {weight.name: numpy_helper.to_array(weight) for weight in model.graph.initializer}
    structure = layout.structure

    def own(node: int, place: int, value: np.ndarray) -> None:
        name = f"{smaller.graph.node[node].input[place]}@{node}.{place}"
        smaller.graph.node[node].input[place] = name
        smaller.graph.initializer.append(numpy_helper.from_array(value, name))
        weights[name] = value

    for use in structure.uses:
        value = weights[use.weight]
        for position, axis in enumerate(use.axes):
            value = np.take(value, kept(axis, leaves), axis=position)
        if value.shape != weights[use.weight].shape:
            own(use.node, use.place, np.ascontiguousarray(value))
    for number in structure.numbers:
        node, new = smaller.graph.node[number.node], size(number.axis, sizes)
        if isinstance(number.where, int):
            value = weights[node.input[number.where]].copy()
            value.reshape(-1)[number.entry] = new
            own(number.node, number.where, value)
        else:
            attribute = next(each for each in node.attribute if each.name == number.where)
            if number.entry is None:
                attribute.i = new
            else:
                attribute.ints[number.entry] = new
    return smaller


def masks(layout: Layout, keep: Mapping[str, Sequence[int]]) -> dict[tuple[int, int], torch.Tensor]:
    """Zeros and ones for the places where masks belong."""
    leaves = layout.leaves(keep)
    structure = layout.structure
    found: dict[tuple[int, int], torch.Tensor] = {}
    for name in keep:
        for site in layout.by_name[name].sites:
            rank = len(structure.shapes.shape(structure.network.nodes[site.node].inputs[site.place]) or ())
            mask = torch.zeros(site.axis.size, dtype=torch.float64)
            mask[torch.from_numpy(kept(site.axis, leaves))] = 1
            shape = [1] * rank
            shape[site.position] = -1
            key = (site.node, site.place)
            found[key] = found.get(key, torch.ones(())) * mask.reshape(shape)
    return found


def run(model: onnx.ModelProto, feeds: Feeds) -> list[np.ndarray]:
    """What ONNX Runtime computes, without any rewriting of the graph."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(feeds)))


def holds(model: onnx.ModelProto, probes: Sequence[Feeds], expected: Mapping[int, int], *, atol: float = 1e-5) -> Layout:
    """Assert that these groups are found, and that a cut of every group is what its mask is, for each probe.

    Args:
        model: the graph.
        probes: inputs of two sizes.
        expected: sizes of groups, and how many there are of each.
        atol: between ONNX Runtime's run of the cut graph and the masked one in float64.
    """
    layout = layout_of(model, probes)
    assert not layout.structure.problems, layout.structure.problems
    found: dict[int, int] = {}
    for group in layout.groups:
        found[group.units] = found.get(group.units, 0) + 1
    assert found == dict(expected), [(group.name, group.units, group.kind) for group in layout.groups] + list(layout.frozen)
    some = {group.name: [unit for unit in range(group.units) if unit % 3 != 1] for group in layout.groups}
    for keep in ({}, some, *({name: units[-1:]} for name, units in some.items())):
        smaller = cut(model, layout, keep)
        for feeds in probes:
            exact = Program(layout.structure.network, dtype=torch.float64)(tensors(feeds), masks=masks(layout, keep))
            again = Program(Network(ir.from_proto(smaller), "a test"), dtype=torch.float64)(tensors(feeds))
            dense = Program(layout.structure.network, dtype=torch.float64)(tensors(feeds))
            for (name, value), got in zip(exact.outputs.items(), run(smaller, feeds), strict=True):
                np.testing.assert_allclose(again.outputs[name], value, atol=1e-9, err_msg=f"{name} {keep}")
                np.testing.assert_allclose(got, value, atol=atol, err_msg=f"{name} {keep}")
                assert not keep or not np.allclose(dense.outputs[name], value, atol=1e-3), (name, keep)
    return layout
