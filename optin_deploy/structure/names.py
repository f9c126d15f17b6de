"""Names of groups for people, from the names of their weights."""

from __future__ import annotations

import re
from collections.abc import Sequence

from optin_deploy.network.graph import Network
from optin_deploy.structure.groups import WeightSlice


def group_name(network: Network, slices: Sequence[WeightSlice], nodes: Sequence[int]) -> str:
    """Return the innermost module that holds all the weights, or the node that consumes the units."""
    paths = [name.split(".") for name in dict.fromkeys(s.weight for s in slices) if "." in name]
    if paths:
        shared = list(paths[0])
        for path in paths[1:]:
            length = next(
                (n for n, (a, b) in enumerate(zip(shared, path, strict=False)) if a != b), min(len(shared), len(path))
            )
            shared = shared[:length]
        if shared and len(paths) == 1:
            shared = shared[:-1]
        if shared:
            return ".".join(shared)
    node = network.nodes[nodes[0]]
    return re.sub(r"^/+|/[^/]*$", "", node.name).replace("/", ".") or node.outputs[0]
