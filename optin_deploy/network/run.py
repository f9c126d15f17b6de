"""Run a network by torch: differentiable, with multipliers at node inputs and watched values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from optin_deploy.errors import BadInput
from optin_deploy.network.graph import Network, Node
from optin_deploy.network.operators import rows
from optin_deploy.network.operators.row import Row
from optin_deploy.network.tensors import torch_tensor

Place = tuple[int, int]
"""A node by its index, and one of its inputs."""
Mask = Tensor | Callable[[Tensor], Tensor]
"""A multiplier, broadcast; or what makes one for the value that it multiplies, where its sizes are not known before."""
REAL_TYPES = {1: torch.float32, 10: torch.float16, 11: torch.float64, 16: torch.bfloat16}
"""Types of real numbers, by ONNX's number."""
FLOATS = tuple(REAL_TYPES.values())


UNRUNNABLE = (ArithmeticError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What torch raises at a node that does not fit its inputs, in a damaged graph or for inputs of wrong sizes."""


@dataclass(frozen=True)
class Values:
    """What a run gives."""

    outputs: dict[str, Tensor]
    """Outputs of the graph by name."""
    watched: dict[str, Tensor]


@dataclass(frozen=True)
class Cone:
    """What lies downstream of some nodes, those included."""

    nodes: tuple[int, ...]
    """Indices, in the order of work."""
    needs: tuple[str, ...]
    """Values from upstream that it reads; a run that watches them gives what a partial run starts from."""


class Program:
    """A network made ready to run; it holds the weights and can be called many times."""

    def __init__(
        self,
        network: Network,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        fed: Collection[str] = (),
        own: Mapping[tuple[str, str], Row] | None = None,
    ) -> None:
        """Make a network ready.

        Args:
            dtype: the type of all real numbers; None: as the file stores them.
            fed: names of weights that each call brings among its feeds; they are not held here.
            own: rows of operators of this network alone, by domain and name.

        Raises: BadInput: an operator has no row, or a weight a type that torch does not have.
        """
        self.network = network
        self.device = torch.device(device)
        self.dtype = dtype
        known = {**rows(), **(own or {})}
        self._steps = [(node, _row(node, known), self._adapted(node)) for node in network.nodes]
        numbers = {
            name
            for node, row, _ in self._steps
            for place, name in enumerate(node.inputs)
            if place in row.numbers and name in network.weights
        }
        try:
            self._weights = {
                name: torch_tensor(tensor).to("cpu" if name in numbers else self.device)
                for name, tensor in network.weights.items()
                if name not in fed
            }
        except TypeError as err:
            raise BadInput(f"{network.source}: {err}") from err
        last = {name: node.index for node in network.nodes for name in node.inputs if name}
        self._ends: list[list[str]] = [[] for _ in network.nodes]
        for name, index in last.items():
            if name not in self._weights:
                self._ends[index].append(name)

    def replaced(self, node: Node) -> Program:
        """Return the same with another node in the place of the one of its index."""
        found = copy.copy(self)
        found._steps = [*self._steps]
        found._steps[node.index] = (node, _row(node, rows()), self._adapted(node))
        return found

    def __deepcopy__(self, memo: object) -> Program:
        """Itself, as it never changes: copies of modules that run it share it."""
        return self

    def __call__(
        self,
        feeds: Mapping[str, Tensor],
        *,
        masks: Mapping[Place, Mask] | None = None,
        watch: Collection[str] = (),
        cone: Cone | None = None,
    ) -> Values:
        """Run the graph, or only a cone of it.

        Raises: BadInput: a node has a form that its row does not know, or does not fit the inputs.

        Args: feeds: the graph's inputs by name; for a cone, the values that it needs.
            masks: multipliers of inputs of nodes, broadcast.
            watch: names of values to give back besides the outputs; with a cone, only those that lie in it are found.
        """
        masks = masks or {}
        values: dict[str, Tensor] = dict(self._weights)
        values.update({name: self._typed(value).to(self.device) for name, value in feeds.items()})
        outputs = [port.name for port in self.network.outputs]
        held = {*outputs, *watch}
        steps = self._steps if cone is None else [self._steps[index] for index in cone.nodes]
        for node, row, adapted in steps:
            inputs = [self._typed(values[name]) if name else None for name in node.inputs]
            for place in range(len(inputs)) if masks else ():
                mask = masks.get((node.index, place))
                if mask is not None:
                    inputs[place] = masked(row, inputs, place, mask)
            try:
                result = row.compute(adapted, *together(inputs, row.numbers))
            except UNRUNNABLE as err:
                raise BadInput(f"{node} cannot be run: {err}") from err
            found = result if isinstance(result, tuple) else (result,)
            for name, value in zip(node.outputs, found, strict=False):
                if name and value is not None:
                    values[name] = self._typed(value)
            for name in self._ends[node.index]:
                if name not in held:
                    values.pop(name, None)
        return Values(
            {name: values[name] for name in outputs if name in values},
            {name: values[name] for name in watch if name in values},
        )

    def cone(self, nodes: Collection[int]) -> Cone:
        """Return what must be computed again when inputs of these nodes change."""
        inside: list[int] = []
        made: set[str] = set()
        needs: dict[str, None] = {}
        for node in self.network.nodes:
            if node.index in nodes or made.intersection(node.inputs):
                inside.append(node.index)
                made.update(name for name in node.outputs if name)
                needs.update(
                    {name: None for name in node.inputs if name and name not in made and name not in self._weights}
                )
        return Cone(tuple(inside), tuple(needs))

    def _typed(self, value: Tensor) -> Tensor:
        """Weights take their type where they are used, so that a model is not held twice."""
        return value.to(self.dtype) if self.dtype is not None and value.dtype in FLOATS else value

    def _adapted(self, node: Node) -> Node:
        """Let a Cast between real numbers be none where all of them have one type."""
        kind = node.get("to")
        if self.dtype is None or node.op != "Cast" or not isinstance(kind, int) or kind not in REAL_TYPES:
            return node
        to = next(number for number, dtype in REAL_TYPES.items() if dtype == self.dtype)
        return Node(**{**vars(node), "attributes": {**node.attributes, "to": to}})


def masked(row: Row, inputs: list[Tensor | None], place: int, mask: Mask) -> Tensor:
    """Multiply an input by a mask; where 0 is written as another number, that is what remains of masked units."""
    value = inputs[place]
    zero = inputs[row.zeros[place]] if row.zeros.get(place, len(inputs)) < len(inputs) else None
    assert value is not None
    mask = mask if isinstance(mask, Tensor) else mask(value)
    if zero is None:
        return value * (mask.to(value.dtype) if value.is_floating_point() else mask)
    dtype = value.dtype if value.is_floating_point() else mask.dtype
    zero = zero.to(dtype)
    return (value.to(dtype) - zero) * mask + zero


def together(inputs: list[Tensor | None], numbers: tuple[int, ...]) -> list[Tensor | None]:
    """Bring the inputs of a node to one device; numbers such as shapes stay on the CPU."""
    devices = {value.device for place, value in enumerate(inputs) if value is not None and place not in numbers}
    if len(devices) < 2:
        return inputs
    target = next(device for device in devices if device.type != "cpu")
    return [
        value if value is None or place in numbers or value.device == target else value.to(target)
        for place, value in enumerate(inputs)
    ]


def _row(node: Node, known: Mapping[tuple[str, str], Row]) -> Row:
    row = known.get((node.domain, node.op))
    if row is None:
        raise BadInput(
            f"{node}: the operator {node.domain or 'onnx'}.{node.op} is not known here, so the network cannot be run. "
            "A new operator is a row in optin_deploy/network/operators."
        )
    return row
