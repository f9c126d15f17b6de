"""Names of groups gathered by the entry of a list of layers that they belong to, or by their module."""

from __future__ import annotations

from collections.abc import Iterable


def by_block(names: Iterable[str]) -> dict[str, list[tuple[str, str]]]:
    """Gather names such as `encoder.layer.3.attention: heads`, in their order.

    Returns: by block (`encoder.layer.3`) what is left of the path within it (`attention`), and the whole name.
    """
    paths = {name: tuple(name.partition(": ")[0].split(".")) for name in names}
    entries = {_entry(path) for path in paths.values()}
    found: dict[str, list[tuple[str, str]]] = {}
    for name, path in paths.items():
        block = path if path in entries else _entry(path) or path
        found.setdefault(".".join(block), []).append((".".join(path[len(block) :]), name))
    return found


def _entry(path: tuple[str, ...]) -> tuple[str, ...]:
    """The innermost entry of a list in which something has a name; empty: none."""
    ends = [n + 1 for n, part in enumerate(path[:-1]) if part.isdigit() and not path[n + 1].isdigit()]
    return path[: ends[-1]] if ends else ()
