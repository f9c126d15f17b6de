"""Where the prunable weights of one concrete model are, and how many units each layer has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from optin_deploy.errors import BadInput
from optin_deploy.storage import sha256_json
from optin_deploy.validation import STORED, validated

SCHEMA_VERSION = 2
MOST = 2**24
"""Units of a branch, and columns of a unit: a hundred times more than any known network has."""


@dataclass(frozen=True)
class Branch:
    """One residual branch: input projections -> units -> output projection, added to a residual tensor."""

    __pydantic_config__ = STORED

    inputs: tuple[str, ...]
    """Module paths of the projections that make the units: q, k, v (or one that is all three), or FFN up (and gate).
    All read one tensor, once."""
    output: str
    """Module path of the projection whose *input* the units are; masks and cuts happen there."""
    residual: str
    """Module path whose first argument is the tensor that the branch is added to."""
    scale: str | None
    """Parameter path of the LayerScale factor on the branch, shape (hidden,); None = 1."""
    units: int
    """Number of prunable units: heads or neurons."""
    unit_width: int
    """Columns of the output projection that belong to one unit: head_dim, or 1 for neurons."""
    split: str | None = None
    """Attribute of the attention that says how wide each part of a fused input projection is."""

    @property
    def name(self) -> str:
        """What files call it."""
        return self.output

    @property
    def width(self) -> int:
        """Columns of all units."""
        return self.units * self.unit_width

    def __post_init__(self) -> None:
        sizes = (self.units, self.unit_width)
        if not all(1 <= size <= MOST for size in sizes) or not self.inputs or not self.output:
            raise BadInput(f"layout: branch {self.output!r} has {self.units} units of width {self.unit_width}.")


@dataclass(frozen=True)
class LayerSpec:
    """One block: an attention branch and a feed-forward branch."""

    __pydantic_config__ = STORED

    path: str
    """Module path of the block; its output is the feature the trajectory looks at."""
    hidden: int
    """Width of the residual stream."""
    core: str
    """Module path of the attention that is replaced when no head is left."""
    attention: Branch
    ffn: Branch

    @property
    def branches(self) -> tuple[Branch, Branch]:
        """Both, in the order they run."""
        return self.attention, self.ffn

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return self.attention.units

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.attention.unit_width

    @property
    def neurons(self) -> int:
        """FFN width."""
        return self.ffn.units


@dataclass(frozen=True)
class ModelLayout:
    """All layers of one model, in the order they run."""

    __pydantic_config__ = STORED

    arch: str
    """Name of the architecture row."""
    model_class: str
    """transformers class that the weights belong to."""
    layers: tuple[LayerSpec, ...]
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise BadInput(f"layout: schema_version {self.schema_version}; this version reads {SCHEMA_VERSION}.")
        if not self.layers:
            raise BadInput("layout: the model has no prunable layer.")

    @property
    def hash(self) -> str:
        """sha256 of the canonical JSON; plans, masks and scores carry it."""
        return sha256_json(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelLayout:
        """Read what `to_json` wrote.

        Raises: BadInput: a field is missing, unknown or of the wrong type.
        """
        return validated(cls, data, "layout: not a layout of optin-deploy", "Write it again with `optin score`.")


def check_layout(model: nn.Module, layout: object) -> None:
    """Refuse a layout of another model.

    Raises: BadInput.
    """
    if not isinstance(layout, ModelLayout):
        raise BadInput(f"layout is a {type(layout).__name__}; optin_deploy.resolve(model) makes one.")
    for layer in layout.layers:
        for branch in layer.branches:
            try:
                width = getattr(model.get_submodule(branch.output), "weight", torch.empty(0)).numel()
            except AttributeError:
                width = 0
            if width != branch.width * layer.hidden:
                raise BadInput(
                    f"the layout is of a {layout.model_class} with {branch.output} of {branch.width} columns, which "
                    f"this {type(model).__name__} has not: optin_deploy.resolve(model) makes its own."
                )
