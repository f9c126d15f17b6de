"""`optin ship`: publish the artifacts of an output folder as versions of served models, and go back to an older one."""

from __future__ import annotations

from pathlib import Path

from optin_deploy.errors import BadInput
from optin_deploy.jobs.workspace import is_job
from optin_deploy.serving import server
from optin_deploy.serving.manifest import Manifest, check_files, with_canary
from optin_deploy.serving.order import ShipOrder
from optin_deploy.serving.publication import Publication, files_of, publication, published, write
from optin_deploy.serving.repository import Repository
from optin_deploy.serving.shipments import shipments


def ship_folder(folder: Path, order: ShipOrder, *, dry_run: bool = False) -> tuple[tuple[Manifest, ...], bool]:
    """Publish what lies in an output folder: all of it, or nothing.

    Args: dry_run: everything is checked, and nothing written.
    Returns: the versions that are served, and whether any of them is new or gets another share of the traffic.
    Raises: BadInput: something that the server would not serve, files that are not ours where ours are to be, or a
        version that exists already and is another one.
    """
    target, repository = server(order.server), Repository(order.out)
    check_place(order.out, folder)
    models = shipments(folder, order, target)
    wanted = publication(repository, target, order, models)
    if dry_run:
        return wanted.manifests, False
    with repository.locked():
        wanted = publication(repository, target, order, models)  # another one may have published meanwhile
        write(repository, wanted)
    return wanted.manifests, bool(wanted.new or wanted.files)


def roll_back(out: Path, name: str, version: int | None = None, *, dry_run: bool = False) -> tuple[Manifest, ...]:
    """Serve an older version to all again: the one before, or the one that is named. Nothing is deleted.

    Returns: the versions that are served now.
    Raises: BadInput: there is none, or its files are not those that were published.
    """
    repository = Repository(out)
    wanted = _older(repository, name, version)
    if not dry_run:
        with repository.locked():
            wanted = _older(repository, name, version)
            write(repository, wanted)
    return wanted.manifests


def check_place(out: Path, folder: Path) -> None:
    """Refuse a repository that would mix with an output folder.

    Raises: BadInput.
    """
    place, job = out.resolve(), folder.resolve()
    if place.is_relative_to(job) or job.is_relative_to(place):
        raise BadInput(
            f"--out {out} and the output folder {folder} lie in each other, and a server takes every folder for a "
            "model. Give a folder of its own for the repository."
        )
    for each in (place, *place.parents):
        if is_job(each):
            raise BadInput(f"--out {out} is in {each}, the output folder of a job. Give a folder of its own.")


def _older(repository: Repository, name: str, version: int | None) -> Publication:
    target, now = server(repository.state(name).server), repository.served(name)[-1]
    older = [
        number
        for number in repository.versions(name)
        if number < now.version and repository.manifest(name, number).role == now.role
    ]
    if version is None and not older:
        raise BadInput(
            f"{name} has no version before {now.version}: nothing older is published. Published are "
            f"{', '.join(map(str, repository.versions(name)))}; name one with --version."
        )
    chosen = repository.manifest(name, older[-1] if version is None else version)
    served = tuple(with_canary(each, None) for each in _with_beside(repository, chosen))
    for manifest in served:
        check_files(repository.folder(name, manifest.version), manifest)
    versions = [(manifest, published(repository, manifest)) for manifest in served]
    return Publication(tuple(versions), (), files_of(repository, target, {name: versions}))


def _with_beside(repository: Repository, manifest: Manifest) -> tuple[Manifest, ...]:
    """A version and the one that is served side by side with it."""
    beside = manifest.made_from.get("beside", "")
    return (*((repository.manifest(manifest.name, int(beside)),) if beside.isdigit() else ()), manifest)
