"""Parts of a tensor that are listed in a sequence and taken out by place become the outputs of a Split."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from optin_deploy.network.tensors import stored_in


def replace_sequences(graph: ir.Graph) -> None:
    """Write Split for SplitToSequence, in place, where every reader takes one part whose place is known.

    torch's exporter writes sequences for `split` and `chunk` unless it optimises.
    """
    for node in [node for node in graph if node.op_type == "SplitToSequence" and not node.domain]:
        readers = [reader for reader, _ in node.outputs[0].uses()]
        places = [_number(reader.inputs[1]) if reader.op_type == "SequenceAt" else None for reader in readers]
        sizes = _sizes(node)
        if sizes is None or any(place is None for place in places) or node.outputs[0].is_graph_output():
            continue
        given = stored_in(graph, ir.tensor(np.array(sizes, dtype=np.int64)), f"{node.outputs[0].name}_sizes")
        split = ir.node("Split", [node.inputs[0], given], {"axis": _axis(node)}, num_outputs=len(sizes), name=node.name)
        graph.insert_before(node, split)
        for reader, place in zip(readers, places, strict=True):
            part = split.outputs[int(place or 0)]
            if part.name:  # another reader gave it one
                copied = ir.node("Identity", [part])
                graph.insert_before(node, copied)
                part = copied.outputs[0]
            part.name, part.type = reader.outputs[0].name, reader.outputs[0].type
            reader.outputs[0].replace_all_uses_with(part, replace_graph_outputs=True)
        graph.remove([*readers, node], safe=True)


def _axis(node: ir.Node) -> int:
    return node.attributes.get_int("axis", 0)


def _sizes(node: ir.Node) -> list[int] | None:
    """Sizes of all parts; None where they are not known, or where parts lose their axis."""
    if len(node.inputs) < 2 or not node.attributes.get_int("keepdims", 1):
        return None
    given, shape = node.inputs[1], node.inputs[0].shape if node.inputs[0] is not None else None
    if given is None or given.const_value is None:
        return None
    sizes = given.const_value.numpy()
    if sizes.ndim:
        return [int(size) for size in sizes]
    whole = None if shape is None else shape[_axis(node)]
    return [min(int(sizes), whole - start) for start in range(0, whole, int(sizes))] if isinstance(whole, int) else None


def _number(value: ir.Value | None) -> int | None:
    return None if value is None or value.const_value is None else int(value.const_value.numpy())
