"""What a publication writes: its versions with their numbers, and the files that name the served ones.

Files of others are never written over: of a file that is in the way, the repository's record must say that it is ours,
or its content must be what `optin ship` writes for the versions that are served now.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import load

from optin_deploy.errors import BadInput
from optin_deploy.files.ownership import Record
from optin_deploy.files.storage import read_tensors
from optin_deploy.serving.base import Rows, Server
from optin_deploy.serving.manifest import Manifest, same_version, with_canary
from optin_deploy.serving.order import ShipOrder
from optin_deploy.serving.repository import STATE, Contents, Repository, Version, stage_version, state_of
from optin_deploy.serving.shipments import SAMPLES
from optin_deploy.serving.staging import staged


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
        """Manifests of all its versions."""
        return tuple(manifest for manifest, _ in self.versions)


def publication(repository: Repository, target: Server, order: ShipOrder, models: Sequence[Version]) -> Publication:
    """Number the versions, and find out what has to be written for them.

    Raises: BadInput: see `ship_folder`.
    """
    numbered = _numbered(repository, order, models)
    named = _by_name(numbered)
    new = [each for each in numbered if repository.is_new(each[0])]
    for name, versions in named.items():
        _check_successor(repository, target, name, versions[-1][0])
    return Publication(tuple(numbered), tuple(new), files_of(repository, target, named))


def write(repository: Repository, wanted: Publication) -> None:
    """Write all of it, or nothing; the repository's lock is held."""
    if not (wanted.new or wanted.files):
        Record(repository.root).clear_temporaries()
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


def files_of(repository: Repository, target: Server, named: Mapping[str, Sequence[Version]]) -> dict[Path, bytes]:
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
        old = {} if name not in known else _model(repository, target, now[name], published(repository, now[name][-1]))
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


def published(repository: Repository, manifest: Manifest) -> Contents:
    """The recorded rows of a published version."""
    path = repository.folder(manifest.name, manifest.version) / SAMPLES
    return {SAMPLES: path} if path.is_file() else {}


def _numbered(repository: Repository, order: ShipOrder, models: Sequence[Version]) -> list[Version]:
    """Give each version its number: the asked one or the next, or that of the same content which is served already."""
    known = {manifest.name: manifest for manifest, _ in models}
    highest = max((number for name in known for number in repository.numbers(name)), default=0)
    number = highest + 1 if order.version is None else order.version
    found: list[Version] = []
    for manifest, contents in models:
        served = _same_as_served(repository, manifest) if order.version is None or manifest.role != "pruned" else None
        if served is not None:
            found.append((with_canary(served, manifest.options.canary), contents))
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
        if same_version(replace(manifest, version=each.version, made_from=made_from), each):
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


def _rows(contents: Contents) -> Rows:
    """Recorded inputs by name."""
    found = contents.get(SAMPLES)
    if found is None:
        return {}
    tensors = load(found) if isinstance(found, bytes) else read_tensors(found, "Publish the version anew.")
    return {name.removeprefix("input."): rows.numpy() for name, rows in tensors.items() if name.startswith("input.")}
