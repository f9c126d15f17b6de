"""Find sizes that only a run tells, such as batch and length, at values that are still there after a cut."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property

from optin_deploy.network.axes import Axis
from optin_deploy.network.operators import rows
from optin_deploy.network.operators.elementwise import aligned, same
from optin_deploy.network.operators.normalizations import per_channel
from optin_deploy.structure.flow import Structure


class Dimensions:
    """Places where sizes can be read."""

    def __init__(self, structure: Structure, gone: Collection[str]) -> None:
        self._structure = structure
        self._gone = set(gone)
        """Values that are not there after the cut, or that have one entry where they had many."""

    def leave(self, name: str) -> None:
        """Say that a value is not there any more, and what else follows from it alone."""
        self._gone.add(name)
        for node, _ in self._structure.network.consumers.get(name, ()):
            if rows()[node.domain, node.op].flow not in (same, aligned, per_channel) or node.outputs[0] in self._gone:
                continue
            if all(other in self._gone or other in self._structure.network.fixed for other in node.inputs if other):
                self.leave(node.outputs[0])

    def left(self, name: str) -> bool:
        """Whether a value is not there any more, or may have one entry where it had many."""
        return name in self._gone

    def of(self, axis: Axis, before: int) -> list[tuple[str, int]] | None:
        """Return values, each with a position, whose sizes multiply to that of an axis; None: there are none.

        Args: before: the values must be computed by nodes before this one.
        """
        found = self._places.get(axis.root)
        for name, position, index in found or ():
            if index < before and name not in self._gone:
                return [(name, position)]
        if axis.kind == "product":
            parts = [self.of(part, before) for part in axis.parts]
            if all(part is not None for part in parts):
                return [place for part in parts for place in part or ()]
        return None

    @cached_property
    def _places(self) -> dict[Axis, list[tuple[str, int, int]]]:
        found: dict[Axis, list[tuple[str, int, int]]] = {}
        producer = self._structure.network.producer
        for name, axes in self._structure.axes.items():
            if name in self._structure.network.weights:
                continue
            index = producer[name].index if name in producer else -1
            for position, axis in enumerate(axes):
                found.setdefault(axis.root, []).append((name, position, index))
        return found
