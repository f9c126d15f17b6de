"""`optin plan FILE.onnx --magnitude`: choose what a network keeps by the norms of its weights, and write the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from optin_deploy.errors import BadInput
from optin_deploy.files.ownership import free_name
from optin_deploy.network.hashing import hash_of
from optin_deploy.planning.budget import Limits
from optin_deploy.planning.costs import costs_of, limits_within
from optin_deploy.planning.magnitude import magnitudes
from optin_deploy.planning.plan import NetworkPlan, Origin, is_plan, plan_of
from optin_deploy.planning.widths import Choice, choose
from optin_deploy.pruning.networks import find_in
from optin_deploy.structure.groups import Layout
from optin_deploy.structure.labels import TOKENS


def plan_network(
    x: Any,
    out: Path,
    limits: Limits,
    choice: Choice,
    *,
    sizes: Mapping[str, int] | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> tuple[NetworkPlan, Layout]:
    """Plan by magnitude, and write the plan unless it is a dry run.

    Args: limits: of multiply-accumulates, parameters and bytes.
    Raises: BadInput, InfeasibleBudget: as `planning.widths.choose`; or `out` is something else.
    """
    if Path(str(x)).exists() and out.exists() and out.samefile(str(x)):
        raise BadInput(f"--out {out} is the network itself. Give another name.")
    free_name(out, is_plan, force=force, dry_run=True)
    if TOKENS in choice.kinds:
        raise BadInput(
            "--units tokens: what merging costs in quality is measured on data, so that it is not planned by "
            "--magnitude. Use `optin-export` with --calibration."
        )
    layout = find_in(x, sizes=sizes).layout
    scores = magnitudes(layout)
    # Each unit is compared with the average one of its own group: those of two kinds do not compare.
    choice = replace(choice, one_measure=False)
    keep = choose(layout, scores, limits_within(costs_of(layout), limits), choice)
    settings = {"limits": given(limits), **asdict(choice)}
    plan = plan_of(layout, keep, settings, Origin("magnitude", hash_of(scores)))
    if not dry_run:
        free_name(out, is_plan, force=force)
        plan.write(out)
    return plan, layout


def given(limits: Limits) -> dict[str, Any]:
    """Return the limits that were set, by name."""
    return {name: value for name, value in asdict(limits).items() if value is not None}
