"""Scores of the units of any network, group by group, with where they came from; stored as one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optin_deploy.common.stored import Stored
from optin_deploy.errors import BadInput, PlanMismatch
from optin_deploy.files.storage import parsed_json, read_metadata, read_tensors, write_tensors
from optin_deploy.network.hashing import network_hash
from optin_deploy.structure.groups import Layout

HINT = "Score the network again with `optin score`."
TENSORS = ("scores", "errors")


@dataclass(frozen=True, eq=False)
class UnitScores:
    """Importance of every unit; higher = keep."""

    scores: Mapping[str, Tensor]
    """Scores by name of group, in the order of the layout, (units,) in float64, not negative."""
    errors: Mapping[str, Tensor]
    """Standard error of each score, of the same shapes; 0 where nothing was estimated."""
    network: str
    """`network.hashing.network_hash` of what was scored."""
    provenance: Mapping[str, Any]
    """Scorer, weighting, samples, projections, lambda, seed, cost: everything needed to make them again."""

    def __post_init__(self) -> None:
        if list(self.scores) != list(self.errors):
            raise BadInput(f"scores and their errors are of different groups. {HINT}")
        for name, values in self.scores.items():
            errors = self.errors[name]
            if values.dim() != 1 or values.shape != errors.shape:
                raise BadInput(
                    f"{name}: scores have shape {tuple(values.shape)} and errors {tuple(errors.shape)}; both need one "
                    f"number a unit. {HINT}"
                )
            for what, numbers in (("scores", values), ("errors", errors)):
                if numbers.dtype != torch.float64 or not bool((torch.isfinite(numbers) & (numbers >= 0)).all()):
                    raise BadInput(f"{name}: {what} hold a negative or non-finite number, or none in float64. {HINT}")

    def check(self, layout: Layout) -> None:
        """Make sure that the scores belong to a network.

        Raises: PlanMismatch: they were made for another one. BadInput: its groups or their units are others.
        """
        network = layout.structure.network
        found = network_hash(network)
        if found != self.network:
            raise PlanMismatch(
                f"the scores were made for the network {self.network[:12]}, but {network.source} is {found[:12]}: its "
                "operators or weights are others. Score this network with `optin score`."
            )
        for name, values in self.scores.items():
            group = layout.by_name.get(name)
            if group is None or group.units != len(values):
                fault = "is not there" if group is None else f"has {group.units} units"
                raise BadInput(f"scores hold {len(values)} units of the group {name!r}, which {fault}. {HINT}")

    def write(self, path: Path) -> None:
        """Write a scores.safetensors, whole or not at all."""
        about = _About(self.network, tuple(self.scores), self.provenance)
        tensors = {f"{what}.{name}": values for what in TENSORS for name, values in getattr(self, what).items()}
        write_tensors(path, tensors, {"about": json.dumps(about.to_json(), allow_nan=False)})

    @classmethod
    def read(cls, path: Path) -> UnitScores:
        """Read what `write` stored.

        Raises: BadInput: absent, damaged, edited, or of another version.
        """
        tensors, metadata = read_tensors(path, HINT), read_metadata(path, HINT)
        if "about" not in metadata:
            raise BadInput(f"{path} holds no scores of this version: nothing says where they came from. {HINT}")
        data = parsed_json(metadata["about"], f"{path}: its description", HINT, ours=True)
        about = _About.from_json(data, f"{path}: ")
        if set(tensors) != {f"{what}.{name}" for what in TENSORS for name in about.groups}:
            raise BadInput(f"{path}: its tensors are not those of the groups that it names. {HINT}")
        scores, errors = ({name: tensors[f"{what}.{name}"] for name in about.groups} for what in TENSORS)
        try:
            return cls(scores, errors, about.network, about.provenance)
        except BadInput as err:
            raise BadInput(f"{path}: {err}") from err


@dataclass(frozen=True)
class _About(Stored):
    """What a file says beside its tensors; two editions of scores by layer came before."""

    schema_version = 3
    what = "the scores of a network"
    hint = HINT

    network: str
    groups: tuple[str, ...]
    provenance: Mapping[str, Any]

    def __post_init__(self) -> None:
        if len(set(self.groups)) < len(self.groups):
            raise BadInput("it names a group twice")
