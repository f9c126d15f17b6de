"""A classifier behind the states of a network: pooled states times a matrix, as nodes at the end of the graph."""

from __future__ import annotations

import onnx_ir as ir
from torch import Tensor

from optin_deploy.errors import BadInput
from optin_deploy.network.collecting import uncollected
from optin_deploy.network.graph import Network
from optin_deploy.network.pooling_nodes import MASK, PoolingNodes

LOGITS = "logits"


@uncollected()
def with_classifier(network: Network, states: str, pooling: str, weight: Tensor, bias: Tensor) -> Network:
    """Return a network whose only output is `logits`, (batch, classes).

    Args:
        states: output that is read, (batch, tokens, hidden) or (batch, hidden). pooling: see `optin_deploy.pooling`.
        weight: (classes, hidden). bias: (classes,).
    Raises: BadInput: the output has another form.
    """
    model = network.model.clone()
    (found,) = [value for value in model.graph.outputs if value.name == states]
    axes = 0 if found.shape is None else len(found.shape)
    if axes not in (2, 3):
        raise BadInput(f"{network.source}: a classifier reads (batch, tokens, hidden); {states} has {axes} axes.")
    nodes = PoolingNodes(model, {*network.weights, *network.producer, *(port.name for port in network.inputs)})
    if axes == 3:
        mask = next((value for value in model.graph.inputs if value.name == MASK), None)
        pooled = nodes.of_all(found, pooling) if mask is None else nodes.of_some(found, mask, pooling)
    else:
        pooled = found
    stored = [nodes.weight(each, name) for each, name in ((weight, "classifier.weight"), (bias, "classifier.bias"))]
    logits = nodes.node("Gemm", [pooled, *stored], {"transB": 1})
    logits.name, logits.type = LOGITS, found.type
    logits.shape = None if found.shape is None else ir.Shape([found.shape[0], len(bias)])
    model.graph.outputs[:] = [logits]
    return Network(model, network.source)
