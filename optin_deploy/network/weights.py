"""A network with other weights: the same nodes in the same order, what is stored replaced."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx_ir as ir
from torch import Tensor

from optin_deploy.network.collecting import uncollected
from optin_deploy.network.graph import Network
from optin_deploy.network.run import Place

OWN = ".own"
"""What is added to the name of a weight that one place gets for itself."""


@uncollected()
def separated(network: Network, places: Collection[Place]) -> Network:
    """Return a network where no other place reads the stored tensors of these places: where one does they get a copy.

    Exporters store equal vectors once.
    """
    shared = [place for place in sorted(places) if _readers(network, place) > 1]
    if not shared:
        return network
    model = network.model.clone()
    nodes = list(model.graph)
    taken = {*network.weights, *network.producer, *(port.name for port in (*network.inputs, *network.outputs))}
    for index, place in shared:
        stored = network.weights[network.nodes[index].inputs[place]]
        name = f"{network.nodes[index].inputs[place]}{OWN}"
        while name in taken:
            name += OWN
        taken.add(name)
        value = ir.Value(name=name, type=ir.TensorType(stored.dtype), const_value=stored)
        value.shape = ir.Shape(stored.shape.numpy())
        model.graph.register_initializer(value)
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


def _readers(network: Network, place: Place) -> int:
    return len(network.consumers[network.nodes[place[0]].inputs[place[1]]])
