"""Run a network span by span: what is carried from one place in the order of work to a later one, for each batch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from optin_deploy.network.graph import Network, Node
from optin_deploy.network.run import Cone, Mask, Place, Program


class Spans:
    """Which nodes lead from one place in the order of work to values behind it."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._last = {name: node.index for node in network.nodes for name in node.inputs if name}

    def live(self, at: int) -> tuple[str, ...]:
        """Return what nodes from this one on read of what was there before; what follows from weights is made anew."""
        network = self._network
        made = [port.name for port in network.inputs]
        made += [name for node in network.nodes[:at] for name in node.outputs if name]
        return tuple(name for name in made if self._last.get(name, -1) >= at and name not in network.fixed)

    def cone(self, start: int, wanted: Collection[str], only: Collection[int] | None = None) -> Cone:
        """Return the nodes from `start` on that these values follow from, and what they need from before.

        Args: only: nodes of which those that run are; what others give is needed too. None: all.
        """
        network, only = self._network, None if only is None else set(only)
        needed, inside = set(wanted), []
        made: set[str] = set()
        for node in reversed(network.nodes):
            if needed.isdisjoint(node.outputs):
                continue
            runs = node.index >= start and (only is None or node.index in only)
            if runs or not network.fixed.isdisjoint(node.outputs):
                inside.append(node.index)
                made.update(node.outputs)
                needed.update(name for name in node.inputs if name)
        return Cone(tuple(reversed(inside)), tuple(sorted(needed - made - set(network.weights))))


class Stream:
    """Batches on their way through a program: what is live at one node is kept for each of them."""

    def __init__(
        self,
        program: Program,
        batches: Sequence[Mapping[str, Tensor]],
        *,
        spans: Spans | None = None,
        masks: Mapping[Place, Mask] | None = None,
        budget_bytes: int | None = None,
    ) -> None:
        """Args: budget_bytes: most that may be kept of all batches; where it would be more, they stay where they are
        and later values are computed from there each time.
        """
        self.program, self.masks, self.budget_bytes = program, masks, budget_bytes
        self.spans = spans or Spans(program.network)
        self.weights: dict[str, Tensor] = {}
        """Weights in the place of those that are stored, by name."""
        self.at = 0
        """The node before which all batches stand."""
        inputs = {port.name for port in program.network.inputs}
        self._kept = [{name: value for name, value in batch.items() if name in inputs} for batch in batches]

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._kept)

    def look(self, number: int, wanted: Collection[str], instead: Node | None = None) -> dict[str, Tensor]:
        """Return values of a batch that lie at or behind where it stands.

        Args: instead: a node that runs in the place of the one of its index.
        """
        kept = self._kept[number]
        found = {name: kept[name] for name in wanted if name in kept}
        rest = [name for name in wanted if name not in kept]
        cone = self.spans.cone(self.at, rest)
        feeds = {name: kept[name] for name in cone.needs}
        program = self.program if instead is None else self.program.replaced(instead)
        run = program({**feeds, **self.weights}, masks=self.masks, watch=rest, cone=cone)
        return found | run.watched

    def advance(self, to: int) -> None:
        """Bring all batches before a node."""
        if to <= self.at or not self._kept:
            return
        live = self.spans.live(to)
        first = self.look(0, live)
        if self.budget_bytes is not None and len(self) * _bytes(first) > self.budget_bytes:
            return
        self._kept[0] = first
        for number in range(1, len(self)):
            self._kept[number] = self.look(number, live)
        self.at = to


def _bytes(values: Mapping[str, Tensor]) -> int:
    return sum(value.nbytes for value in values.values())
