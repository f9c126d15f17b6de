"""Triton's config.pbtxt as typed objects, and as text. Field names are those of Triton's ModelConfig message."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass

TYPES = {"BYTES": "TYPE_STRING"}
"""V2 datatypes that Triton names differently; for all others the name is TYPE_ and the datatype."""


class Word(str):
    """An enumeration's value: written without quotes."""


def data_type(datatype: str) -> Word:
    """Triton's name of a V2 datatype."""
    return Word(TYPES.get(datatype, f"TYPE_{datatype}"))


@dataclass(frozen=True)
class Tensor:
    """An input or output."""

    name: str
    data_type: Word
    dims: tuple[int, ...]
    """Sizes without the batch axis if the model batches; -1 means any size."""


@dataclass(frozen=True)
class Specific:
    """Which versions to serve."""

    versions: tuple[int, ...]


@dataclass(frozen=True)
class VersionPolicy:
    """Served are exactly the named versions; others may lie beside them."""

    specific: Specific


@dataclass(frozen=True)
class InstanceGroup:
    """Copies of the model."""

    count: int
    kind: Word


@dataclass(frozen=True)
class DynamicBatching:
    """How requests are joined."""

    preferred_batch_size: tuple[int, ...]
    max_queue_delay_microseconds: int


@dataclass(frozen=True)
class WarmupInput:
    """Values of one input; the file lies in the model's folder `warmup`."""

    data_type: Word
    dims: tuple[int, ...]
    input_data_file: str


@dataclass(frozen=True)
class Warmup:
    """A request that is run before the model is ready."""

    name: str
    batch_size: int
    inputs: Mapping[str, WarmupInput]


@dataclass(frozen=True)
class Parameter:
    """A setting of a backend."""

    string_value: str


@dataclass(frozen=True)
class Accelerator:
    """An execution provider of ONNX Runtime."""

    name: str


@dataclass(frozen=True)
class Accelerators:
    """Execution providers by device."""

    gpu_execution_accelerator: tuple[Accelerator, ...]


@dataclass(frozen=True)
class Optimization:
    """What a backend does before it serves."""

    execution_accelerators: Accelerators


@dataclass(frozen=True)
class Cache:
    """Triton's response cache: off, so that dense and pruned are compared by what they compute."""

    enable: bool


@dataclass(frozen=True)
class Step:
    """One model of an ensemble; maps go from its own tensor names to those of the ensemble."""

    model_name: str
    model_version: int
    input_map: Mapping[str, str]
    output_map: Mapping[str, str]


@dataclass(frozen=True)
class Ensemble:
    """Models in a row."""

    step: tuple[Step, ...]


@dataclass(frozen=True)
class Config:
    """One model's config.pbtxt. None and empty fields are left out."""

    name: str
    max_batch_size: int
    input: tuple[Tensor, ...]
    output: tuple[Tensor, ...]
    version_policy: VersionPolicy
    platform: str | None = None
    backend: str | None = None
    instance_group: tuple[InstanceGroup, ...] = ()
    dynamic_batching: DynamicBatching | None = None
    optimization: Optimization | None = None
    model_warmup: tuple[Warmup, ...] = ()
    parameters: Mapping[str, Parameter] | None = None
    ensemble_scheduling: Ensemble | None = None
    response_cache: Cache | None = None

    def __str__(self) -> str:
        return "\n".join(_lines(self, "")) + "\n"


def _lines(message: object, indent: str) -> Iterator[str]:
    assert is_dataclass(message)
    for field in fields(message):
        yield from _field(field.name, getattr(message, field.name), indent)


def _field(name: str, value: object, indent: str) -> Iterator[str]:
    if value is None:
        return
    if is_dataclass(value):
        yield f"{indent}{name} {{"
        yield from _lines(value, indent + "  ")
        yield f"{indent}}}"
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield f"{indent}{name} {{"
            yield f"{indent}  key: {_scalar(key)}"
            yield from _field("value", item, indent + "  ")
            yield f"{indent}}}"
    elif isinstance(value, Sequence) and not isinstance(value, str):
        if value and all(is_dataclass(item) for item in value):
            for item in value:
                yield from _field(name, item, indent)
        elif value:
            yield f"{indent}{name}: [{', '.join(map(_scalar, value))}]"
    else:
        yield f"{indent}{name}: {_scalar(value)}"


def _scalar(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case Word():
            return str(value)
        case str():
            return json.dumps(value)  # pbtxt and JSON escape ASCII alike
    return str(value)
