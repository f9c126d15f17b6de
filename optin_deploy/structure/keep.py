"""Which units stay, checked against a layout."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from optin_deploy.errors import BadInput
from optin_deploy.structure.groups import Layout


def checked(layout: Layout, keep: Mapping[str, Sequence[int]]) -> Mapping[str, Sequence[int]]:
    """Return the same mapping.

    Raises: BadInput: a group is unknown, or a unit is not there or is named twice.
    """
    for name, units in keep.items():
        group = layout.by_name.get(name)
        if group is None:
            near = difflib.get_close_matches(name, layout.by_name, 3, 0) or ["none: this network has no groups"]
            raise BadInput(
                f"a plan names the group {name!r}, which this network does not have. Near are: {', '.join(near)}."
            )
        bad = [unit for unit in units if not 0 <= unit < group.units]
        if bad:
            raise BadInput(f"a plan keeps unit {bad[0]} of {name}; possible are 0 to {group.units - 1}.")
        if len(set(units)) < len(units):
            raise BadInput(f"a plan keeps a unit of {name} twice; name each once.")
    return keep
