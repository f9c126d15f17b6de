"""Put solutions of regressions into a network that runs: weights by name in the place of those that are stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from optin_deploy.network.graph import Network
from optin_deploy.network.run import Cone, Program
from optin_deploy.network.spans import Stream
from optin_deploy.network.tensors import torch_tensor
from optin_deploy.network.weights import separated
from optin_deploy.structure.solvable import Solvable

MOST_PLACES = 512
"""Rows of a regression for each sample: of pictures with more places so many are drawn, the same in all samples."""


def apart(network: Network, products: Iterable[Solvable]) -> Network:
    """Return a network where the vectors behind these products are read nowhere else; nodes are as they were."""
    shifts = [product.shift for product in products if product.shift is not None]
    return separated(network, [shift.place for shift in shifts if not shift.stored.steps])


class Changes:
    """Weights that differ from those that a network stores."""

    def __init__(self, network: Network, device: torch.device) -> None:
        self.network, self.device = network, device
        self.weights: dict[str, Tensor] = {}
        """By name, in the types of the file."""

    def matrix(self, product: Solvable) -> Tensor:
        """The matrix of a product as it is now, (outputs, inputs), float64."""
        linear = product.linear
        return linear.matrix(self._copy(linear.stored.name)).double().cpu() * linear.factor

    def add(self, product: Solvable, outputs: Tensor, inputs: Tensor, change: Tensor) -> None:
        """Add to some rows and columns of the matrix."""
        linear = product.linear
        tensor = self._copy(linear.stored.name)
        matrix = linear.matrix(tensor)
        part = matrix[outputs[:, None], inputs].double().cpu() + change / linear.factor
        matrix[outputs[:, None], inputs] = part.to(matrix)
        self.weights[linear.stored.name] = tensor.to(self.device)

    def shift(self, product: Solvable, outputs: Tensor, offset: Tensor) -> None:
        """Add to some entries of the vector behind a product, in the units in which it is added."""
        shift = product.shift
        if shift is None:
            return
        node, place = shift.place
        name = shift.stored.name if shift.stored.steps else self.network.nodes[node].inputs[place]
        tensor = self._copy(name)
        flat = tensor.view(-1)
        flat[outputs] = (flat[outputs].double().cpu() + offset / shift.factor).to(flat)
        self.weights[name] = tensor.to(self.device)

    def _copy(self, name: str) -> Tensor:
        now = self.weights.get(name)
        stored = torch_tensor(self.network.weights[name]) if now is None else now
        return stored.clone(memory_format=torch.contiguous_format)


def pulled(
    program: Program,
    cone: Cone,
    values: Mapping[str, Tensor],
    start: str,
    asked: Sequence[tuple[str, Tensor | None]],
) -> list[Tensor]:
    """Return vector-Jacobian products of the affine ways from one value to others, each of the shape of the first.

    Args: values: what the cone needs, and changed weights. asked: ends, with vectors; None: a vector of ones.
    """
    given = values[start].detach().requires_grad_()
    with torch.enable_grad():
        run = program({**values, start: given}, watch={end for end, _ in asked}, cone=cone).watched
    return [
        torch.autograd.grad(run[end], given, torch.ones_like(run[end]) if one is None else one, retain_graph=True)[0]
        for end, one in asked
    ]


def scales(stream: Stream, product: Solvable, end: str, samples: int) -> Tensor:
    """Return by what each output of a product is multiplied on its way to a value, in the first batch.

    Args: samples: of the first batch.
    """
    linear = product.linear
    cone = stream.spans.cone(linear.node.index + 1, {end})
    values = stream.look(0, {linear.gives, *cone.needs})
    back = pulled(stream.program, cone, {**stream.weights, **values}, linear.gives, [(end, None)])[0]
    return linear.rows_out(back, samples)[0, 0].double().cpu()


def reach(stream: Stream, product: Solvable, samples: int) -> Tensor:
    """Return the same for the value where the vector is added."""
    if product.shift is None or not product.way.scale or not product.linear.seen:
        return torch.ones(product.linear.outputs, dtype=torch.float64)
    return scales(stream, product, product.shift.value, samples)


def drawn(places: int) -> Tensor | None:
    """Return which places of each sample are taken; None: all."""
    if places <= MOST_PLACES:
        return None
    return torch.randperm(places, generator=torch.Generator().manual_seed(0))[:MOST_PLACES]
