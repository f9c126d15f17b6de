"""A cut network in a folder: model.onnx, which names its plan, and plan.json; read back as a torch module."""

from __future__ import annotations

import json
from pathlib import Path

from optin_deploy.errors import BadInput, PlanMismatch
from optin_deploy.files.storage import atomic_folder
from optin_deploy.network.graph import Network
from optin_deploy.network.module import NetworkModule
from optin_deploy.network.read_onnx import read_file
from optin_deploy.network.write import write
from optin_deploy.planning.plan import NetworkPlan, is_plan

MARK = "optin_deploy"
"""Entry of a file's metadata that names the plan; by it a file of ours is known."""
FILE, PLAN = "model.onnx", "plan.json"


def marked(network: Network, plan: NetworkPlan) -> Network:
    """The same network, whose file says by which plan it was cut."""
    found = Network(network.model.clone(), network.source)
    found.model.metadata_props.update(mark(plan.network, plan.hash))
    return found


def mark(network: str | None, plan: str | None = None) -> dict[str, str]:
    """The entry of a file's metadata by which it is known: hash of the dense network, and of the plan of a cut one."""
    return {MARK: json.dumps({"plan": plan, "network": network})}


def parsed_mark(entry: str | None) -> dict[str, str | None] | None:
    """What an entry of MARK says: `plan` and `network`; None: it is none of ours."""
    try:
        found = json.loads(entry or "null")
    except ValueError:
        return None
    return found if isinstance(found, dict) and set(found) == {"plan", "network"} else None


def plan_named(network: Network) -> str | None:
    """Hash of the plan by which a file of ours was cut; None: it does not say."""
    found = parsed_mark(network.model.metadata_props.get(MARK))
    return None if found is None or not isinstance(found["plan"], str) else found["plan"]


def save(network: Network, plan: NetworkPlan, folder: Path) -> Path:
    """Write a cut network to a folder, whole or not at all.

    Raises: BadInput: somebody else's files are there.
    """
    with atomic_folder(folder) as temporary:
        write(marked(network, plan), temporary / FILE)
        plan.write(temporary / PLAN)
    return folder


def is_stored(folder: Path) -> bool:
    """Does a cut network lie here?"""
    return (folder / FILE).is_file() and is_plan(folder / PLAN)


def load(folder: Path) -> NetworkModule:
    """Read what `save` wrote, or the output folder of a job on a network.

    Raises: BadInput: a file is absent or damaged. PlanMismatch: the network was not cut by the plan beside it.
    """
    network, plan = read_file(folder / FILE), NetworkPlan.read(folder / PLAN)
    named = plan_named(network)
    if named is None:
        raise BadInput(f"{folder / FILE} does not say by which plan it was cut: it is none of ours, or was changed.")
    if named != plan.hash:
        raise PlanMismatch(
            f"{folder / FILE} was cut by plan {named[:12]}, but {folder / PLAN} is {plan.hash[:12]}. "
            "Run `optin-export` again."
        )
    return NetworkModule(network).eval()
