"""Exact scores, one partial forward a unit, made here or read from the result of an earlier run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.scoring.clock import Clock
from benchmarks.scoring.rivals import KINDS, Importance
from optin_deploy.common.environment import environment
from optin_deploy.common.progress import Progress
from optin_deploy.errors import BadInput
from optin_deploy.feeds.rows import Batch
from optin_deploy.files.storage import read_json
from optin_deploy.scoring.masking_units import masked_terms
from optin_deploy.scoring.subject import Subject
from optin_deploy.scoring.terms import Terms, combined, mean_scores
from optin_deploy.structure.groups import UnitGroup

Units = Mapping[UnitGroup, Sequence[int]]


@dataclass(frozen=True)
class Exact:
    """Exact scores of all heads and of the seeded neurons."""

    scores: dict[str, list[float]]
    """Scores by name of group."""
    seconds: float
    """Seconds for the scored units."""
    all_forwards: float
    """Extrapolated to all neurons (they are sampled evenly from the layers), in dense forwards."""
    date: str
    """Date on which the scores were made."""

    @property
    def importance(self) -> Importance:
        """The scores as tensors."""
        return {name: torch.tensor(values, dtype=torch.float64) for name, values in self.scores.items()}


def exactly(subject: Subject, batches: Sequence[Batch], units: Units, kl_weight: float, clock: Clock) -> Exact:
    """Score these units one by one."""

    def work(some: Units, progress: Progress) -> Terms:
        with torch.no_grad():
            return combined([[masked_terms(subject, batches, some, progress=progress)]])

    scores: dict[str, list[float]] = {}
    seconds = whole = 0.0
    for kind in KINDS:
        some = {group: chosen for group, chosen in units.items() if group.kind == kind}
        terms, spent = clock(f"exact, {kind}", partial(work, some))
        scores |= {g.name: mean_scores(terms, g, 1.0, kl_weight)[list(c)].tolist() for g, c in some.items()}
        seconds += spent
        whole += spent * sum(group.units for group in some) / sum(map(len, some.values()))
    return Exact(scores, seconds, whole / clock.forward, str(environment()["date"]))


def earlier(path: Path, settings: Mapping[str, int]) -> Exact:
    """Exact scores of a result file.

    Raises: BadInput: of other samples or units.
    """
    data = read_json(path, "Give a scoring_accuracy.json.")
    if data["settings"] != settings:
        raise BadInput(f"--exact {path}: made with {data['settings']}, not {settings}.")
    return Exact(**data["exact"])
