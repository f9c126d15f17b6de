"""`optin ship`: publish the artifacts of an output folder as versions of served models, and go back to an older one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load

from exporters.serving import server
from exporters.serving.base import Rows, Server
from exporters.serving.shipments import SAMPLES, Order, shipments
from optin_deploy.errors import BadInput
from optin_deploy.serving.manifest import Manifest, check_files
from optin_deploy.serving.repository import Contents, Repository, Version, write_files, write_state
from optin_deploy.storage import read_tensors


def ship_folder(folder: Path, order: Order, *, dry_run: bool = False) -> tuple[tuple[Manifest, ...], bool]:
    """Publish what lies in an output folder.

    Returns: the versions that are served, and whether any of them is new.
    Raises: BadInput: something that the server would not serve, or a version that exists already and is another one.
    """
    target, repository = server(order.server), Repository(order.out)
    models = shipments(folder, order, target)
    if dry_run:
        return tuple(manifest for manifest, _ in models), False
    new = False
    with repository.locked():
        numbered = _numbered(repository, order, models)
        named = _by_name(numbered)
        for name, versions in named.items():
            _check_successor(repository, target, name, versions[-1][0])
        known = repository.names()
        for name in known:
            for manifest, contents in named.get(name, ()):
                new |= repository.publish(manifest, contents)
        for name, versions in named.items():  # from here on servers see it
            if name in known:
                _switch(repository, target, repository.folder(name), [manifest for manifest, _ in versions])
            else:
                new = True
                _create(repository, target, versions)
        _write_index(repository, target)
    return tuple(manifest for manifest, _ in numbered), new


def roll_back(out: Path, name: str, version: int | None = None, *, dry_run: bool = False) -> tuple[Manifest, ...]:
    """Serve an older version again: the one before, or the one that is named. Nothing is deleted.

    Returns: the versions that are served now.
    Raises: BadInput: there is none, or its files are not those that were published.
    """
    repository = Repository(out)
    repository.served(name)  # where nothing is served, not even the lock's folder is made
    with nullcontext() if dry_run else repository.locked():
        target, now = server(repository.state(name).server), repository.served(name)[-1]
        older = [
            number
            for number in repository.versions(name)
            if number < now.version and repository.manifest(name, number).role == now.role
        ]
        if version is None and not older:
            raise BadInput(f"{name} has no version before {now.version}. Name one with --version.")
        chosen = repository.manifest(name, older[-1] if version is None else version)
        served = _with_beside(repository, chosen)
        for manifest in served:
            check_files(repository.folder(name, manifest.version), manifest)
        if not dry_run:
            _switch(repository, target, repository.folder(name), served)
            _write_index(repository, target)
    return served


def _numbered(repository: Repository, order: Order, models: Sequence[Version]) -> list[Version]:
    """Give each version its number: the asked one or the next, or that of the same content which is served already."""
    known = {manifest.name: manifest for manifest, _ in models}
    highest = max((number for name in known for number in repository.versions(name)), default=0)
    number = highest + 1 if order.version is None else order.version
    found: list[Version] = []
    for manifest, contents in models:
        served = _same_as_served(repository, manifest) if order.version is None or manifest.role != "pruned" else None
        if served is not None:
            found.append((served, contents))
            continue
        beside = next((each.version for each, _ in found if each.name == manifest.name), None)
        taken = number + 1 if beside == number else number
        made_from = manifest.made_from if beside is None else {**manifest.made_from, "beside": str(beside)}
        found.append((replace(manifest, version=taken, made_from=made_from), contents))
    return found


def _same_as_served(repository: Repository, manifest: Manifest) -> Manifest | None:
    """The served version of the same content; None: there is none."""
    try:
        served = repository.served(manifest.name)
    except BadInput:
        return None
    for each in served:
        made_from = {**manifest.made_from, **{k: v for k, v in each.made_from.items() if k == "beside"}}
        if replace(manifest, version=each.version, made_from=made_from) == each:
            return each
    return None


def _by_name(versions: Sequence[Version]) -> dict[str, list[Version]]:
    names = dict.fromkeys(manifest.name for manifest, _ in versions)
    return {name: [each for each in versions if each[0].name == name] for name in names}


def _check_successor(repository: Repository, target: Server, name: str, manifest: Manifest) -> None:
    """May this version take the place of what is served?

    Raises: BadInput: it is for another server, or clients would break.
    """
    if name not in repository.names():
        return
    made_for = repository.state(name).server
    if made_for != target.name:
        raise BadInput(f"{name} in {repository.root} is for {made_for}, not {target.name}. Use another --out.")
    before = repository.served(name)[-1]
    if before.same_tensors != manifest.same_tensors:
        raise BadInput(
            f"{name} version {before.version} has other inputs or outputs than this model; its clients would break. "
            "Publish it under another --name."
        )


def _create(repository: Repository, target: Server, versions: Sequence[Version]) -> None:
    """Publish and serve a model that is not there yet."""
    manifests = [manifest for manifest, _ in versions]
    rows = _rows(versions[-1][1])
    repository.create(versions, lambda folder: _write_model(target, folder, manifests, rows))


def _switch(repository: Repository, target: Server, folder: Path, served: Sequence[Manifest]) -> None:
    path = folder / str(served[-1].version) / SAMPLES
    _write_model(target, folder, served, _rows({SAMPLES: path} if path.is_file() else {}))


def _write_model(target: Server, folder: Path, served: Sequence[Manifest], rows: Rows) -> None:
    write_state(folder, target.name, [manifest.version for manifest in served])
    write_files(folder, target.model_files(served, rows))


def _write_index(repository: Repository, target: Server) -> None:
    models = {name: repository.served(name) for name in repository.names()}
    write_files(repository.root, target.root_files(models))


def _with_beside(repository: Repository, manifest: Manifest) -> tuple[Manifest, ...]:
    """A version and the one that is served side by side with it."""
    beside = manifest.made_from.get("beside", "")
    return (*((repository.manifest(manifest.name, int(beside)),) if beside.isdigit() else ()), manifest)


def _rows(contents: Contents) -> Rows:
    """Recorded inputs by name."""
    found = contents.get(SAMPLES)
    if found is None:
        return {}
    tensors = load(found) if isinstance(found, bytes) else read_tensors(found, "Publish the version anew.")
    return {name.removeprefix("input."): rows.numpy() for name, rows in tensors.items() if name.startswith("input.")}
