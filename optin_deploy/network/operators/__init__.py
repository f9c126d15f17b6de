"""Operators by family, one file each; `rows` finds the one of a node."""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from optin_deploy.common.plugins import with_added
from optin_deploy.network.graph import Node
from optin_deploy.network.operators.row import Row

log = logging.getLogger(__name__)


@cache
def rows() -> dict[tuple[str, str], Row]:
    """Return every row by domain and name, those of other packages too; of two the first counts, with a warning."""
    found: dict[tuple[str, str], Row] = {}
    own = {each.name: f"{__name__}.{each.name}:ROWS" for each in iter_modules(__path__) if each.name != "row"}
    for name, place in with_added("operators", own).items():
        module, _, table = place.partition(":")
        for row in getattr(import_module(module), table):
            if found.setdefault((row.domain, row.name), row) is not row:
                log.warning(
                    "%s (%s) adds a row for %s.%s, and there is one already; it is left out. Uninstall the package "
                    "that is not needed.",
                    *(name, place, row.domain or "onnx", row.name),
                )
    return found


def factors_of(node: Node) -> tuple[int, ...]:
    """Places of the two tensors that a node multiplies; none where it is no product, as an Einsum of one tensor."""
    row = rows().get((node.domain, node.op))
    places = () if row is None else row.factors or ()
    return places if all(place < len(node.inputs) for place in places) else ()
