"""Do the files of an output folder belong together: plan, the model that was cut by it, artifacts and report?"""

from __future__ import annotations

from pathlib import Path

from optin_deploy.errors import BadInput
from optin_deploy.findings import StoredReport, read_report
from optin_deploy.plan import PruningPlan
from optin_deploy.pruned import MANIFEST, Saved, read_saved
from optin_deploy.storage import sha256_file

MODEL, PLAN, REPORT = "model", "plan.json", "report.json"


def disagreements(folder: Path) -> list[str]:
    """What does not belong together, a sentence each with the next step; empty: all does, as far as it is there.

    A file that cannot be read counts: its error is the sentence.
    """
    try:
        found = _about_model(folder)
        return [*found, *_about_report(folder)]
    except BadInput as err:
        return [str(err)]


def _about_model(folder: Path) -> list[str]:
    """The plan of the folder is the one by which model/ was cut."""
    if not (folder / MODEL / MANIFEST).is_file():
        return []
    _, layout, cut_by = read_saved(folder / MODEL)
    remedy = f"Cut by it with `optin rewrite {folder}`, then `optin build {folder}`."
    if not (folder / PLAN).is_file() or PruningPlan.read(folder / PLAN, remedy, layout).hash == cut_by.hash:
        return []
    return [f"{folder / PLAN} is not the plan that {folder / MODEL} was cut by: it is newer, or was edited. {remedy}"]


def _about_report(folder: Path) -> list[str]:
    """The report is about the model and the artifacts that are there."""
    report, has_model = read_report(folder), (folder / MODEL / MANIFEST).is_file()
    if report is None:
        return []
    path, remedy = folder / REPORT, f"Run `optin export` with --out {folder} again."
    found: list[str] = []
    if has_model:
        saved, _, plan = read_saved(folder / MODEL)
        found += about_another_model(path, report, saved, plan)
    elif (folder / PLAN).is_file() and PruningPlan.read(folder / PLAN, remedy).hash != report.hashes.get("plan"):
        found.append(f"{path} is not about {folder / PLAN}. {remedy}")
    for name, sha256 in report.hashes.items():
        artifact = folder / name
        if Path(name).name == name and artifact.is_file() and sha256_file(artifact) != sha256:
            found.append(f"{artifact} is not the file that {REPORT} describes. {remedy}")
    return found


def about_another_model(path: Path, report: StoredReport, saved: Saved, plan: PruningPlan) -> list[str]:
    """What of a report is not of the model in its folder, a sentence each."""
    remedy = f"Run `optin-export MODEL --out {path.parent}` again."
    known = (("plan", plan.hash), ("dense_weights", saved.report.get("dense_weights")))
    return [
        f"{path} is about {name.replace('_', ' ')} {report.hashes.get(name, '-')[:12]}, but {path.parent / MODEL} was "
        f"cut {'by' if name == 'plan' else 'from'} {of_model[:12]}. {remedy}"
        for name, of_model in known
        if of_model is not None and report.hashes.get(name) != of_model
    ]
