"""One scoring of any network: when enough of its parts are done, and how they become scores."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice, pairwise

import torch
from torch import Tensor

from optin_deploy.common.arguments import checked, whole
from optin_deploy.common.progress import Progress, silent
from optin_deploy.errors import BadInput
from optin_deploy.feeds.rows import MASK, Batch
from optin_deploy.scoring.parts import MemoryStore, Part, Store, Worker, run_parts
from optin_deploy.scoring.settings import ScoreSettings
from optin_deploy.scoring.stability import STABLE_HEADS, STABLE_NEURONS, enough, rank_stability
from optin_deploy.scoring.subject import Subject
from optin_deploy.scoring.terms import Terms, balanced, combined, mean_scores, sampling_errors, sketch_errors
from optin_deploy.scoring.unit_parts import FIRST_PROBES, MASKED, MOST_PROBES, UnitParts
from optin_deploy.scoring.unit_scores import UnitScores
from optin_deploy.structure.groups import UnitGroup
from optin_deploy.structure.labels import KINDS

ESTIMATES = 4096
"""Samples x probes after which the first round ends: on MiniLM so many keep what exact scores keep, to 97%."""
HEAD_SAMPLES = 32
"""Samples of the first round on which the sketch masks few and large units."""


def score_units(
    subject: Subject,
    batches: Sequence[Batch],
    settings: ScoreSettings | None = None,
    *,
    kinds: Collection[str] | None = None,
    memory_budget: int | None = None,
    store: Store | None = None,
    worker: Worker | None = None,
    progress: Progress = silent,
) -> UnitScores:
    """Score every unit by how far removing it bends the network's trajectory and output (no labels, no training).

    Args:
        batches: calibration inputs by name, samples along the first axis; padding is marked by `attention_mask`.
        kinds: of the groups that are scored, see `structure.labels.KINDS`; None: all.
        memory_budget: bytes that scoring may take beyond the network; None: most of what is free.
        store: where finished parts are kept and found; None: in memory.
        worker: which share of the parts is this process's; None: all.
    Raises:
        BadInput: nothing to score or to score on, or a single sample does not fit the memory budget.
        NonFiniteActivation: the network puts out NaN or infinity.
        PartsLeft: this worker's share is done, but not all of it.
    Source: Khaki & Plataniotis, ICLR 2024 (arXiv 2403.17921).
    """
    settings = checked(settings, ScoreSettings, "settings") or ScoreSettings()
    if memory_budget is not None:
        memory_budget = whole(memory_budget, "memory_budget")
    with torch.no_grad():
        parts = UnitParts(
            subject=replace(subject, compared=settings.features.site),
            groups=_groups(subject, kinds),
            batches=_batches(subject, batches),
            settings=settings,
            memory_budget=memory_budget,
        )
        return UnitJob(parts, store or MemoryStore(), worker or Worker(), progress).scores()


@dataclass(frozen=True, eq=False)
class UnitJob:
    """What `score_units` was asked for."""

    parts: UnitParts
    store: Store
    worker: Worker
    progress: Progress

    def scores(self) -> UnitScores:
        """Do this worker's parts, more of them until the ranking is stable, and reduce all.

        Raises: PartsLeft.
        """
        return self._exact() if self.parts.settings.scorer == "exact" else self._sketch()

    def _exact(self) -> UnitScores:
        found = combined([self._run(self.parts.exact())])
        # Every part holds units of its own on the samples of its batch.
        samples = sum(len(next(iter(batch.values()))) for batch in self.parts.batches)
        return self._scores(
            None, replace(found, samples=samples, forward_seconds=found.forward_seconds * samples / found.samples)
        )

    def _sketch(self) -> UnitScores:
        settings, samples = self.parts.settings, len(self.parts.keys)
        ends = [settings.probes or min(FIRST_PROBES, -(-ESTIMATES // samples))]
        masked = min(samples, settings.head_samples or HEAD_SAMPLES) if self.parts.few else 0
        further = False
        while True:
            rounds = [self.parts.sketch(range(*some)) for some in pairwise([0, *ends])]
            results = iter(self._run([*chain(*rounds), *self.parts.masked(masked)], further=further))
            sketched = combined([list(islice(results, len(each))) for each in rounds])
            found = self._scores(combined([list(results)]) if masked else None, sketched)
            more, more_masked = ends[-1], masked
            for kind, scores, errors in self._pools(found):
                if kind in MASKED and settings.head_samples is None:
                    wanted = enough(scores, errors, masked, samples, STABLE_HEADS, without_replacement=True)
                    more_masked = max(more_masked, wanted)
                if kind not in MASKED and settings.probes is None:
                    more = max(more, enough(scores, errors, ends[-1], MOST_PROBES, STABLE_NEURONS))
            if (more, more_masked) == (ends[-1], masked):
                return found
            ends, masked, further = [*ends, more] if more > ends[-1] else ends, more_masked, True

    def _run(self, parts: Sequence[Part], *, further: bool = False) -> list[Terms]:
        return run_parts(parts, self.store, self.worker, self.progress, further=further)

    def _scores(self, masked: Terms | None, estimated: Terms) -> UnitScores:
        """Scores of few and large units from one set of sums and of all others from another, with where they came from.

        Args: masked: of the sketch; None: all are from the other ones.
        """
        parts, exact = self.parts, self.parts.settings.scorer == "exact"
        shares, weight = self._weights(estimated)
        scores, errors = {}, {}
        for group, share in shares.items():
            name, one = group.name, (group, share, weight)
            if masked is not None and group in masked.sums:
                scores[name], errors[name] = mean_scores(masked, *one), sampling_errors(masked, *one, len(parts.keys))
            else:
                scores[name], errors[name] = mean_scores(estimated, *one), sketch_errors(estimated, *one)
            if exact:
                errors[name] = torch.zeros_like(scores[name])
        both = [terms for terms in (masked, estimated) if terms is not None]
        seconds = sum(terms.seconds for terms in both)
        plain = both[0]  # forwards under slopes record, maybe in a faster type
        forward_seconds = plain.forward_seconds / plain.samples * estimated.samples
        found = UnitScores(scores, errors, parts.subject.hash, {})
        provenance = {
            **asdict(parts.settings),
            "kinds": sorted({group.kind for group in parts.groups}),
            "reading": parts.subject.reading.facts,
            "values": len(parts.subject.features),
            "samples": estimated.samples,
            "masked_samples": estimated.samples if exact else 0 if masked is None else masked.samples,
            "probes": None if exact else estimated.probes,
            "output_probes": None if exact else estimated.output_probes,
            "pass_dtype": None if exact else str(parts.dtype).removeprefix("torch."),
            "kl_weight": weight,
            "rank_stability": {kind: rank_stability(some, their) for kind, some, their in self._pools(found)},
            "seconds": round(seconds, 3),
            "forward_equivalents": round(seconds / forward_seconds, 2),
            "memory": {
                **asdict(parts.memory),
                "rows": parts.memory.rows,
                "peak_bytes": max(terms.peak_bytes for terms in both),
            },
        }
        return replace(found, provenance=provenance)

    def _weights(self, terms: Terms) -> tuple[dict[UnitGroup, float], float]:
        """What the trajectory term of each group counts, and lambda, what the output term counts.

        `paper`: the plain sum over all features behind a group. `normalised`: divided by their number, so that a unit
        does not gain by standing early. `output`: how far the network's output moves, alone.
        """
        settings, groups = self.parts.settings, self.parts.groups
        if settings.weighting == "output":
            return dict.fromkeys(groups, 0.0), 1.0
        shares = dict.fromkeys(groups, 1.0)
        if settings.weighting == "normalised":
            shares = {group: 1.0 / max(1, len(self.parts.subject.behind(group))) for group in groups}
        return shares, balanced(terms, shares.items()) if settings.kl_weight is None else settings.kl_weight

    def _pools(self, found: UnitScores) -> Iterator[tuple[str, list[Tensor], list[Tensor]]]:
        """Scores and errors of all groups of a kind: what is ranked together."""
        for kind in dict.fromkeys(group.kind for group in self.parts.groups):
            names = [group.name for group in self.parts.groups if group.kind == kind]
            yield kind, [found.scores[name] for name in names], [found.errors[name] for name in names]


def _groups(subject: Subject, kinds: Collection[str] | None) -> tuple[UnitGroup, ...]:
    """Groups of these kinds.

    Raises: BadInput: there are none.
    """
    unknown = [kind for kind in kinds or () if kind not in KINDS]
    if unknown:
        raise BadInput(f"--units {unknown[0]!r}: possible are {', '.join(KINDS)}.")
    groups = tuple(group for group in subject.layout.groups if kinds is None or group.kind in kinds)
    if not groups:
        there = ", ".join(sorted({group.kind for group in subject.layout.groups})) or "none"
        raise BadInput(f"this network has no units to score of the kinds {', '.join(kinds or KINDS)}; it has: {there}.")
    return groups


def _batches(subject: Subject, given: Sequence[Batch]) -> tuple[Batch, ...]:
    """What the network takes of each batch, and its padding, on the network's device.

    Raises: BadInput: there are none, an input is missing, or inputs differ in rows.
    """
    ports = subject.structure.network.inputs
    fixed = [port.shape[0] for port in ports if port.shape and port.shape[0] != 1 and isinstance(port.shape[0], int)]
    if fixed:
        raise BadInput(
            f"this network takes {fixed[0]} samples at once, no more and no less, but units are scored for each sample "
            "alone. Export it with a free batch, or for one sample."
        )
    names, found = [port.name for port in ports], []
    for number, batch in enumerate(given):
        missing = [name for name in names if name not in batch]
        if missing:
            raise BadInput(f"calibration batch {number} has no {missing[0]!r}; give all inputs: {', '.join(names)}.")
        one = {name: batch[name] for name in dict.fromkeys((*names, MASK)) if name in batch}
        rows = {name: len(value) if value.dim() else 0 for name, value in one.items()}
        if 0 in rows.values() or len(set(rows.values())) > 1:
            counts = ", ".join(f"{name} {count}" for name, count in rows.items())
            raise BadInput(
                f"calibration batch {number} needs one row a sample, at least one, in every input: {counts}."
            )
        found.append({name: value.to(subject.program.device) for name, value in one.items()})
    if not found:
        raise BadInput("no calibration batches were given; give at least one sample, inputs by name.")
    return tuple(found)
