"""Rows that other installed packages add to the tables of engines, servers and operators, by entry points."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any

log = logging.getLogger(__name__)


@cache
def _declared() -> Any:  # of another type before Python 3.12
    """All entry points of this environment: looking for them reads a file of every installed package."""
    return entry_points()


def with_added(table: str, own: Mapping[str, str]) -> dict[str, str]:
    """Return a table with the rows that installed packages declare under `optin_deploy.<table>`.

    Args: own: name -> module:object. Its names stay what they are: a package that declares one is told of in a warning.
    """
    found = dict(own)
    for each in _declared().select(group=f"optin_deploy.{table}"):
        if each.name in found:
            package = each.dist.name if each.dist else "a package"
            log.warning("%s declares %r in optin_deploy.%s, which is taken; it is left out.", package, each.name, table)
        else:
            found[each.name] = each.value
    return found
