"""A network as a torch module: parameters under their names, differentiable, on any device and of any real type."""

from __future__ import annotations

import re
from collections.abc import Set

import torch
from torch import Tensor, nn

from optin_deploy.errors import BadInput
from optin_deploy.network.graph import Network
from optin_deploy.network.operators import rows
from optin_deploy.network.run import Program
from optin_deploy.network.tensors import torch_tensor

CUT = re.compile(r"\.cut\d*$")
"""What a cut adds to the name of a weight."""


class NetworkModule(nn.Module):
    """Runs the graph of a network, for networks that no class of torch holds.

    `state_dict` names the weights as the network does; those of a cut one as before the cut. Real weights are copied;
    whole numbers, such as tables of positions, stay in the network.
    """

    def __init__(self, network: Network, *, trained: Set[str] | None = None) -> None:
        """Args: trained: names of weights that are parameters, not buffers; None: all with an axis, but statistics."""
        super().__init__()
        self._held: dict[str, tuple[nn.Module, str]] = {}
        taken, statistics = set(network.weights), _statistics(network)
        for name in sorted(_real(network)):
            plain = CUT.sub("", name)
            key = name if plain in taken else plain
            taken.add(key)
            owner, last = self._owner(key)
            value = torch_tensor(network.weights[name]).clone()
            learns = value.dim() and name not in statistics
            if learns if trained is None else not trained.isdisjoint((name, plain)):
                owner.register_parameter(last, nn.Parameter(value))
            else:
                owner.register_buffer(last, value)
            self._held[name] = (owner, last)
        self._program, self._stored = Program(network, fed=self._held), self._dtype()

    @property
    def network(self) -> Network:
        """The graph, with the weights that it had at first."""
        return self._program.network

    def forward(self, *values: Tensor, **named: Tensor) -> dict[str, Tensor]:
        """Takes the network's inputs, in their order or by name; returns its outputs by name.

        Raises: BadInput: an input is missing or unknown.
        """
        inputs = [port.name for port in self.network.inputs]
        feeds = {**dict(zip(inputs, values, strict=False)), **named}
        if len(values) > len(inputs) or set(feeds) != set(inputs):
            raise BadInput(f"This network takes {', '.join(inputs)}; it was given {', '.join(feeds) or 'nothing'}.")
        return self._ready()({**feeds, **self._values()}).outputs

    def trained(self) -> dict[str, Tensor]:
        """Return the parameters as they are now, by the names of the network's weights."""
        return {name: value.detach() for name, value in self._values().items() if isinstance(value, nn.Parameter)}

    def _values(self) -> dict[str, Tensor]:
        return {name: getattr(owner, last) for name, (owner, last) in self._held.items()}

    def _ready(self) -> Program:
        """The program, made anew where the parameters were moved or became another type."""
        device = next((value.device for value in self._values().values()), torch.device("cpu"))
        dtype = None if self._dtype() == self._stored else self._dtype()
        if (self._program.device, self._program.dtype) != (device, dtype):
            self._program = Program(self.network, device=device, dtype=dtype, fed=self._held)
        return self._program

    def _dtype(self) -> torch.dtype | None:
        return next((value.dtype for value in self._values().values()), None)

    def _owner(self, key: str) -> tuple[nn.Module, str]:
        """The part that a weight belongs to, made where it is missing, and the weight's name in it."""
        *path, last = key.split(".")
        owner: nn.Module = self
        for part in path:
            part = _free(owner, part, nn.Module)
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        return owner, _free(owner, last)


def _free(owner: nn.Module, name: str, kind: type | tuple[()] = ()) -> str:
    """A name that is not yet an attribute, or one of this kind."""
    name = name or "_"
    while hasattr(owner, name) and not isinstance(getattr(owner, name), kind):
        name += "_"
    return name


def _statistics(network: Network) -> set[str]:
    """Names of means and variances that were counted, not learned: torch takes no gradient of them."""
    return {name for node in network.nodes if node.op == "BatchNormalization" for name in node.inputs[3:5]}


def _real(network: Network) -> set[str]:
    """Names of weights that hold real numbers, other than those that operators read as Python numbers."""
    numbers = {
        name
        for node in network.nodes
        for place, name in enumerate(node.inputs)
        if (node.domain, node.op) in rows() and place in rows()[node.domain, node.op].numbers
    }
    return {name for name, stored in network.weights.items() if stored.dtype.is_floating_point()} - numbers
