"""Put solutions of regressions into a network that runs: weights by name in the place of those that are stored."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from optin_deploy.network.graph import Network
from optin_deploy.network.run import Cone, Program
from optin_deploy.network.spans import Stream
from optin_deploy.network.tensors import torch_tensor
from optin_deploy.network.weights import separated
from optin_deploy.structure.solvable import Solvable

MOST_PLACES, PLACES, TIMES = 512, 64, 256
"""Rows of a regression for each sample: of pictures with more places so many are drawn, the same in all samples, that
all samples together give the last number for each unknown; at most the first number, and not less than the second."""


def apart(network: Network, sets: Iterable[Collection[Solvable]]) -> Network:
    """Return a network where the vectors behind each set of products are read nowhere else; nodes are as they were."""
    shifts = [[product.shift for product in products if product.shift is not None] for products in sets]
    return separated(network, [[shift.place for shift in some if not shift.stored.steps] for some in shifts])


class Changes:
    """Weights that differ from those that a network stores."""

    def __init__(self, network: Network, device: torch.device) -> None:
        self.network, self.device = network, device
        self.weights: dict[str, Tensor] = {}
        """Weights by name, in the types of the file."""

    def matrix(self, product: Solvable) -> Tensor:
        """The matrix of a product as it is now, (outputs, inputs of their group), float64."""
        linear = product.linear
        return linear.matrix(self._copy(linear.stored.name)).double().cpu() * linear.factor

    def add(self, product: Solvable, outputs: Tensor, inputs: Tensor, change: Tensor) -> None:
        """Add to some rows and columns of the matrix.

        Args: outputs: (.., rows). inputs: (columns,). change: (.., rows, columns).
        """
        linear = product.linear
        tensor = self._copy(linear.stored.name)
        matrix = linear.matrix(tensor)
        part = matrix[outputs[..., None], inputs].double().cpu() + change / linear.factor
        matrix[outputs[..., None], inputs] = part.to(matrix)
        self.weights[linear.stored.name] = tensor.to(self.device)

    def offset(self, product: Solvable) -> Tensor:
        """The vector behind a product as it is now, in the units in which it is added, (outputs,), float64; zeros where
        there is none."""
        shift, name = product.shift, self.vector(product)
        if shift is None or name is None:
            return torch.zeros(product.linear.outputs, dtype=torch.float64)
        return self._copy(name).view(-1).double().cpu() * shift.factor

    def shift(self, product: Solvable, outputs: Tensor, offset: Tensor) -> None:
        """Add to some entries of the vector behind a product, in the units in which it is added."""
        shift, name = product.shift, self.vector(product)
        if shift is None or name is None:
            return
        tensor = self._copy(name)
        flat = tensor.view(-1)
        flat[outputs] = (flat[outputs].double().cpu() + offset / shift.factor).to(flat)
        self.weights[name] = tensor.to(self.device)

    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Go back to these weights."""
        self.weights.clear()
        self.weights.update(weights)

    def vector(self, product: Solvable) -> str | None:
        """Name of the stored vector behind a product."""
        shift = product.shift
        if shift is None or shift.stored.steps:
            return None if shift is None else shift.stored.name
        return self.network.nodes[shift.place[0]].inputs[shift.place[1]]

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


def drawn(places: int, unknowns: int, samples: int) -> Tensor | None:
    """Return which places of each sample are taken; None: all.

    Args: unknowns: of the regression, for each output. samples: of all batches.
    """
    most = min(MOST_PLACES, max(PLACES, TIMES * unknowns // samples))
    if places <= most:
        return None
    return torch.randperm(places, generator=torch.Generator().manual_seed(0))[:most]
