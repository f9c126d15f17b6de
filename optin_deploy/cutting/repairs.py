"""Which products of a masked network can make up for what was cut, in the order of work."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optin_deploy.network.axes import kept, touched
from optin_deploy.network.operators.row import Unsupported
from optin_deploy.network.run import Place
from optin_deploy.regression import MOST_INPUTS
from optin_deploy.structure.branches import projection_of
from optin_deploy.structure.flow import Structure
from optin_deploy.structure.groups import Layout
from optin_deploy.structure.linear import Linear
from optin_deploy.structure.solvable import Solvable, solvable


@dataclass(frozen=True)
class OutputRepair:
    """Solve for a product's weight, so that what arrives behind it is what arrives in the dense network."""

    product: Solvable
    end: str
    """The value that is compared, an affine function of what the product gives."""
    residual: str | None
    """What is added to it."""
    inputs: Tensor
    """Columns of the matrix that stay."""
    outputs: Tensor
    """Rows of the matrix that stay."""

    @property
    def at(self) -> int:
        """The product's node."""
        return self.product.linear.node.index


@dataclass(frozen=True)
class InputRepair:
    """Fold into all products that read one value the linear map which brings it nearest to the dense one."""

    value: str
    products: tuple[Solvable, ...]
    at: int
    """The first of them."""

    @property
    def centred(self) -> bool:
        """Whether an offset can be taken in: all have a vector that is added, and none puts zeros around the value."""
        return all(each.shift is not None and not each.linear.fringed for each in self.products)


Repair = OutputRepair | InputRepair


@dataclass(frozen=True)
class Skipped:
    """A product that stays as it is, though what it reads is cut or has changed."""

    node: str
    why: str


def repairs(
    layout: Layout, keep: Mapping[str, Sequence[int]], masks: Mapping[Place, Tensor], changed: Collection[int]
) -> tuple[list[Repair], list[Skipped]]:
    """Return what can be done for a plan, in the order of work, and what cannot.

    Args: masks: of the plan, see `cutting.masks`. changed: nodes that can give something else because of them.
    """
    structure, leaves = layout.structure, layout.leaves(keep)
    sites = {site.node for group in layout.groups for site in group.sites if site.with_weight}
    found: list[Repair] = []
    skipped: list[Skipped] = []
    readers: dict[tuple[str, int], list[Solvable]] = {}
    for index in sorted({index for index, _ in structure.products}.intersection(changed)):
        node = structure.network.nodes[index]
        projection = projection_of(structure, node)
        if projection is None:
            continue
        mask = masks.get((index, 1 - projection.weight))
        try:
            product = _solvable(structure, index, mask)
        except Unsupported as err:
            skipped.append(Skipped(str(node), str(err)))
            continue
        linear = product.linear
        if linear.seen and (mask is not None or (index in sites and product.way.add is not None)):
            out = structure.axes[linear.gives][linear.outputs_axis]
            rows = torch.from_numpy(kept(out, leaves)) if touched(out, leaves) else torch.arange(linear.outputs)
            found.append(OutputRepair(product, *_end(product), _columns(linear, mask), rows))
        else:
            readers.setdefault((linear.reads, linear.features), []).append(product)
    for (value, _), products in readers.items():
        maker = structure.network.producer.get(value)
        if maker is not None and maker.index in changed:
            found.append(InputRepair(value, tuple(products), products[0].linear.node.index))
    return sorted(found, key=lambda repair: repair.at), skipped


def _solvable(structure: Structure, index: int, mask: Tensor | None) -> Solvable:
    """Raises: Unsupported: a product stays as it is; says why."""
    product = solvable(structure, index)
    linear = product.linear
    if linear.inputs > MOST_INPUTS:
        raise Unsupported(f"it has {linear.inputs} inputs; at most {MOST_INPUTS} are solved for")
    if mask is not None and (not linear.seen or mask.numel() != linear.channels):
        raise Unsupported("what is cut there is not only a part of its inputs")
    return product


def _end(product: Solvable) -> tuple[str, str | None]:
    """What is compared: what arrives at a residual Add, or the product with its vector."""
    if product.way.add is not None:
        return product.way.value, product.way.residual
    return product.linear.gives if product.shift is None else product.shift.value, None


def _columns(linear: Linear, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.arange(linear.inputs)
    channels = mask.flatten().nonzero()  # (kept, 1)
    return (channels * linear.taps + torch.arange(linear.taps)).flatten()
