"""Cells: what is measured, read from TOML, multiplied out, each with a stable key."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.engines import NAMES
from benchmarks.gpu.models import MODELS, PRUNED, is_image
from optin_deploy.errors import BadInput
from optin_deploy.exporters.precisions import DTYPES

KINDS = ("pair", "table", "score", "profile")
INPUTS = ("full", "padded")
LISTS = ("model", "keep", "engine", "inputs", "batch", "seq", "precision")
"""Entries of a group that are multiplied out, slowest first."""


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    kind: str
    model: str
    engine: str
    precision: str
    batch: int
    seq: int | None
    """Tokens; None for images, which have their own number."""
    keep: float | None
    """Share of the dense MACs that the pruned variants keep; None where the kind has no budget."""
    inputs: str
    """`full`: no padding, no attention mask; `padded`: both."""
    seconds: float
    """Expected; the cell starts only if so much time is left."""
    blocks: int
    """Replicates of a timing."""
    timed_s: float
    """Seconds that are timed, over all blocks."""
    heads: tuple[int, ...] = ()
    neurons: tuple[int, ...] = ()
    """kind `table`: the grid of widths, the same in all layers."""
    steps: tuple[int, ...] = ()
    """kind `table`: more numbers of neurons, beside all heads."""
    samples: int = 0
    """kind `score`: calibration samples."""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("kind", self.kind, KINDS),
            ("model", self.model, tuple(MODELS)),
            ("engine", self.engine, NAMES),
            ("precision", self.precision, tuple(DTYPES)),
            ("inputs", self.inputs, INPUTS),
        ):
            if value not in known:
                raise BadInput(f"cell {self.key}: unknown {name} {value!r}; possible: {', '.join(known)}.")
        if (self.seq is None) != is_image(self.model):
            raise BadInput(f"cell {self.key}: `seq` is for text models, and needed there.")
        if (self.keep is None) != (self.kind in ("table", "score")):
            raise BadInput(f"cell {self.key}: `keep` is for the kinds pair and profile, and needed there.")
        if self.kind == "table" and not (self.heads and self.neurons):
            raise BadInput(f"cell {self.key}: a table needs `heads` and `neurons`.")
        if self.kind == "score" and self.samples < self.batch:
            raise BadInput(f"cell {self.key}: `samples` must be at least one batch.")
        if self.batch < 1 or self.blocks < 2 or not (self.seconds > 0 and self.timed_s > 0):
            raise BadInput(f"cell {self.key}: batch, seconds and timed_s must be positive, blocks 2 or more.")

    @property
    def key(self) -> str:
        """Name of the cell in results; does not hold how long or how often is measured."""
        keep = [] if self.keep is None else [f"keep{self.keep}"]
        length = "image" if self.seq is None else f"s{self.seq}"
        return "/".join(
            (self.kind, self.model, *keep, self.engine, self.precision, f"b{self.batch}", length, self.inputs)
        )

    @property
    def limit_s(self) -> float:
        """Seconds after which the cell counts as hung."""
        return 60 + 4 * self.seconds

    def to_json(self) -> dict[str, Any]:
        """JSON-ready, with the key."""
        return {"key": self.key, **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Cell:
        """Read what `to_json` wrote."""
        fields: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in data.items() if name != "key"
        }
        return cls(**fields)


@dataclass(frozen=True)
class Requirement:
    """A speed-up that must be reached in at least one of some cells."""

    text: str
    variant: str
    at_least: float
    any_of: tuple[str, ...]
    """Keys of cells."""


@dataclass(frozen=True)
class Suite:
    """All cells in the order in which they run, and what must hold."""

    cells: tuple[Cell, ...]
    must_hold: tuple[Requirement, ...]


def load_suite(path: Path) -> Suite:
    """Read a TOML file of groups.

    Raises: BadInput: an unknown entry or value, a key that comes twice, or a requirement on a cell that is not there.
    """
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    groups = sorted((data["defaults"] | group for group in data["group"]), key=lambda group: int(group["priority"]))
    cells = tuple(cell for group in groups for cell in _expand(group))
    keys = [cell.key for cell in cells]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise BadInput(f"{path.name}: cells come twice: {', '.join(twice)}. Take them out of one group.")
    must_hold = tuple(Requirement(**{**entry, "any_of": tuple(entry["any_of"])}) for entry in data["must_hold"])
    for requirement in must_hold:
        unknown = sorted(set(requirement.any_of) - set(keys))
        if unknown or requirement.variant not in PRUNED:
            raise BadInput(f"{path.name}: must_hold names what is not measured: {unknown or requirement.variant}.")
    return Suite(cells, must_hold)


def _expand(group: Mapping[str, Any]) -> list[Cell]:
    lists = {name: group.get(name, [None]) for name in LISTS}
    single: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in group.items()
        if name not in (*LISTS, "priority")
    }
    try:
        return [
            Cell(**single, **dict(zip(lists, values, strict=True))) for values in itertools.product(*lists.values())
        ]
    except TypeError as err:
        raise BadInput(f"group of kind {group.get('kind')!r}, priority {group['priority']}: {err}.") from err
