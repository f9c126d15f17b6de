"""Do the files of an output folder belong together: plan, the networks that were cut by it, artifacts and report?"""

from __future__ import annotations

from pathlib import Path

from optin_deploy.checkpoint.smaller import MANIFEST, WEIGHTS, read_saved
from optin_deploy.checkpoint.smaller import remedy as again
from optin_deploy.errors import BadInput
from optin_deploy.files.names import PRUNED
from optin_deploy.files.storage import sha256_file
from optin_deploy.network.onnx_data import read_onnx
from optin_deploy.planning.plan import NetworkPlan
from optin_deploy.pruning.stored import MARK, parsed_mark
from optin_deploy.reporting.findings import StoredReport, read_report

MODEL, PLAN, REPORT = "model", "plan.json", "report.json"


def disagreements(folder: Path) -> list[str]:
    """What does not belong together, a sentence each with the next step; empty: all does, as far as it is there.

    A file that cannot be read counts: its error is the sentence.
    """
    try:
        plan = NetworkPlan.read(folder / PLAN) if (folder / PLAN).is_file() else None
        found = [] if plan is None else _about_plan(folder, plan)
        return [*found, *_about_report(folder, plan)]
    except BadInput as err:
        return [str(err)]


def _about_plan(folder: Path, plan: NetworkPlan) -> list[str]:
    """The plan of the folder is the one by which model.onnx and model/ were cut, and model/ is as it was saved."""
    remedy = f"Cut by it with `optin rewrite {folder}`, then `optin build {folder}`."
    cut_by: dict[Path, str | None] = {}
    if (folder / PRUNED).is_file():
        entries = {entry.key: entry.value for entry in read_onnx(folder / PRUNED).metadata_props}
        made = parsed_mark(entries.get(MARK))
        if made is not None:  # files of earlier versions say nothing
            cut_by[folder / PRUNED] = made["plan"]
    found = []
    if (folder / MODEL / MANIFEST).is_file():
        saved, by = read_saved(folder / MODEL)
        cut_by[folder / MODEL] = by.hash
        weights = folder / MODEL / WEIGHTS
        if not weights.is_file() or sha256_file(weights) != saved.weights_sha256:
            found.append(f"{weights} is not the file that was saved there. {again(folder / MODEL)}")
    others = [str(path) for path, made_by in cut_by.items() if made_by != plan.hash]
    if others:
        which = f"{' and '.join(others)} {'was' if len(others) == 1 else 'were'} cut by"
        found.append(f"{folder / PLAN} is not the plan that {which}: it is newer, or was edited. {remedy}")
    return found


def _about_report(folder: Path, plan: NetworkPlan | None) -> list[str]:
    """The report is about the plan and the artifacts that are there."""
    report = read_report(folder)
    if report is None:
        return []
    found = [] if plan is None else about_another_plan(folder / REPORT, report, plan)
    for name, sha256 in report.hashes.items():
        artifact = folder / name
        if Path(name).name == name and artifact.is_file() and sha256_file(artifact) != sha256:
            remedy = f"Run `optin export` with --out {folder} again."
            found.append(f"{artifact} is not the file that {REPORT} describes. {remedy}")
    return found


def about_another_plan(path: Path, report: StoredReport, plan: NetworkPlan) -> list[str]:
    """What of a report is not of the plan in its folder, a sentence each."""
    remedy = f"Run `optin-export MODEL --out {path.parent}` again."
    return [
        f"{path} is about {name} {report.hashes.get(name, '-')[:12]}, but {path.parent / PLAN} is "
        f"{'plan' if name == 'plan' else 'of network'} {of_plan[:12]}. {remedy}"
        for name, of_plan in (("plan", plan.hash), ("network", plan.network))
        if of_plan is not None and report.hashes.get(name) != of_plan
    ]
