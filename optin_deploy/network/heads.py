"""A classifier behind the states of a network: pooled states times a matrix, as nodes at the end of the graph."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor

from optin_deploy.errors import BadInput
from optin_deploy.network.collecting import uncollected
from optin_deploy.network.graph import Network
from optin_deploy.network.pooling_nodes import PoolingNodes

LOGITS, NAMES = "logits", ("classifier.weight", "classifier.bias")


@uncollected()
def with_classifier(
    network: Network, states: str, pooling: str, mask: str | None, head: tuple[Tensor, Tensor]
) -> Network:
    """Return a network whose only output are logits, (batch, classes).

    Args:
        states: output that is read, (batch, tokens, hidden) or (batch, hidden). pooling: see `feeds.pooling`.
        mask: input that tells tokens from padding; None: all tokens count.
        head: weight, (classes, hidden), and bias, (classes,).
    Raises: BadInput: the output has another form.
    """
    model = network.model.clone()
    (found,) = [value for value in model.graph.outputs if value.name == states]
    axes = 0 if found.shape is None else len(found.shape)
    if axes not in (2, 3):
        raise BadInput(f"{network.source}: a classifier reads (batch, tokens, hidden); {states} has {axes} axes.")
    nodes = PoolingNodes(model, {*network.weights, *network.producer, *(port.name for port in network.inputs)})
    if axes == 3:
        given_mask = next((value for value in model.graph.inputs if value.name == mask), None)
        pooled = nodes.of_all(found, pooling) if given_mask is None else nodes.of_some(found, given_mask, pooling)
    else:
        pooled = found
    stored = [nodes.weight(each, name) for each, name in zip(head, NAMES, strict=True)]
    logits = nodes.node("Gemm", [pooled, *stored], {"transB": 1})
    logits.name, logits.type = nodes.named(LOGITS), found.type
    logits.shape = None if found.shape is None else ir.Shape([found.shape[0], len(head[1])])
    model.graph.outputs[:] = [logits]
    return Network(RemoveUnusedNodesPass()(model).model, network.source)
