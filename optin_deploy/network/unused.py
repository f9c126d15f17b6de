"""A network without what nobody needs: nodes whose results are not read, and outputs that are taken away."""

from __future__ import annotations

from onnx_ir.passes.common import RemoveUnusedNodesPass

from optin_deploy.network.graph import Network


def tidied(network: Network, *, without: str | None = None) -> Network:
    """Return the network without nodes and weights that no output needs.

    Args: without: an output that goes too.
    """
    model = network.model.clone()
    kept = [value for value in model.graph.outputs if value.name != without]
    model.graph.outputs.clear()
    model.graph.outputs.extend(kept)
    RemoveUnusedNodesPass()(model)
    return Network(model, network.source)
