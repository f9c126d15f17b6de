"""What weights do with the units of a group: make them, carry them along, or use them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from optin_deploy.network.graph import Node
from optin_deploy.structure.groups import UnitGroup, WeightSlice
from optin_deploy.structure.structure import Structure

Role = Literal["maker", "carrier", "user"]


class Roles:
    """Roles of weights in one structure."""

    def __init__(self, structure: Structure) -> None:
        self._structure = structure
        self._products = {index for index, _ in structure.products}

    def of(self, group: UnitGroup, part: WeightSlice) -> Role:
        """Return what one weight does with the units of a group."""
        readers = list(self._readers(self._structure.network.nodes[part.node]))
        if any(self._makes(group, node) for node in readers):
            return "maker"
        consumers = {site.node for site in group.sites}
        return "user" if any(node.index in consumers for node in readers) else "carrier"

    def makers(self, group: UnitGroup) -> list[Node]:
        """Return the products with weights whose results hold the units, in the order of work."""
        nodes = self._structure.network.nodes
        readers = {node.index for part in group.slices for node in self._readers(nodes[part.node])}
        return [nodes[index] for index in sorted(readers) if self._makes(group, nodes[index])]

    def _makes(self, group: UnitGroup, node: Node) -> bool:
        """Whether a node is a product whose result holds the units."""
        out = self._structure.axes.get(node.outputs[0], ())
        return node.index in self._products and any(leaf is group.leaf for axis in out for leaf in axis.leaves())

    def _readers(self, node: Node) -> Iterator[Node]:
        """The node itself, or those that read what it makes of weights alone, such as a transposed weight."""
        if node.outputs[0] not in self._structure.network.fixed:
            yield node
            return
        for after, _ in self._structure.network.consumers.get(node.outputs[0], ()):
            yield from self._readers(after)
