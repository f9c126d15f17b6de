"""What is known of one version of a served model: its file, tensors, hashes, and how it is to be served."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from optin_deploy.common.stored import Stored
from optin_deploy.errors import BadInput

FOLDER = "optin"
"""Folder in a version's folder: what travels with it beside the files that the server reads."""
FILE = f"{FOLDER}/manifest.json"
HINT = "Publish it with `optin ship`."
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
"""Model names that are also one file name, one path segment of a URL and, in lower case, a Kubernetes name."""
TENSOR_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./:-]{0,255}")
LARGEST_VERSION = 2**31 - 1
MOST_AXES, LARGEST_AXIS = 8, 2**31 - 1
ROLES = ("dense", "pruned", "tokenizer", "text")

DATATYPES = {
    "BOOL": "bool",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "UINT16": "uint16",
    "UINT32": "uint32",
    "UINT64": "uint64",
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
    "BYTES": "object",
}
"""Names in the V2 protocol -> numpy's."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output, as the artifact has it."""

    name: str
    datatype: str
    """One of DATATYPES."""
    shape: tuple[int, ...]
    """Batch first; -1: any size."""

    def __post_init__(self) -> None:
        if not TENSOR_NAME.fullmatch(self.name):
            raise BadInput(f"tensor name {self.name[:80]!r}: letters, digits and _ . / : - only, at most 256")
        if self.datatype not in DATATYPES:
            raise BadInput(f"tensor {self.name} has datatype {self.datatype[:40]!r}; possible: {', '.join(DATATYPES)}")
        sizes_fit = all(size == -1 or 1 <= size <= LARGEST_AXIS for size in self.shape)
        if not (1 <= len(self.shape) <= MOST_AXES and sizes_fit):
            raise BadInput(
                f"tensor {self.name} has shape {list(self.shape)[:16]}: 1 to {MOST_AXES} axes of 1 to {LARGEST_AXIS}, "
                "or -1 for any size"
            )


@dataclass(frozen=True)
class ServingOptions:
    """How a version is to be served; what None stands for is the server's default."""

    max_batch: int = 32
    """Samples a request, and requests joined, at most."""
    preferred: tuple[int, ...] = ()
    """Batch sizes that the server should form."""
    queue_delay_us: int = 100
    """How long a request may wait for others to join it, in microseconds."""
    instances: int = 1
    """Copies of the model that run at the same time."""
    threads: int | None = None
    """Intra-op threads of a copy."""
    longest: int | None = None
    """Tokens of a text at most, where the server tokenizes."""
    too_long: str = "truncate"
    """`truncate` or `refuse` what is longer."""
    storage_uri: str | None = None
    """Address at which KServe finds the repository, e.g. `s3://bucket/repository` or `pvc://claim/repository`."""
    canary: int | None = None
    """Percent of KServe's traffic that goes to the version; None: all. It may change while the version stays: what it
    is now, the repository says."""

    def __post_init__(self) -> None:
        counts = {"--max-batch": self.max_batch, "--instances": self.instances}
        given = {"--threads": self.threads, "--longest": self.longest}
        for option, value in {**counts, **given}.items():
            if value is not None and not 1 <= value <= 65536:
                raise BadInput(f"{option} {value}: possible are 1 to 65536")
        if not 0 <= self.queue_delay_us <= 10**7:
            raise BadInput(f"--queue-delay {self.queue_delay_us}: possible are 0 to 10000000 microseconds")
        if not all(1 <= size <= self.max_batch for size in self.preferred):
            raise BadInput(f"preferred batches {list(self.preferred)}: possible are 1 to --max-batch {self.max_batch}")
        if self.too_long not in ("truncate", "refuse"):
            raise BadInput(f"--too-long {self.too_long!r}: possible are truncate, refuse")
        check_canary(self.canary)


@dataclass(frozen=True)
class Manifest(Stored):
    """One version of a served model."""

    what = "a manifest of this version"
    hint = HINT

    name: str
    version: int
    role: str
    """`dense` or `pruned`; or what serves texts around one: `tokenizer`, `text`."""
    engine: str
    """Engine of `optin build`; empty if no engine of ours runs it."""
    precision: str
    file: str
    """The artifact in the version's folder; empty: the server needs none."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    options: ServingOptions
    sha256: Mapping[str, str]
    """Hashes of every file in the version's folder but this one, by relative path."""
    size_bytes: int
    """Size of the artifact."""
    made_from: Mapping[str, str] = field(default_factory=dict)
    """Hashes and names of what it was made of: model, plan, layout, weights."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Packages that made it."""

    def __post_init__(self) -> None:
        check_name(self.name)
        check_version(self.version)
        if self.role not in ROLES:
            raise BadInput(f"role {self.role!r}; possible: {', '.join(ROLES)}")
        for path in (self.file, *self.sha256):
            if path.startswith("/") or "\\" in path or ".." in path.split("/"):
                raise BadInput(f"file {path[:80]!r} leads out of the version's folder")

    @property
    def same_tensors(self) -> tuple[object, ...]:
        """What clients depend on: equal for versions that may take each other's place."""
        return (self.inputs, self.outputs)


def with_canary(manifest: Manifest, percent: int | None) -> Manifest:
    """The same version with another share of the traffic."""
    return replace(manifest, options=replace(manifest.options, canary=percent))


def same_version(one: Manifest, other: Manifest) -> bool:
    """Are these one version, whatever share of the traffic it gets?"""
    return with_canary(one, None) == with_canary(other, None)


def check_canary(percent: int | None) -> None:
    """Refuse what is no share of the traffic.

    Raises: BadInput.
    """
    if percent is not None and not 0 <= percent <= 100:
        raise BadInput(f"--canary {percent}: possible are 0 to 100 percent")


def check_name(name: str) -> str:
    """The name of a model, if it may be one.

    Raises: BadInput.
    """
    if not NAME.fullmatch(name):
        raise BadInput(f"model name {name[:80]!r}: letters, digits, _ and - only, a letter or digit first, at most 63.")
    return name


def check_version(version: int) -> int:
    """A version's number, if it may be one.

    Raises: BadInput.
    """
    if not 1 <= version <= LARGEST_VERSION:
        raise BadInput(f"version {version}: possible are 1 to {LARGEST_VERSION}.")
    return version


def read_manifest(folder: Path, name: str, version: int) -> Manifest:
    """The manifest of a version, without looking at the files it names.

    Args: folder: of the version.
    Raises: BadInput: absent, damaged, or of another model or version.
    """
    file = folder / FILE
    found = Manifest.read(file)
    if (found.name, found.version) != (name, version):
        raise BadInput(f"{file} is of {found.name} version {found.version}, not of {name} version {version}. {HINT}")
    return found


def check_files(folder: Path, manifest: Manifest) -> None:
    """Are the files of a version the published ones?

    Raises: BadInput: names the first that is missing, a link, or another one.
    """
    from optin_deploy.files.storage import sha256_file  # here: commands take the defaults of `ServingOptions`

    for name, sha256 in manifest.sha256.items():
        path = folder / name
        if not path.is_file() or path.is_symlink():
            raise BadInput(f"{path}, which the manifest names, is missing or a link. Publish the version anew.")
        if sha256_file(path) != sha256:
            raise BadInput(f"{path} is not the published file: its sha256 is not {sha256}. Publish a new version.")
