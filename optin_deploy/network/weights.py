"""A network with other weights: the same nodes in the same order, what is stored replaced."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import onnx_ir as ir
from torch import Tensor

from optin_deploy.network.collecting import uncollected
from optin_deploy.network.graph import Network
from optin_deploy.network.run import Place
from optin_deploy.network.tensors import stored_in

OWN = ".own"
"""What is added to the name of a weight that one place gets for itself."""


@uncollected()
def separated(network: Network, sets: Iterable[Collection[Place]]) -> Network:
    """Return a network where no place outside of a set reads what is stored for places of it: else they get a copy.

    Exporters store equal vectors once.
    """
    shared: dict[tuple[int, str], list[Place]] = {}
    for number, places in enumerate(sets):
        for index, place in sorted(places):
            name = network.nodes[index].inputs[place]
            if not {(node.index, at) for node, at in network.consumers[name]} <= set(places):
                shared.setdefault((number, name), []).append((index, place))
    if not shared:
        return network
    model = network.model.clone()
    nodes = list(model.graph)
    taken = {*network.weights, *network.producer, *(port.name for port in (*network.inputs, *network.outputs))}
    for (_, source), places in shared.items():
        stored, name = network.weights[source], f"{source}{OWN}"
        while name in taken:
            name += OWN
        taken.add(name)
        value = stored_in(model.graph, stored, name)
        for index, place in places:
            nodes[index].replace_input_with(place, value)
    return Network(model, network.source)


@uncollected()
def with_weights(network: Network, weights: Mapping[str, Tensor]) -> Network:
    """Return a network that stores these tensors under the names of others; the given one is untouched."""
    if not weights:
        return network
    model = network.model.clone()
    for name, tensor in weights.items():
        stored = ir.tensor_adapters.TorchTensor(tensor.detach().cpu(), name)
        model.graph.initializers[name].const_value = stored
    return Network(model, network.source)
