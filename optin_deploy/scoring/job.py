"""One scoring: which parts it has, when enough of them are done, and how they become scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain, islice, pairwise
from typing import Any

import torch
from torch import nn

from optin_deploy.layout import Branch, ModelLayout
from optin_deploy.masking import Batch, rows_of
from optin_deploy.progress import Progress
from optin_deploy.scoring.exact import exact_terms
from optin_deploy.scoring.memory import Memory, measured, micro_batches, peak_bytes
from optin_deploy.scoring.noise import drawn, sample_keys
from optin_deploy.scoring.parts import Part, Store, Worker, run_parts
from optin_deploy.scoring.scores import Scores
from optin_deploy.scoring.settings import ScoreSettings
from optin_deploy.scoring.sketch import pass_dtype, sketch_terms
from optin_deploy.scoring.stability import STABLE_HEADS, STABLE_NEURONS, enough, rank_stability
from optin_deploy.scoring.terms import (
    Terms,
    attention_branches,
    combined,
    ffn_branches,
    mean_scores,
    sampling_errors,
    sketch_errors,
    weights_of,
)

ESTIMATES = 4096
"""Samples x probes after which the first round ends: on MiniLM so many keep what exact scores keep, to 97%."""
FIRST_PROBES, MOST_PROBES = 4, 16
"""Of the first round at most, and of all: how many more there are, the noise that was seen decides."""
PROBES_PER_OUTPUT_PROBE = 4
"""The output term is a tenth of a score on average: it takes fewer probes."""
HEAD_SAMPLES, HEAD_CHUNK = 32, 8
"""Samples of the first round on which the sketch masks heads, and those of one part."""
UNITS_A_PART = 128
"""Exactly scored neurons of one part: little is lost with a process."""


@dataclass(frozen=True)
class Job:
    """What `score` was asked for."""

    model: nn.Module
    layout: ModelLayout
    batches: tuple[Batch, ...]
    settings: ScoreSettings
    memory_budget: int | None
    store: Store
    worker: Worker
    progress: Progress

    def scores(self) -> Scores:
        """Do this worker's parts, more of them until the ranking is stable, and reduce all.

        Raises: PartsLeft.
        """
        return self._exact() if self.settings.scorer == "exact" else self._sketch()

    def _exact(self) -> Scores:
        found = combined([self._run(self._exact_parts())])
        rows = sum(map(rows_of, self.batches))
        # Every part holds units of its own on the samples of its batch.
        found = replace(found, samples=rows, forward_seconds=found.forward_seconds * rows / found.samples)
        return self._told(found, found)

    def _sketch(self) -> Scores:
        settings, samples = self.settings, len(self._keys)
        ends = [settings.probes or min(FIRST_PROBES, -(-ESTIMATES // samples))]
        heads = min(samples, settings.head_samples or HEAD_SAMPLES)
        further = False
        while True:
            rounds = [self._sketch_parts(range(*some)) for some in pairwise([0, *ends])]
            results = iter(self._run([*chain(*rounds), *self._head_parts(heads)], further=further))
            sketched = combined([list(islice(results, len(each))) for each in rounds])
            found = self._told(combined([list(results)]), sketched)
            more, more_heads = ends[-1], heads
            if settings.probes is None:
                more = enough(found.neurons, found.neuron_errors, more, MOST_PROBES, STABLE_NEURONS)
            if settings.head_samples is None:
                more_heads = enough(
                    found.heads, found.head_errors, heads, samples, STABLE_HEADS, without_replacement=True
                )
            if (more, more_heads) == (ends[-1], heads):
                return found
            ends, heads, further = [*ends, more] if more > ends[-1] else ends, more_heads, True

    def _told(self, masked: Terms, estimated: Terms) -> Scores:
        """Scores of heads from one set of sums and of neurons from another, with where they came from."""
        settings, exact = self.settings, self.settings.scorer == "exact"
        weights = weights_of(settings.weighting, settings.kl_weight, self.layout, estimated)
        heads, neurons = mean_scores(masked, self._heads, weights), mean_scores(estimated, self._ffns, weights)
        head_errors = sampling_errors(masked, self._heads, weights, len(self._keys))
        neuron_errors = (
            [torch.zeros_like(t) for t in neurons] if exact else sketch_errors(estimated, self._ffns, weights)
        )
        both = (estimated,) if exact else (masked, estimated)
        seconds = sum(terms.seconds for terms in both)
        provenance = {
            **asdict(settings),
            "samples": estimated.samples,
            "head_samples": masked.samples,
            "probes": None if exact else estimated.probes,
            "output_probes": None if exact else estimated.output_probes,
            "pass_dtype": None if exact else str(pass_dtype(next(self.model.parameters()))).removeprefix("torch."),
            "kl_weight": weights.output,
            "rank_stability": {
                "heads": rank_stability(heads, head_errors),
                "neurons": rank_stability(neurons, neuron_errors),
            },
            "seconds": round(seconds, 3),
            "forward_equivalents": round(seconds / estimated.forward_seconds, 2),
            "memory": {
                **asdict(self._memory),
                "rows": self._memory.rows,
                "peak_bytes": max(terms.peak_bytes for terms in both),
            },
        }
        return Scores(
            tuple(heads), tuple(neurons), self.layout.hash, provenance, tuple(head_errors), tuple(neuron_errors)
        )

    # --- parts; their names are those of their files ---

    def _run(self, parts: Sequence[Part], *, further: bool = False) -> list[Terms]:
        return run_parts(parts, self.store, self.worker, self.progress, further=further)

    def _exact_parts(self) -> list[Part]:
        parts = []
        for number, batch in enumerate(self.batches):
            parts.append(
                self._exact_part(f"exact-{number:04}-heads", [batch], {b: range(b.units) for b in self._heads})
            )
            for index, branch in enumerate(self._ffns):
                for first in range(0, branch.units, UNITS_A_PART):
                    some = range(first, min(first + UNITS_A_PART, branch.units))
                    name = f"exact-{number:04}-layer-{index:03}-neurons-{first:06}"
                    parts.append(self._exact_part(name, [batch], {branch: some}))
        return parts

    def _head_parts(self, samples: int) -> list[Part]:
        units = {branch: range(branch.units) for branch in self._heads}
        bounds = pairwise([*range(0, samples, HEAD_CHUNK), samples])
        return [
            self._exact_part(f"heads-{first:04}-{last:04}", drawn(self.batches, self._keys[first:last]), units)
            for first, last in bounds
        ]

    def _exact_part(self, name: str, batches: Sequence[Batch], units: Mapping[Branch, range]) -> Part:
        def work(progress: Progress) -> Terms:
            rows = self._memory.rows
            if self.settings.features.across:  # tokens are drawn over the whole batch: it stays in one piece
                fitting = list(batches)
                self._memory.check_rows(max(map(rows_of, batches)))
            else:
                fitting = micro_batches(batches, rows)
            found = exact_terms(self.model, self.layout, fitting, units, rows=rows, progress=progress, **self._how)
            return replace(found, peak_bytes=peak_bytes(self._device))

        return Part(name, sum(map(rows_of, batches)) * sum(map(len, units.values())), work)

    def _sketch_parts(self, probes: range) -> list[Part]:
        return [self._sketch_part(number, batch, probes) for number, batch in enumerate(self.batches)]

    def _sketch_part(self, number: int, batch: Batch, probes: range) -> Part:
        some, of_output = self._projections(probes)

        def work(progress: Progress) -> Terms:
            fitting = micro_batches([batch], self._memory.rows)
            found = sketch_terms(
                self.model, self.layout, fitting, probes=some, output_probes=of_output, progress=progress, **self._how
            )
            return replace(found, peak_bytes=peak_bytes(self._device))

        name = f"sketch-{number:04}-probes-{probes.start}-{probes.stop}"
        return Part(name, rows_of(batch) * 2 * (1 + len(some) + len(of_output)), work)

    def _projections(self, probes: range) -> tuple[range, range]:
        """Of the trajectory and of the output."""
        if self.settings.weighting == "output":
            return range(0), probes
        return probes, range(*(-(-end // PROBES_PER_OUTPUT_PROBE) for end in (probes.start, probes.stop)))

    # --- what all parts share ---

    @property
    def _how(self) -> dict[str, Any]:
        return {"features": self.settings.features, "seed": self.settings.seed}

    @property
    def _heads(self) -> tuple[Branch, ...]:
        return attention_branches(self.layout)

    @property
    def _ffns(self) -> tuple[Branch, ...]:
        return ffn_branches(self.layout)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @cached_property
    def _keys(self) -> list[int]:
        """Of the different samples, in an order that does not depend on where they stand."""
        return sorted({key for batch in self.batches for key in sample_keys(batch)})

    @cached_property
    def _memory(self) -> Memory:
        """What one sample takes, seen on the longest."""
        widest = max(self.batches, key=lambda batch: next(iter(batch.values()))[0].numel())
        row = [{name: value[:1] for name, value in widest.items()}]
        first, (some, of_output) = self._heads[0], self._projections(range(self.settings.probes or MOST_PROBES))

        def one_sample() -> None:
            # Two, one by one: what is left of the last sample or unit is still there when the next one is in work.
            exact_terms(self.model, self.layout, row * 2, {first: range(first.units)[:2]}, rows=1, **self._how)
            if self.settings.scorer == "sketch":
                sketch_terms(self.model, self.layout, row, probes=some, output_probes=of_output, **self._how)

        return measured(one_sample, self._device, self.memory_budget)
