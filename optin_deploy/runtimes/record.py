"""engine.json: what the device-bound artifacts of a folder were built for, read before one of them is loaded.

An engine of another device or version can crash the process that loads it: the record refuses it first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from optin_deploy.common.stored import Stored
from optin_deploy.errors import BadInput
from optin_deploy.files.storage import sha256_file

FILE = "engine.json"
AMPERE = (8,)
"""Compute capability from which on hardware-compatible engines run."""
REBUILD = "Build it here: optin build {folder} --engine {engine}"


@dataclass(frozen=True)
class EngineRecord:
    """One artifact that fits one device and one version of its engine."""

    engine: str
    precision: str
    sha256: str
    """Hash of the artifact's file."""
    size_bytes: int
    device: str
    """Name of the GPU or CPU it was built on; empty: built ahead of time, with no device."""
    capability: str
    """CUDA compute capability such as `9.0`, or the CPU's instruction set; empty: any that the engine takes."""
    version: str
    """Version of the package that built it and must load it."""
    key: str
    """Hash of everything that it was made from; an artifact with the wanted key is not built again."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Other packages it depended on."""
    options: Mapping[str, str] = field(default_factory=dict)
    """What the builder was told, the profiles (sizes that it takes) among it."""
    onnx: str | None = None
    """File beside it that it was built from."""
    onnx_sha256: str | None = None
    onnx_data: Mapping[str, str] = field(default_factory=dict)
    """sha256 of the files beside it that hold its weights, by their names."""
    any_version: bool = False
    """Loads in later versions of the same major version."""
    any_device: bool = False
    """Runs on every GPU from Ampere on."""
    stripped: bool = False
    """Holds no weights: they are put in from `onnx` when it is loaded."""

    def __post_init__(self) -> None:
        if self.onnx is not None and (Path(self.onnx).name != self.onnx or "\\" in self.onnx):
            raise BadInput(f"onnx {self.onnx[:80]!r} is not the name of a file beside the engine")

    def check(self, path: Path, *, version: str, capability: str) -> None:
        """Refuse to load where it could crash.

        Args: version: installed. capability: of the device that is to run it.
        Raises: BadInput: built for another device or version, or the file is not the one that was built.
        """
        remedy = REBUILD.format(folder=path.parent, engine=self.engine)
        if self.version != version and not (self.any_version and _newer_of_same_major(version, self.version)):
            raise BadInput(f"{path} was built with version {self.version}, but {version} is installed. {remedy}")
        fits = self.capability in ("", capability) or (self.any_device and _numbers(capability) >= AMPERE)
        if not fits:
            raise BadInput(
                f"{path} was built for {self.device} (compute capability {self.capability}), but this device has "
                f"{capability}. {remedy}"
            )
        if path.stat().st_size != self.size_bytes or sha256_file(path) != self.sha256:
            raise BadInput(f"{path} is not the file that {FILE} describes. {remedy}")


@dataclass(frozen=True)
class _Records(Stored):
    """Contents of engine.json."""

    hint = "Build the engines again with `optin build {folder}`."

    engines: Mapping[str, EngineRecord]
    """Records by the name of the artifact."""


def write_record(path: Path, record: EngineRecord) -> None:
    """Note an artifact in the engine.json of its folder; the entries of others stay."""
    try:
        known = _entries(path.parent)
    except BadInput:
        known = {}  # damaged: what it described is unknown from now on, and refused
    entries = {name: entry for name, entry in known.items() if (path.parent / name).is_file()}
    _Records({**entries, path.name: record}).write(path.parent / FILE)


def read_record(path: Path) -> EngineRecord:
    """What engine.json says of an artifact.

    Raises: BadInput: no such file, or no word of it.
    """
    if not path.is_file():
        raise BadInput(f"There is no engine at {path}. Make it with `optin build {path.parent} --engine ENGINE`.")
    entry = _entries(path.parent).get(path.name)
    if entry is None:
        raise BadInput(
            f"{path.parent / FILE} does not describe {path.name}: its device and version are unknown, and loading "
            f"it could crash. Build it with `optin build {path.parent} --engine ENGINE`."
        )
    return entry


def finished(path: Path, key: str) -> EngineRecord | None:
    """The record of an artifact that lies there whole and was made from the same things; else None."""
    try:
        entry = _entries(path.parent).get(path.name)
    except BadInput:
        return None
    whole = entry is not None and entry.key == key and path.is_file() and sha256_file(path) == entry.sha256
    return entry if whole else None


def _entries(folder: Path) -> Mapping[str, EngineRecord]:
    file = folder / FILE
    return _Records.read(file).engines if file.exists() else {}


def _newer_of_same_major(installed: str, built: str) -> bool:
    ours, theirs = (_numbers(version) for version in (installed, built))
    return ours[0] == theirs[0] and ours >= theirs


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isascii() and part.isdigit() else 0 for part in version[:64].split("."))
