"""The normal form of a network: no functions, no constants but weights, unique names, nodes in the order of work."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

import onnx_ir as ir
from onnx_ir.passes.common import (
    InlinePass,
    LiftConstantsToInitializersPass,
    NameFixPass,
    RemoveInitializersFromInputsPass,
    TopologicalSortPass,
)

from optin_deploy.errors import BadInput
from optin_deploy.files.opening import short
from optin_deploy.network.computed_once import compute_once
from optin_deploy.network.maps import convolve_means
from optin_deploy.network.operators.reductions import sums_statistics
from optin_deploy.network.pairwise import pairwise_einsums
from optin_deploy.network.sequences import replace_sequences
from optin_deploy.network.tensors import stored_in

FOREIGN = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, NotImplementedError, AssertionError)
"""What onnx_ir raises about models that are none."""


def normalise(model: ir.Model, source: str) -> None:
    """Bring a model into the form that `Network` promises, in place.

    Raises: BadInput: its nodes wait for each other, or a function does not fit its calls.
    """
    try:
        TopologicalSortPass()(model)
        InlinePass()(model)
        for graph in model.graphs():
            _compute_outputs(graph)
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        replace_sequences(model.graph)
        _plain_casts(model.graph)
        _sums_for_means(model.graph)
        pairwise_einsums(model.graph)
        convolve_means(model.graph)
        RemoveInitializersFromInputsPass()(model)
        NameFixPass()(model)
        compute_once(model)
    except FOREIGN as err:
        waiting = _waiting(model)
        why = f"node {waiting} waits for its own output" if waiting else reason(err)
        raise BadInput(f"{source} is not a network that can be read: {why}. Export the model again.") from err
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None:  # several exporters write -1 for a free size
            value.shape = ir.Shape([None if isinstance(size, int) and size < 0 else size for size in value.shape])


def _plain_casts(graph: ir.Graph) -> None:
    """Put Cast in place of CastLike, for which few engines have a kernel, where the type is known."""
    for node in [node for node in graph if node.op_type == "CastLike" and node.domain == ""]:
        like = None if node.inputs[1] is None else node.inputs[1].dtype
        if like is not None:
            cast = ir.node("Cast", node.inputs[:1], {"to": int(like)}, name=node.name)
            cast.outputs[0].name, cast.outputs[0].type = node.outputs[0].name, ir.TensorType(like)
            cast.outputs[0].shape = node.outputs[0].shape
            ir.convenience.replace_nodes_and_values(graph, node, [node], [cast], node.outputs, cast.outputs)


def _sums_for_means(graph: ir.Graph) -> None:
    """Put a sum and a division by the number of all channels in place of the mean of a number of each channel.

    So is it for a masked channel, whose number is 0; a mean over those that stay would be another.
    """
    for node in [node for node in graph if node.op_type == "ReduceMean" and node.domain == ""]:
        read, made = node.inputs[0], node.outputs[0]
        if read is None or read.shape is None or made.shape is None or len(read.shape) != len(made.shape):
            continue
        over = [place for place, sizes in enumerate(zip(read.shape, made.shape, strict=True)) if sizes[0] != sizes[1]]
        count = read.shape[over[0]] if len(over) == 1 else None
        if not isinstance(count, int) or not sums_statistics(tuple(read.shape), over) or len(node.inputs) < 2:
            continue
        whole = ir.node("ReduceSum", node.inputs, dict(node.attributes), name=node.name)
        number = stored_in(graph, ir.tensor([float(count)], read.dtype), f"{made.name}_count")
        part = ir.node("Div", [whole.outputs[0], number], name=f"{node.name}_of_all")
        whole.outputs[0].name = f"{made.name}_sum"
        for value in (whole.outputs[0], part.outputs[0]):
            value.type, value.shape = made.type, made.shape
        part.outputs[0].name = made.name
        ir.convenience.replace_nodes_and_values(graph, node, [node], [whole, part], [made], part.outputs)


def reason(err: BaseException) -> str:
    """The innermost words of an error, short: onnx_ir wraps them many times."""
    while (inner := err.__cause__ or err.__context__) is not None:
        err = inner
    return short(str(err) or type(err).__name__, 200)


def _waiting(model: ir.Model) -> str | None:
    """A node that is computed from itself, if there is one."""
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        waits = {}
        for node in graph.all_nodes():
            read = [value.producer() for value in node.inputs if value is not None]
            inside = [inner for attribute in node.attributes.values() for inner in _nodes_inside(attribute)]
            waits[node] = [other for other in (*read, *inside) if other is not None]
        try:
            TopologicalSorter(waits).prepare()
        except CycleError as err:
            node = err.args[1][0]
            return short(node.name or node.outputs[0].name)
    return None


def _nodes_inside(attribute: ir.Attr) -> list[ir.Node]:
    if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
        return list(attribute.as_graph())
    if attribute.type == ir.AttributeType.GRAPHS and not attribute.is_ref():
        return [node for graph in attribute.as_graphs() for node in graph]
    return []


def _compute_outputs(graph: ir.Graph) -> None:
    """Put an Identity behind each constant that is an output, so that the constant can become a weight."""
    for node in [node for node in graph if node.op_type == "Constant" and node.domain == ""]:
        constant = node.outputs[0]
        places = [place for place, value in enumerate(graph.outputs) if value is constant]
        if not places:
            continue
        copied = ir.node("Identity", [constant])
        output = copied.outputs[0]
        output.name, output.type, output.shape = constant.name, constant.type, constant.shape
        for place in places:
            graph.outputs[place] = output
        constant.name = f"{constant.name}_constant"
        graph.append(copied)
