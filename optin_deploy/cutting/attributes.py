"""Attributes of modules that hold sizes: found by value, tied to an axis; a run tells which of them matter."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, islice, product
from typing import Any

from torch import nn

from optin_deploy.network import axes
from optin_deploy.network.axes import Axis, touched
from optin_deploy.structure.groups import Layout, UnitGroup

TRIES = 64
"""Choices of doubtful attributes that are tried for one class, each with a run."""

Sizes = dict[tuple[str, str], Any]
"""New values by path of a module and name of its attribute; `config.width` is one of an object that it refers to."""


@dataclass(eq=False)
class Candidate:
    """An attribute of all modules of a class, taken for the size of one axis of each."""

    attribute: str
    values: Sizes = field(default_factory=dict)
    doubtful: bool = False
    """Something that is not cut has this size as well, or it is an entry of an object that says much else."""


def followers(root: nn.Module, cut: Mapping[str, Sequence[int]]) -> Sizes:
    """Values of attributes that tell the size of a parameter in every module of a class, such as `out_features`.

    Args: cut: new shapes of parameters and buffers by name; what does not change is told as well.
    """
    shapes: dict[tuple[type, str, int], set[str]] = {}
    for _, module in root.named_modules():
        for name, tensor in _own(module):
            for position, size in enumerate(tensor.shape):
                same = {attribute for attribute, value in numbers(module) if value == size and "." not in attribute}
                key = (type(module), name, position)
                shapes[key] = shapes[key] & same if key in shapes else same
    found: dict[tuple[str, str], set[int]] = {}
    for weight, sizes in cut.items():
        path, _, name = weight.rpartition(".")
        kind = type(root.get_submodule(path))
        for position, size in enumerate(sizes):
            for attribute in shapes.get((kind, name, position), ()):
                found.setdefault((path, attribute), set()).add(size)
    return {place: sizes.pop() for place, sizes in found.items() if len(sizes) == 1}


def scope(group: UnitGroup, tensors: Collection[str]) -> list[str]:
    """Paths of the modules that hold a group's weights, and of those around them up to the one that holds all."""
    owners = [s.weight.split(".")[:-1] for s in group.slices if s.weight in tensors]
    if not owners:
        return []
    shared = 0
    while all(len(path) > shared and path[shared] == owners[0][shared] for path in owners):
        shared += 1
    paths = {".".join(path[:length]): None for path in owners for length in range(shared, len(path) + 1)}
    return sorted(paths, key=lambda path: path.count(".") + bool(path))


def candidates(
    root: nn.Module,
    layout: Layout,
    groups: Sequence[UnitGroup],
    tensors: Collection[str],
    sizes: Mapping[Axis, int],
    known: Collection[tuple[str, str]],
) -> list[list[Candidate]]:
    """Attributes whose value is a size that the cut of some groups changes, each with the axes that it may mean.

    Args:
        tensors: names of the module's parameters and buffers.
        sizes: kept units by leaf.
        known: attributes whose values are known already.
    """
    kinds = {group.leaf: group.kind for group in layout.groups}
    meanings: dict[str, dict[object, Axis]] = {}
    for group in groups:
        whole = [*(each.axis for each in group.slices), *(each.axis for each in group.numbers)]
        pieces = {_written(axis, {}): axis for each in whole for axis in _pieces(each) if touched(axis, sizes)}
        for path in scope(group, tensors):
            meanings.setdefault(path, {}).update(pieces)
    stays = _whole_sizes(layout, sizes)
    found: dict[tuple[type, str], dict[object, Candidate]] = {}
    for path, pieces in meanings.items():
        module = root.get_submodule(path)
        beside = {size for name, _ in module.named_parameters(path) for size in stays.get(name, ())}
        for attribute, value in numbers(module):
            entries = value if isinstance(value, (tuple, list)) else (value,)
            seen: dict[object, int] = {}
            for axis in pieces.values():
                if axis.size in entries and (path, attribute) not in known:
                    role = _written(axis, kinds)
                    seen[role] = seen.get(role, -1) + 1
                    of_class = found.setdefault((type(module), attribute), {})
                    candidate = of_class.setdefault((role, seen[role]), Candidate(attribute))
                    candidate.values[path, attribute] = _replaced(value, axis.size, axes.size(axis, sizes))
                    candidate.doubtful |= axis.size in beside or "." in attribute
    return [list({repr(each.values): each for each in of_class.values()}.values()) for of_class in found.values()]


def sure(found: Sequence[Sequence[Candidate]]) -> tuple[Candidate, ...]:
    """Return those that can mean one thing only."""
    return tuple(each[0] for each in found if len(each) == 1 and not each[0].doubtful)


def choices(found: Sequence[Sequence[Candidate]]) -> Iterator[tuple[Candidate, ...]]:
    """Choices to try: what leaves no doubt, that with all else, then with more and more of it; then with any."""
    plain = sure(found)
    rest = [each for each in found if each[0] not in plain]
    yield plain
    if rest:
        yield (*plain, *(each[0] for each in rest))
    for base, free in ((plain, rest), *([((), found)] if plain else [])):
        for count in range(1, len(free) + 1):
            for some in combinations(free, count):
                for chosen in product(*some):
                    yield (*base, *chosen)


def search(
    attempt: Callable[[Sequence[Candidate]], str], found: Sequence[Sequence[Candidate]]
) -> tuple[tuple[Candidate, ...], str]:
    """Return the first choice with which an attempt succeeds, without doubtful ones that it can do without.

    Args: attempt: returns why it failed; empty: it did not.
    Returns: the choice, and why the first one failed if all do.
    """
    first = ""
    for chosen in islice(choices(found), TRIES):
        why = attempt(chosen)
        if not why:
            for one in [each for each in chosen if each.doubtful]:
                fewer = tuple(each for each in chosen if each is not one)
                if not attempt(fewer):
                    chosen = fewer
            return chosen, ""
        first = first or why
    return (), first


def write(root: nn.Module, sizes: Sizes) -> Sizes:
    """Set attributes, and return those that were another value.

    An object that a module refers to is copied first, as other modules may share it.
    """
    changed = {}
    for (path, attribute), value in sizes.items():
        entries = vars(root.get_submodule(path))
        holder, _, name = attribute.rpartition(".")
        if holder:
            entries[holder] = copy.copy(entries[holder])
            entries = vars(entries[holder])
        if entries[name] != value:
            entries[name] = changed[path, attribute] = value
    return changed


def _own(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def numbers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Attributes that are whole numbers or rows of them, also one level down in objects such as a config."""
    for name, value in vars(module).items():
        if name.startswith("_") or name == "training":
            continue
        if _is_numbers(value):
            yield name, value
        elif hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)) and not callable(value):
            for inner, number in vars(value).items():
                if not inner.startswith("_") and _is_numbers(number):
                    yield f"{name}.{inner}", number


def _is_numbers(value: object) -> bool:
    entries = value if isinstance(value, (tuple, list)) else (value,)
    return bool(entries) and all(type(entry) is int for entry in entries)


def _replaced(value: Any, dense: int, new: int) -> Any:
    return new if isinstance(value, int) else type(value)(new if entry == dense else entry for entry in value)


def _pieces(axis: Axis) -> Iterator[Axis]:
    """An axis, and whatever neighbouring parts of it make."""
    axis = axis.root
    yield axis
    join = axes.product if axis.kind == "product" else axes.total
    parts = axes.flat(axis.kind, axis.parts)
    for start in range(len(parts)):
        for end in range(start + 2, len(parts) + (start > 0)):
            yield join(parts[start:end])
    for part in parts:
        yield from _pieces(part)


def _written(axis: Axis, names: Mapping[Axis, str]) -> object:
    """What an axis is made of; leaves without a name stand for themselves."""
    axis = axis.root
    if axis.kind == "leaf":
        return names.get(axis, "whole" if names else axis)
    return (axis.kind, *(_written(part, names) for part in axis.parts))


def _whole_sizes(layout: Layout, sizes: Mapping[Axis, int]) -> dict[str, set[int]]:
    """Sizes of the axes of weights that stay as they are."""
    found: dict[str, set[int]] = {}
    for use in layout.structure.uses:
        found.setdefault(use.weight, set()).update(axis.size for axis in use.axes if not touched(axis, sizes))
    return found
