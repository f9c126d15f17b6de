"""Which products of a masked network can make up for what was cut, in the order of work."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from optin_deploy.common.regression import MOST_INPUTS
from optin_deploy.network.axes import Axis, kept, touched
from optin_deploy.network.operators.row import Unsupported
from optin_deploy.network.run import Place
from optin_deploy.structure.branches import weight_place
from optin_deploy.structure.groups import Layout
from optin_deploy.structure.linear import Linear
from optin_deploy.structure.solvable import Solvable, solvable
from optin_deploy.structure.structure import Structure


@dataclass(frozen=True)
class Arrival:
    """A product, and where what it gives is compared."""

    product: Solvable
    end: str
    """The value that is compared, an affine function of what the product gives."""
    residual: str | None
    """What is added to it."""


@dataclass(frozen=True)
class SharedInput:
    """A value, and the products that read it."""

    value: str
    products: tuple[Solvable, ...]


@dataclass(frozen=True)
class _Repair:
    inputs: Tensor
    """Columns of the matrix that is solved for, of each group."""
    outputs: Tensor
    """Rows of it, (groups, rows)."""

    @property
    @abstractmethod
    def products(self) -> tuple[Solvable, ...]:
        """All products that change, in the order of work."""

    @property
    def at(self) -> int:
        """The first product's node."""
        return self.products[0].linear.node.index


@dataclass(frozen=True)
class OutputRepair(_Repair):
    """Solve for what stays of a weight, so that there arrives behind its product what does in the dense network."""

    places: tuple[Arrival, ...]
    """All products that read the matrix, in the order of work; mostly one."""
    side = "output"

    @property
    def products(self) -> tuple[Solvable, ...]:
        """All products that change, in the order of work."""
        return tuple(place.product for place in self.places)

    @property
    def centred(self) -> bool:
        """Whether an offset can be taken in: all have a vector that is added."""
        return all(each.shift is not None for each in self.products)


@dataclass(frozen=True)
class InputRepair(_Repair):
    """Fold into all products that read a value the linear map of what stays that brings it nearest to the dense one."""

    places: tuple[SharedInput, ...]
    """Values in the order of work; mostly one. Where there are several the same matrices read each."""
    side = "input"

    @property
    def products(self) -> tuple[Solvable, ...]:
        """All products that change, in the order of work."""
        return tuple(product for place in self.places for product in place.products)

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
    nodes = structure.network.nodes
    sites = {site.node for group in layout.groups for site in group.sites if site.with_weight}
    found: list[Repair] = []
    skipped: list[Skipped] = []
    done: set[int] = set()
    ways: set[int] = set()
    readers: list[Solvable] = []
    products = sorted({index for index, _ in structure.products}.intersection(changed))
    norms = [node.index for node in nodes if node.op == "BatchNormalization" and node.index in changed]
    for index in [*products, *norms]:
        if index in done or index in ways or (index in products and weight_place(structure, nodes[index]) is None):
            continue
        try:
            alike = _alike(structure, index, masks)
            cut = any(_mask(each, masks) is not None for each in alike)
            own = all(each.linear.seen for each in alike) and (
                cut
                or alike[0].linear.groups > 1
                or any(each.linear.node.index in sites and each.way.add is not None for each in alike)
            )
            if own:
                found.append(_output(structure, alike, leaves, masks))
            else:
                readers += alike
        except Unsupported as err:
            skipped.append(Skipped(str(nodes[index]), str(err)))
            continue
        done.update(each.linear.node.index for each in alike)
        ways.update(passed for each in alike for passed in each.way.nodes)
    inputs, others = _inputs(structure, readers, masks, changed)
    return sorted([*found, *inputs], key=lambda repair: repair.at), [*skipped, *others]


def _alike(structure: Structure, index: int, masks: Mapping[Place, Tensor]) -> list[Solvable]:
    """All products with the matrix of a node, in the order of work.

    Raises: Unsupported: they stay as they are; says why.
    """
    first = solvable(structure, index, shared=True).linear
    places = sorted(first.stored.places)
    if len(ops := {structure.network.nodes[node].op for node, _ in places}) > 1:
        raise Unsupported(f"several nodes read its weight: {', '.join(sorted(ops))}")
    alike = [solvable(structure, node, shared=True) for node, _ in places] if len(places) > 1 else []
    if any(
        place != each.linear.place
        or (each.linear.outputs, each.linear.groups, each.linear.kernel, each.linear.seen, each.linear.factor)
        != (first.outputs, first.groups, first.kernel, first.seen, first.factor)
        for (_, place), each in zip(places, alike, strict=False)
    ):
        raise Unsupported("several nodes read its weight, each in its way")
    for each in alike or (alike := [solvable(structure, index)]):
        linear, mask = each.linear, _mask(each, masks)
        if linear.inputs > MOST_INPUTS:
            raise Unsupported(f"it has {linear.inputs} inputs; at most {MOST_INPUTS} are solved for")
        if mask is not None and mask.numel() != linear.channels * linear.groups:
            raise Unsupported("what is cut there is not only a part of its inputs")
    return alike


def _mask(product: Solvable, masks: Mapping[Place, Tensor]) -> Tensor | None:
    return masks.get((product.linear.node.index, 1 - product.linear.place))


def _output(
    structure: Structure, alike: Sequence[Solvable], leaves: Mapping[Axis, np.ndarray], masks: Mapping[Place, Tensor]
) -> OutputRepair:
    """Raises: Unsupported: the products with one matrix keep different parts of it."""
    parts = [(_columns(each, masks), _rows(structure, each.linear, leaves)) for each in alike]
    if not all(torch.equal(*pair) for part in parts[1:] for pair in zip(part, parts[0], strict=True)):
        raise Unsupported("several nodes read its weight, and each keeps another part of it")
    return OutputRepair(*parts[0], tuple(Arrival(each, *_end(each)) for each in alike))


def _end(product: Solvable) -> tuple[str, str | None]:
    """What is compared: what arrives at a residual Add, or the product with its vector."""
    if product.way.add is not None:
        return product.way.value, product.way.residual
    return product.linear.gives if product.shift is None else product.shift.value, None


def _columns(product: Solvable, masks: Mapping[Place, Tensor]) -> Tensor:
    taps = product.linear.taps
    return (_channels(product, masks)[:, None] * taps + torch.arange(taps)).flatten()


def _channels(product: Solvable, masks: Mapping[Place, Tensor]) -> Tensor:
    """Channels of each group that stay."""
    linear, mask = product.linear, _mask(product, masks)
    if mask is None:
        return torch.arange(linear.channels)
    return mask.reshape(linear.groups, linear.channels).any(0).nonzero().flatten()  # groups lose alike, or as a whole


def _rows(structure: Structure, linear: Linear, leaves: Mapping[Axis, np.ndarray]) -> Tensor:
    """Raises: Unsupported: none stays."""
    out = structure.axes[linear.gives][linear.outputs_axis]
    rows = torch.from_numpy(kept(out, leaves)) if touched(out, leaves) else torch.arange(linear.outputs)
    if not len(rows):
        raise Unsupported("nothing that it gives stays")
    return rows.reshape(len({row * linear.groups // linear.outputs for row in rows.tolist()}), -1)


def _inputs(
    structure: Structure, readers: Iterable[Solvable], masks: Mapping[Place, Tensor], changed: Collection[int]
) -> tuple[list[InputRepair], list[Skipped]]:
    """Products by the values that they read; values that the same matrices read belong together."""
    by_value: dict[tuple[str, int], list[Solvable]] = {}
    for each in readers:
        by_value.setdefault((each.linear.reads, each.linear.features), []).append(each)
    together: dict[tuple[str, ...], list[SharedInput]] = {}
    for (value, _), products in by_value.items():
        products.sort(key=lambda each: each.linear.node.index)
        together.setdefault(tuple(each.linear.stored.name for each in products), []).append(
            SharedInput(value, tuple(products))
        )
    times = Counter(name for names in together for name in names)
    found, skipped = [], []
    for names, places in together.items():
        places.sort(key=lambda place: place.products[0].linear.node.index)
        makers = [structure.network.producer.get(place.value) for place in places]
        stay, *others = [_channels(product, masks) for place in places for product in place.products]
        every = torch.arange(places[0].products[0].linear.channels)
        repair = InputRepair(stay, every[None], tuple(places))
        if not all(torch.equal(stay, other) for other in others):
            why = "several nodes read its input, and each keeps another part of it"
            skipped += [Skipped(str(each.linear.node), why) for each in repair.products]
        elif any(times[name] > 1 for name in names):
            why = "several nodes read its weight, each beside others"
            skipped += [Skipped(str(each.linear.node), why) for each in repair.products]
        elif len(stay) < len(every) or any(maker is not None and maker.index in changed for maker in makers):
            found.append(repair)
    return found, skipped
