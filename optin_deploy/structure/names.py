"""Names of groups for people: the module that makes their units, by names of weights, scopes of nodes, or tensors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Literal

from optin_deploy.network.graph import Network, Node
from optin_deploy.network.operators import rows
from optin_deploy.structure.groups import UnitGroup, WeightSlice
from optin_deploy.structure.structure import Structure

Path = tuple[str, ...]
"""Modules from the outermost inwards."""
Role = Literal["maker", "carrier", "user"]
"""What weights do with the units of a group: make them, carry them along, or use them."""
SCOPES = "pkg.torch.onnx.name_scopes"
"""Key under which torch's new exporter writes the modules that a node comes from, as a list in Python's syntax."""
SCOPES_CHARACTERS = 10_000
"""A longer list is none of its."""
CUT = re.compile(r"\.cut\d*$")
"""What a cut adds to the names of weights."""
ANONYMOUS = re.compile(r"(val|v|n|node|const\w*|onnx::\w+)?[_\d]*", re.IGNORECASE)
"""Names that a converter made up, such as val_261 and onnx::MatMul_1359."""
OPERATORS = {name for _, name in rows()}
"""Which no module of a scope is called."""


def group_names(structure: Structure, groups: Sequence[UnitGroup]) -> list[str]:
    """Return a name for each group, such as `encoder.layer.3.attention: heads`; all of them differ.

    A name says the innermost module that holds all weights of the units. Where that reaches over several entries of a
    list of layers, or would be the name of two groups, it says what makes the units.
    """
    modules = _Modules(structure)
    choices = [[f"{'.'.join(path)}: {group.kind}" for path in modules.choices(group)] for group in groups]
    names = [found[0] for found in choices]
    for level in range(1, max(map(len, choices), default=1)):
        many = Counter(names)
        names = [
            found[min(level, len(found) - 1)] if many[name] > 1 else name
            for found, name in zip(choices, names, strict=True)
        ]
    many = Counter(names)
    return _numbered([found[0] if many[name] > 1 else name for found, name in zip(choices, names, strict=True)])


def _numbered(names: Sequence[str]) -> list[str]:
    """Count those that share a name."""
    many, seen, taken, found = Counter(names), Counter[str](), set(names), []
    for name in names:
        unique = name
        while many[name] > 1 and (unique == name or unique in taken):
            seen[name] += 1
            unique = f"{name} {seen[name]}"
        taken.add(unique)
        found.append(unique)
    return found


class _Modules:
    """The modules that weights belong to, without those around all of them."""

    def __init__(self, structure: Structure) -> None:
        self._structure = structure
        self._products = {index for index, _ in structure.products}
        self._borrowed = _borrowed(structure)
        paths = {self._whole(use.weight, use.node) for use in structure.uses} - {()}
        shared = _common(paths)[: -1 if len(paths) == 1 else None]
        while shared and any(path[len(shared) :][:1] and path[len(shared)].isdigit() for path in paths):
            shared = shared[:-1]  # a list of layers is no wrapper
        self._outer = len(shared)

    def choices(self, group: UnitGroup) -> Iterator[Path]:
        """Modules by which a group may be called, the best first."""
        parts = self._parts(group)
        makers = [path for path, role in parts if role == "maker"]
        users = [path[:-1] or path for path, role in parts if role == "user"]
        around = _common(path for path, _ in parts)
        if (
            len(set(parts)) > 1
            and makers
            and around
            and not any(part.isdigit() for path, _ in parts for part in path[len(around) :])
        ):
            yield around
        makers = makers or [path for path, role in parts if role == "carrier"] or users
        if not makers:
            yield (self._tensor(group),)
            return
        made_in = _common(makers)
        if any(path[len(made_in) :][:1] and path[len(made_in)].isdigit() for path in makers):
            made_in = made_in[:-1]
        if len(set(makers)) == 1 and len(made_in) > 1 and not made_in[-1].isdigit() and makers is not users:
            yield made_in[:-1]
        if made_in:
            yield made_in
        yield makers[0]

    def _parts(self, group: UnitGroup) -> list[tuple[Path, Role]]:
        """Modules of the weights of a group, and whether they make its units, only carry, or use them."""
        found = []
        for part in group.slices:
            path = self._whole(part.weight, part.node)[self._outer :]
            if path:
                found.append((path, self._role(group, part)))
        return list(dict.fromkeys(found))

    def _role(self, group: UnitGroup, part: WeightSlice) -> Role:
        """What one weight does with the units of a group."""
        readers = list(self._readers(self._network.nodes[part.node]))
        if any(self._makes(group, node) for node in readers):
            return "maker"
        consumers = {site.node for site in group.sites}
        return "user" if any(node.index in consumers for node in readers) else "carrier"

    def _makes(self, group: UnitGroup, node: Node) -> bool:
        """Whether a node is a product whose result holds the units."""
        out = self._structure.axes.get(node.outputs[0], ())
        return node.index in self._products and any(leaf is group.leaf for axis in out for leaf in axis.leaves())

    def _readers(self, node: Node) -> Iterator[Node]:
        """The node itself, or those that read what it makes of weights alone, such as a transposed weight."""
        if node.outputs[0] not in self._network.fixed:
            yield node
            return
        for after, _ in self._network.consumers.get(node.outputs[0], ()):
            yield from self._readers(after)

    def _whole(self, weight: str, node: int) -> Path:
        """Modules around a weight, by its own name or by the scope of a node that reads it; empty: not known."""
        if weight not in self._borrowed:
            weight = CUT.sub("", weight)
            if "/" in weight.strip("/"):
                return _by_scope(weight)
            if "." in weight and "::" not in weight:
                return tuple(weight.split(".")[:-1])
        scopes = self._metadata[node].get(SCOPES, "")[:SCOPES_CHARACTERS]
        around = re.findall(r"'([^']*)'", scopes)[:-1]  # the last one is the node itself
        if around:
            return tuple(around[-1].split("."))
        return _by_scope(self._network.nodes[node].name)

    def _tensor(self, group: UnitGroup) -> str:
        """The name of a weight, a node or a value, where no module is known."""
        makers = [part for part in group.slices if self._role(group, part) == "maker"]
        weights = [CUT.sub("", part.weight) for part in makers if part.weight not in self._borrowed]
        node = self._network.nodes[makers[0].node if makers else group.depth]
        candidates = (*weights, node.name.split("/")[0], node.outputs[0])
        return next((name for name in candidates if name and not ANONYMOUS.fullmatch(name)), node.outputs[0])

    @property
    def _network(self) -> Network:
        return self._structure.network

    @cached_property
    def _metadata(self) -> list[dict[str, str]]:
        return [node.metadata_props for node in self._network.model.graph]


def _borrowed(structure: Structure) -> set[str]:
    """Vectors that several nodes read: one of equal ones that a converter has joined, under the name of any."""
    readers: dict[str, set[int]] = {}
    for use in structure.uses:
        if sum(axis.size > 1 for axis in use.axes) < 2:
            readers.setdefault(use.weight, set()).add(use.node)
    return {weight for weight, nodes in readers.items() if len(nodes) > 1}


def _by_scope(name: str) -> Path:
    """Read `/encoder/layer.3/attention/MatMul` as modules; an entry of a list bears the name of the list too."""
    parts = [part for part in name.split("/") if part][:-1]
    while parts and (parts[-1] in OPERATORS or parts[-1].startswith("node_")):
        parts.pop()  # what a fusion adds to the name of a node
    kept = [part for part, after in zip(parts, [*parts[1:], ""], strict=False) if not after.startswith(f"{part}.")]
    return tuple(".".join(kept).split(".")) if kept else ()


def _common(paths: Iterable[Path]) -> Path:
    """What all paths begin with."""
    first, *others = tuple(paths) or ((),)
    length = len(first)
    for path in others:
        length = next((n for n, (a, b) in enumerate(zip(first, path, strict=False)) if a != b), min(length, len(path)))
        first = first[:length]
    return first
