"""The latency table: what heads and FFN widths take on one engine and device, measured inside the whole model.

A layer's share of the time cannot be timed by itself: engines fuse, overlap and keep things in caches. So whole models
are timed in which all layers of one shape have the same width, and the difference to the dense model is divided among
them. The time of a plan is the dense time less what its layers save; between the measured widths it is interpolated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from optin_deploy.errors import BadInput
from optin_deploy.layout import ModelLayout
from optin_deploy.validation import STORED, read_stored, validated

SCHEMA_VERSION = 1
HINT = "Measure it again with `optin profile`."
NS = 1_000_000
"""Nanoseconds in a millisecond: searches add whole numbers."""


@dataclass(frozen=True)
class Steps:
    """What one branch takes at a few widths."""

    __pydantic_config__ = STORED

    counts: tuple[int, ...]
    """Kept units, from 0 to all, rising."""
    ms: tuple[float, ...]
    """Milliseconds more than with none; noise can make them fall or negative."""

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.counts, self.counts[1:], strict=False))
        whole = len(self.counts) == len(self.ms) > 1 and self.counts[0] == 0 == self.ms[0] and rising
        if not whole or not np.isfinite(self.ms).all():
            raise BadInput(f"latency table: give a time for 0 to all units: {self.counts}, {self.ms}. {HINT}")

    def at(self, units: int) -> np.ndarray:
        """Milliseconds of 0, 1, ... units, (units + 1,); what takes longer than a wider one counts as the wider one.

        Raises: BadInput: the table is of another width.
        """
        if units != self.counts[-1]:
            raise BadInput(f"latency table: it has {self.counts[-1]} units where the model has {units}. {HINT}")
        ms = np.interp(np.arange(units + 1), self.counts, np.maximum(self.ms, 0))
        found: np.ndarray = np.minimum.accumulate(ms[::-1])[::-1]
        return found

    def saved(self, count: int) -> float:
        """Milliseconds that the branch takes less with `count` units than with all."""
        ms = self.at(self.counts[-1])
        return float(ms[-1] - ms[count])


@dataclass(frozen=True)
class HeldOut:
    """A plan that the table was not made from."""

    __pydantic_config__ = STORED

    heads: tuple[int, ...]
    neurons: tuple[int, ...]
    predicted_ms: float
    measured_ms: float

    def __post_init__(self) -> None:
        if not 0 < self.measured_ms < np.inf or not np.isfinite(self.predicted_ms):
            raise BadInput(f"latency table: a plan of {self.predicted_ms} ms predicted, {self.measured_ms} measured")

    @property
    def error(self) -> float:
        """Relative to the measured time; above 0: predicted too long."""
        return self.predicted_ms / self.measured_ms - 1


@dataclass(frozen=True)
class LatencyTable:
    """A `cost.units.Cost` in nanoseconds; good for one engine, device and size of input."""

    __pydantic_config__ = STORED

    dense_ms: float
    """Median of a batch through the dense model."""
    heads: tuple[Steps, ...]
    """One a layer."""
    neurons: tuple[Steps, ...]
    layout_hash: str
    setting: Mapping[str, str | int]
    """Engine, precision, batch, seq_len, threads, and the device and versions it was measured with."""
    held_out: tuple[HeldOut, ...] = ()
    """Plans that were measured to see how wrong the table is."""
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION or not 0 < self.dense_ms < np.inf:
            raise BadInput(f"latency table: schema_version {self.schema_version}, dense {self.dense_ms} ms. {HINT}")
        if len(self.heads) != len(self.neurons):
            raise BadInput(f"latency table: heads of {len(self.heads)} layers, but neurons of {len(self.neurons)}")

    @property
    def dense(self) -> int:
        """See `Cost.dense`."""
        return round(self.dense_ms * NS)

    @property
    def fixed(self) -> int:
        """See `Cost.fixed`: with no head and no neuron left."""
        none = [0] * len(self.heads)
        return max(0, round(self.predict_ms(none, none) * NS))

    def of_heads(self, layer: int, units: int) -> np.ndarray:
        """See `Cost.of_heads`."""
        return np.round(self.heads[layer].at(units) * NS).astype(np.int64)

    def of_neurons(self, layer: int, units: int) -> np.ndarray:
        """See `Cost.of_neurons`."""
        return np.round(self.neurons[layer].at(units) * NS).astype(np.int64)

    def predict_ms(self, heads: Sequence[int], neurons: Sequence[int]) -> float:
        """Milliseconds of a batch with these counts of kept heads and neurons a layer."""
        steps = zip((*self.heads, *self.neurons), (*heads, *neurons), strict=True)
        return self.dense_ms - sum(branch.saved(count) for branch, count in steps)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote.

        Raises: BadInput: a field is missing, unknown or of the wrong type.
        """
        return validated(cls, data, "latency table: not one of optin-deploy", HINT)


def read_table(path: Path, layout: ModelLayout, setting: Mapping[str, str | int]) -> LatencyTable:
    """The table in a file, if it was measured with this model in this setting.

    Raises: BadInput: missing or damaged, or names what differs.
    """
    table = read_stored(LatencyTable, path, HINT, what="a latency table of optin-deploy")
    if table.layout_hash != layout.hash:
        raise BadInput(f"{path}: of layout {table.layout_hash[:12]}, the model has {layout.hash[:12]}. {HINT}")
    units = [steps.counts[-1] for steps in (*table.heads, *table.neurons)]
    if units != [*(layer.heads for layer in layout.layers), *(layer.neurons for layer in layout.layers)]:
        raise BadInput(f"{path}: its units are not those of the model. {HINT}")
    found = table.setting
    other = [
        f"{name} is {found.get(name)!r}, not {value!r}" for name, value in setting.items() if found.get(name) != value
    ]
    if other:
        raise BadInput(f"{path}: measured elsewhere or otherwise: {', '.join(other)}. {HINT}")
    return table


def is_table(path: Path) -> bool:
    """Is this a latency table, of whatever model and setting?"""
    try:
        read_stored(LatencyTable, path, HINT)
    except BadInput:
        return False
    return True


TABLE_HEADER = ("layers", "units", "kept", "ms a layer")


def table_rows(table: LatencyTable) -> list[tuple[str, ...]]:
    """A row a measured width; layers that share their times share a row."""
    rows: list[tuple[str, ...]] = []
    for kind, every in (("heads", table.heads), ("neurons", table.neurons)):
        for steps in dict.fromkeys(every):
            layers = [str(i) for i, mine in enumerate(every) if mine == steps]
            where = " ".join(layers) if len(layers) < len(every) else f"all {len(layers)}"
            rows += [(where, kind, str(n), f"{ms:.3f}") for n, ms in zip(steps.counts, steps.ms, strict=True)]
    return rows


def held_out_line(table: LatencyTable) -> str:
    """How wrong the table is, in a sentence."""
    errors = np.abs([each.error for each in table.held_out])
    return (
        f"{len(errors)} random plans: predicted times are off by {np.median(errors):.1%} in the median, "
        f"{errors.max():.1%} at worst."
    )
