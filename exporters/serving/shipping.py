"""`optin ship`: publish the artifacts of an output folder as versions of served models, and go back to an older one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import load

from exporters.serving import server
from exporters.serving.base import Rows, Server
from exporters.serving.shipments import SAMPLES, Order, shipments
from optin_deploy.errors import BadInput
from optin_deploy.ownership import Record
from optin_deploy.serving.manifest import Manifest, check_files
from optin_deploy.serving.repository import STATE, Contents, Repository, Version, stage_version, state_of
from optin_deploy.serving.staging import staged
from optin_deploy.storage import read_tensors
from optin_deploy.workspace import is_job


@dataclass(frozen=True)
class Publication:
    """Everything that is to be written; nothing of it is yet."""

    versions: tuple[Version, ...]
    """Numbered, those too that are published already."""
    new: tuple[Version, ...]
    files: Mapping[Path, bytes]
    """What names the served versions, in the order in which it is to take its place."""

    @property
    def manifests(self) -> tuple[Manifest, ...]:
        """Of all its versions."""
        return tuple(manifest for manifest, _ in self.versions)


def ship_folder(folder: Path, order: Order, *, dry_run: bool = False) -> tuple[tuple[Manifest, ...], bool]:
    """Publish what lies in an output folder: all of it, or nothing.

    Args: dry_run: everything is checked, and nothing written.
    Returns: the versions that are served, and whether any of them is new.
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
        _write(repository, wanted)
    return wanted.manifests, bool(wanted.new)


def roll_back(out: Path, name: str, version: int | None = None, *, dry_run: bool = False) -> tuple[Manifest, ...]:
    """Serve an older version again: the one before, or the one that is named. Nothing is deleted.

    Returns: the versions that are served now.
    Raises: BadInput: there is none, or its files are not those that were published.
    """
    repository = Repository(out)
    wanted = _older(repository, name, version)
    if not dry_run:
        with repository.locked():
            wanted = _older(repository, name, version)
            _write(repository, wanted)
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


def publication(repository: Repository, target: Server, order: Order, models: Sequence[Version]) -> Publication:
    """Number the versions, and find out what has to be written for them.

    Raises: BadInput: see `ship_folder`.
    """
    numbered = _numbered(repository, order, models)
    named = _by_name(numbered)
    new = [each for each in numbered if repository.is_new(each[0])]
    for name, versions in named.items():
        _check_successor(repository, target, name, versions[-1][0])
    return Publication(tuple(numbered), tuple(new), _files(repository, target, named))


def _older(repository: Repository, name: str, version: int | None) -> Publication:
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
    versions = [(manifest, _published(repository, manifest)) for manifest in served]
    return Publication(tuple(versions), (), _files(repository, target, {name: versions}))


def _write(repository: Repository, wanted: Publication) -> None:
    if not (wanted.new or wanted.files):
        return
    known = repository.names()
    with staged(repository.root) as staging:
        # Versions of known models first: nobody serves them yet.
        for manifest, contents in sorted(wanted.new, key=lambda each: each[0].name not in known):
            if manifest.name not in known:
                staging.folder(repository.folder(manifest.name))  # a new model appears at once, with all that it needs
            folder = repository.folder(manifest.name, manifest.version)
            stage_version(staging, folder, manifest, contents)
        for path, data in wanted.files.items():
            staging.write(path, data)


def _files(repository: Repository, target: Server, named: Mapping[str, Sequence[Version]]) -> dict[Path, bytes]:
    """The files that name the served versions, as far as they are not there yet.

    Raises: BadInput: somebody else's file is in the way of one.
    """
    known = repository.names()
    now = {name: repository.served(name) for name in known}
    wanted = {**now, **{name: [manifest for manifest, _ in versions] for name, versions in named.items()}}
    before, after = _index(repository, target, now), _index(repository, target, dict(sorted(wanted.items())))
    found: dict[Path, bytes] = {}
    for name, versions in named.items():
        folder = repository.folder(name)
        state = state_of(target.name, wanted[name])
        if name not in known or repository.state(name) != state:
            found[folder / STATE] = state.to_bytes()
        old = {} if name not in known else _model(repository, target, now[name], _published(repository, now[name][-1]))
        new = _model(repository, target, wanted[name], versions[-1][1])
        found |= {path: data for path, data in new.items() if _is_needed(repository, path, data, old.get(path))}
    return found | {path: data for path, data in after.items() if _is_needed(repository, path, data, before.get(path))}


def _is_needed(repository: Repository, path: Path, data: bytes, old: bytes | None) -> bool:
    """Has a file to be written?

    Args: old: what `optin ship` wrote there before, if that is known; else the repository's record tells.
    Raises: BadInput: what is there is somebody else's.
    """
    links = [each for each in (path, *path.parents) if each.is_relative_to(repository.root) and each.is_symlink()]
    links = [each for each in links if each != repository.root]
    if not links and not os.path.lexists(path):
        return True
    if not links and path.is_file():
        content = path.read_bytes()
        if content == data:
            return False
        if content == old or Record(repository.root).owns(path):
            return True
    raise BadInput(
        f"{path} is there, but `optin ship` did not write what it holds, and would write over it. Move it away, or use "
        "another --out or --name."
    )


def _model(repository: Repository, target: Server, served: Sequence[Manifest], contents: Contents) -> dict[Path, bytes]:
    files = target.model_files(served, _rows(contents))
    return {repository.folder(served[-1].name) / name: _bytes(content) for name, content in files.items()}


def _index(repository: Repository, target: Server, models: Mapping[str, Sequence[Manifest]]) -> dict[Path, bytes]:
    return {repository.root / name: _bytes(content) for name, content in target.root_files(models).items()}


def _bytes(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content


def _published(repository: Repository, manifest: Manifest) -> Contents:
    """The recorded rows of a published version."""
    path = repository.folder(manifest.name, manifest.version) / SAMPLES
    return {SAMPLES: path} if path.is_file() else {}


def _numbered(repository: Repository, order: Order, models: Sequence[Version]) -> list[Version]:
    """Give each version its number: the asked one or the next, or that of the same content which is served already."""
    known = {manifest.name: manifest for manifest, _ in models}
    highest = max((number for name in known for number in repository.numbers(name)), default=0)
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
