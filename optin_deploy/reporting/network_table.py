"""What `optin inspect` tells of a network: as rows of tables, and as JSON."""

from __future__ import annotations

from collections import Counter
from typing import Any

from optin_deploy.common.formatting import si
from optin_deploy.network.axes import size
from optin_deploy.structure.groups import Layout
from optin_deploy.structure.macs import batch_axes, macs, weight_entries
from optin_deploy.structure.shares import shares

HEADER = ("group: kind", "units", "width", "MACs", "weights")
FROZEN_HEADER = ("why", "axes", "entries", "on weights such as")
PROBLEM_HEADER = ("operator", "why", "nodes")
SHARES_NOTE = "MACs, weights: what would go with all units of a group; what two groups lie on counts for both."


def group_rows(layout: Layout) -> list[tuple[str, ...]]:
    """Rows of HEADER, in the order of work."""
    found = shares(layout)
    return [
        (
            group.name,
            f"{group.units:,}",
            f"{group.width:,}",
            f"{found[group.name].macs:.1%}",
            f"{found[group.name].weights:.1%}",
        )
        for group in layout.groups
    ]


def frozen_rows(layout: Layout) -> list[tuple[str, ...]]:
    """Rows of FROZEN_HEADER: one for each reason of axes that stay whole, the most frequent first."""
    many = Counter(each.why for each in layout.frozen if each.weights)
    rows: list[tuple[str, ...]] = []
    for why, count in many.most_common():
        these = [each for each in layout.frozen if each.why == why]
        sizes = sorted({each.units for each in these})
        entries = f"{sizes[0]:,}" + (f" to {sizes[-1]:,}" if len(sizes) > 1 else "")
        rows.append((why, f"{count:,}", entries, these[0].weights[0]))
    return rows


def problem_rows(layout: Layout) -> list[tuple[str, ...]]:
    """Rows of PROBLEM_HEADER: nodes that are not understood, without those that only lie behind them."""
    return [(op, why, f"{count:,}") for (op, why), count in layout.structure.not_understood.most_common()]


def summary(layout: Layout) -> tuple[str, str]:
    """Two lines: what the whole network is and costs, and at which sizes of one sample that is counted."""
    structure = layout.structure
    one = dict.fromkeys(batch_axes(structure), 1)
    sizes = ", ".join(
        f"{port.name} {'x'.join(str(size(axis, one)) for axis in structure.axes[port.name])}"
        for port in structure.network.inputs
    )
    return (
        f"{structure.network.source}: {len(structure.network.nodes):,} nodes, {len(layout.groups):,} groups, "
        f"{si(weight_entries(structure))} weights, {si(macs(structure, one))} MACs a sample",
        f"MACs are counted for {sizes}.",
    )


def to_json(layout: Layout) -> dict[str, Any]:
    """Groups and what is frozen, ready for JSON; operators that are not understood are among the latter."""
    found = shares(layout)
    groups = [
        {
            "name": group.name,
            "kind": group.kind,
            "units": group.units,
            "width": group.width,
            "macs": found[group.name].macs,
            "weights": found[group.name].weights,
            "sites": len(group.sites),
            "depth": group.depth,
        }
        for group in layout.groups
    ]
    frozen = [{"why": each.why, "units": each.units, "weights": list(each.weights)} for each in layout.frozen]
    return {"groups": groups, "frozen": frozen}
