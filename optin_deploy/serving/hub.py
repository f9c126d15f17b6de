"""A finished output folder as a model of the Hugging Face Hub: one commit, with a card made from what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from optin_deploy.errors import BadInput, PlanMismatch
from optin_deploy.files.hub import ID, hub_errors
from optin_deploy.files.names import PRUNED, SUPPORT_FILES, TUNED
from optin_deploy.files.opening import check_inside
from optin_deploy.files.ownership import RECORD, Record
from optin_deploy.jobs.belonging import disagreements
from optin_deploy.reporting.card import card_of
from optin_deploy.reporting.findings import read_report

ONNX = "onnx"
"""Folder of the ONNX files, where sentence-transformers, Optimum and transformers.js look for them."""
CARD = "README.md"


@dataclass(frozen=True)
class Push:
    """What a commit to the Hub holds."""

    repository: str
    card: str
    files: Mapping[str, Path]
    """Files beside the card, by their names there."""
    url: str | None = None
    """Where the commit is; None as long as nothing was sent."""


def prepared_push(folder: Path, repository: str) -> Push:
    """Collect what belongs to a pruned model: its ONNX files, its transformers folder, its plan, and a card.

    The dense model, engines that fit one device, and what was only needed to make the model stay where they are.
    So does what somebody else put into the folder.
    Raises: BadInput: no finished output folder of an export, or no id of a repository. PlanMismatch: its files are of
        two plans.
    """
    if not ID.fullmatch(repository) or "/" not in repository:
        raise BadInput(f"{repository!r} is no id of a repository: give one such as my-org/my-model.")
    report = read_report(folder)
    if report is None and (folder / TUNED).is_file():
        raise BadInput(
            f"{folder} holds a fine-tuned model, which has no report.json to make a card of: the output folder of "
            "`optin-export` can be pushed. Send this one with a card of your own: "
            f"`hf upload {repository} {folder} {ONNX} --include '{PRUNED}*'`."
        )
    if report is None:
        raise BadInput(f"{folder} has no report.json: give the output folder of `optin-export`.")
    for problem in disagreements(folder):
        raise PlanMismatch(problem)
    own = _own_files(folder)
    found = {f"{ONNX}/{path.name}": path for path in own if path.match(f"{Path(PRUNED).stem}*.onnx*")}
    if f"{ONNX}/{PRUNED}" not in found:
        raise BadInput(f"{folder} has no {PRUNED}. Make it with `optin build {folder} --engine onnx`.")
    found = {f"{ONNX}/{PRUNED}": found[f"{ONNX}/{PRUNED}"], **found}
    model = folder / "model"
    inside = _own_files(model) if model.is_dir() else []
    beside = [path for path in own if path.name in (*SUPPORT_FILES, "plan.json")]
    # Those beside model.onnx win: their tokenizer_config.json is one that transformers 4 reads too.
    found |= {path.relative_to(model).as_posix(): path for path in inside} | {path.name: path for path in beside}
    task = report.settings.get("task") or _task(folder)
    return Push(repository, card_of(report, repository, list(found), task=task), found)


def _own_files(folder: Path) -> list[Path]:
    """Files that we wrote into a folder, in the order of their names.

    Raises: BadInput: nothing says which they are, or one is a link that leads out of the folder.
    """
    if not (folder / RECORD).is_file():
        raise BadInput(f"{folder} has no {RECORD}, which says what in it may be sent. Copy its hidden files too.")
    found = [path for name in Record(folder).names() if (path := folder / name).is_file()]
    for path in found:
        check_inside(path, folder)
    return found


def push(made: Push, *, private: bool = False, branch: str | None = None) -> Push:
    """Send everything in one commit; the repository is made where there is none.

    Args: private: nobody else may see it. branch: that the commit goes to; it is made where there is none.
    Raises: BadInput: the Hub cannot be reached, or refuses it; the repository is there and not private.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    operations = [CommitOperationAdd(CARD, made.card.encode())]
    operations += [CommitOperationAdd(name, path) for name, path in made.files.items()]
    api = HfApi()
    with hub_errors(made.repository):
        seen = private and api.repo_exists(made.repository) and not api.model_info(made.repository).private
    if seen:
        raise BadInput(
            f"{made.repository} is there and not private, and --private is for a new one. Make it private on the Hub, "
            "give another name, or leave out --private."
        )
    with hub_errors(made.repository, branch):
        api.create_repo(made.repository, private=private, exist_ok=True)
        if branch is not None:
            api.create_branch(made.repository, branch=branch, exist_ok=True)
        message = f"{made.repository.rsplit('/', 1)[-1]}: cut by optin-deploy"
        done = api.create_commit(made.repository, operations, commit_message=message, revision=branch)
    return Push(made.repository, made.card, made.files, str(done.commit_url))


def _task(folder: Path) -> str | None:
    """The task of the transformers folder, where there is one that is known."""
    from optin_deploy.checkpoint.config import read_config
    from optin_deploy.checkpoint.tasks import task_with

    config = folder / "model" / "config.json"
    if not config.is_file():
        return None
    found = task_with(str((read_config(config).get("architectures") or [""])[0]))
    return None if found is None else found.name
