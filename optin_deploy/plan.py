"""Masks are what the search found; the plan is what will be cut, tied to one layout by hash."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from optin_deploy.errors import BadInput, PlanMismatch
from optin_deploy.layout import ModelLayout
from optin_deploy.storage import sha256_json
from optin_deploy.validation import STORED, read_stored, validated

SCHEMA_VERSION = 1
MOST_MACS = 2**56
HINT = "Write it with `optin plan`."
Keep = tuple[tuple[bool, ...], ...]
"""Per layer, True = kept; layers may differ in length."""


@dataclass(frozen=True)
class Masks:
    """Keep-masks of all layers."""

    __pydantic_config__ = STORED

    heads: Keep
    neurons: Keep
    layout_hash: str
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        _check_version("masks", self.schema_version)

    @classmethod
    def all_kept(cls, layout: ModelLayout) -> Masks:
        """The masks that cut nothing."""
        return cls(
            tuple((True,) * layer.heads for layer in layout.layers),
            tuple((True,) * layer.neurons for layer in layout.layers),
            layout.hash,
        )

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; a layer's mask is a string of 0 and 1, readable in the file."""
        return {
            **asdict(self),
            "heads": ["".join("01"[k] for k in keep) for keep in self.heads],
            "neurons": ["".join("01"[k] for k in keep) for keep in self.neurons],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Masks:
        """Read what `to_json` wrote.

        Raises: BadInput: not masks of this version.
        """
        try:
            bits = {name: _bits(data[name]) for name in ("heads", "neurons")}
        except (KeyError, TypeError, ValueError) as err:
            raise BadInput(f"masks: not a masks.json of optin-deploy: {err}. {HINT}") from err
        known = {**{k: v for k, v in data.items() if k != "settings"}, **bits}
        return validated(cls, known, "masks: not a masks.json of optin-deploy", HINT)


@dataclass(frozen=True)
class PruningPlan:
    """Which heads and neurons of each layer stay, and what that costs."""

    __pydantic_config__ = STORED

    heads: tuple[tuple[int, ...], ...]
    """Kept head indices a layer, ascending."""
    neurons: tuple[tuple[int, ...], ...]
    """Kept neuron indices a layer, ascending."""
    layout_hash: str
    macs_dense: int
    """MACs of the dense model for one sample of `tokens` tokens."""
    macs_pruned: int
    """Predicted MACs of the pruned model for the same sample."""
    macs_fixed: int
    """The part of both that no plan can cut."""
    tokens: int
    """Sequence length (or patches + special tokens) at which MACs are counted."""
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        _check_version("plan", self.schema_version)
        if self.tokens < 1:
            raise BadInput(f"plan: {self.tokens} tokens; MACs are counted for 1 or more.")
        rising = 0 <= self.macs_fixed <= self.macs_pruned <= self.macs_dense <= MOST_MACS
        if not rising or self.macs_fixed == self.macs_dense:
            raise BadInput(
                f"plan: MACs must be fixed <= pruned <= dense, with something to cut: {self.macs_fixed}, "
                f"{self.macs_pruned}, {self.macs_dense}."
            )
        if len(self.heads) != len(self.neurons):
            raise BadInput(f"plan: heads of {len(self.heads)} layers, but neurons of {len(self.neurons)}.")
        for name, layers in (("heads", self.heads), ("neurons", self.neurons)):
            for i, kept in enumerate(layers):
                if list(kept) != sorted(set(kept)) or (kept and kept[0] < 0):
                    raise BadInput(f"plan: {name} of layer {i} must be ascending, unique and not negative: {kept}.")

    @property
    def kept(self) -> float:
        """Share of the dense MACs that stays."""
        return self.macs_pruned / self.macs_dense

    @property
    def prunable_kept(self) -> float:
        """Share of the MACs of heads and FFN that stays (the paper's measure)."""
        return (self.macs_pruned - self.macs_fixed) / (self.macs_dense - self.macs_fixed)

    @property
    def hash(self) -> str:
        """sha256 of the canonical JSON."""
        return sha256_json(self.to_json())

    def check(self, layout: ModelLayout) -> None:
        """Make sure that the plan was made for this layout.

        Raises: PlanMismatch: another layout, or indices that it does not have.
        """
        if self.layout_hash != layout.hash:
            raise PlanMismatch(
                f"the plan was made for layout {self.layout_hash[:12]}, this model ({layout.model_class}, "
                f"{len(layout.layers)} layers) has {layout.hash[:12]}. Make a plan for this model with `optin plan`."
            )
        if not len(self.heads) == len(self.neurons) == len(layout.layers):
            raise PlanMismatch(f"plan: {len(self.heads)} layers; the model has {len(layout.layers)}.")
        for i, layer in enumerate(layout.layers):
            for name, kept, units in (
                ("heads", self.heads[i], layer.heads),
                ("neurons", self.neurons[i], layer.neurons),
            ):
                if kept and kept[-1] >= units:
                    raise PlanMismatch(f"plan: layer {i} keeps {name} {kept[-1]}, but has only 0..{units - 1}.")

    def masks(self, layout: ModelLayout) -> Masks:
        """The plan as keep-masks."""
        self.check(layout)
        heads = tuple(_mask(kept, layer.heads) for kept, layer in zip(self.heads, layout.layers, strict=True))
        neurons = tuple(_mask(kept, layer.neurons) for kept, layer in zip(self.neurons, layout.layers, strict=True))
        return Masks(heads, neurons, layout.hash)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PruningPlan:
        """Read what `to_json` wrote.

        Raises: BadInput: a field is missing, unknown or of the wrong type.
        """
        return validated(cls, data, "plan: not a plan.json of optin-deploy", HINT)

    @classmethod
    def read(cls, path: Path, hint: str, layout: ModelLayout | None = None) -> PruningPlan:
        """A stored plan.

        Args: layout: what it must have been made for, if that is known.
        Raises: BadInput: absent, damaged or edited. PlanMismatch: of another layout, or with units that it lacks.
        """
        plan = read_stored(cls, path, hint, what="a plan.json of optin-deploy")
        try:
            if layout is not None:
                plan.check(layout)
        except PlanMismatch as err:
            raise PlanMismatch(f"{path}: {err} {hint}") from err
        return plan


def _mask(kept: tuple[int, ...], units: int) -> tuple[bool, ...]:
    chosen = set(kept)
    return tuple(unit in chosen for unit in range(units))


def _bits(layers: list[str]) -> Keep:
    if any(set(bits) - {"0", "1"} for bits in layers):
        raise ValueError("a mask holds something besides 0 and 1")
    return tuple(tuple(bit == "1" for bit in bits) for bits in layers)


def _check_version(what: str, version: int) -> None:
    if version != SCHEMA_VERSION:
        raise BadInput(f"{what}: schema_version {version}; this version of optin-deploy reads {SCHEMA_VERSION}.")
