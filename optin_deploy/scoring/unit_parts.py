"""The parts of one scoring of any network: their names, what each does, and what all of them share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch

from optin_deploy.common.progress import Progress, silent
from optin_deploy.errors import BadInput, NonFiniteActivation
from optin_deploy.feeds.rows import Batch, rows_of
from optin_deploy.scoring.masking_units import masked_terms
from optin_deploy.scoring.memory import Memory, measured, micro_batches, peak_bytes
from optin_deploy.scoring.noise import drawn, sample_keys
from optin_deploy.scoring.parts import Part
from optin_deploy.scoring.precision import pass_dtype
from optin_deploy.scoring.settings import ScoreSettings
from optin_deploy.scoring.slopes import Projections, slope_terms
from optin_deploy.scoring.stability import rank_correlation
from optin_deploy.scoring.subject import Subject
from optin_deploy.scoring.terms import OUTPUT, TRAJECTORY, Terms
from optin_deploy.structure.groups import UnitGroup

MASKED = ("heads", "groups", "queries")
"""Kinds of few and large units: to remove one is a large step, which no slope foretells, so the sketch masks them."""
FIRST_PROBES, MOST_PROBES = 4, 16
"""Most probes of the first round, and of all rounds; the observed noise decides how many follow the first round."""
PROBES_PER_OUTPUT_PROBE = 4
"""The output term is a tenth of a score on average: it takes fewer probes."""
HEAD_CHUNK = 8
"""Samples of one part on which few and large units are masked."""
UNITS_A_PART = 128
"""Exactly scored units of one part: little is lost with a process."""
ALIKE = 0.998
"""Rank correlation of one sample's units in a faster type with those in the network's own: of most networks .9995."""


@dataclass(frozen=True, eq=False)
class UnitParts:
    """What is scored, and on what; the names of its parts are those of their files."""

    subject: Subject
    groups: tuple[UnitGroup, ...]
    batches: tuple[Batch, ...]
    settings: ScoreSettings
    memory_budget: int | None

    def exact(self) -> list[Part]:
        """Units in the order of the layout, so many a part, of one batch."""
        every = [(group, unit) for group in self.groups for unit in range(group.units)]
        parts = []
        for number, batch in enumerate(self.batches):
            for first in range(0, len(every), UNITS_A_PART):
                units: dict[UnitGroup, list[int]] = {}
                for group, unit in every[first : first + UNITS_A_PART]:
                    units.setdefault(group, []).append(unit)
                parts.append(self._masking(f"exact-{number:04}-units-{first:06}", [batch], units))
        return parts

    def masked(self, samples: int) -> list[Part]:
        """Few and large units on so many samples."""
        units = {group: range(group.units) for group in self.few}
        bounds = pairwise([*range(0, samples, HEAD_CHUNK), samples]) if samples else ()
        return [
            self._masking(f"masked-{first:04}-{last:04}", drawn(self.batches, self.keys[first:last]), units)
            for first, last in bounds
        ]

    def sketch(self, probes: range) -> list[Part]:
        """All units by these random projections, a batch a part."""
        return [self._slopes(number, batch, probes) for number, batch in enumerate(self.batches)]

    def _masking(self, name: str, batches: Sequence[Batch], units: Mapping[UnitGroup, Sequence[int]]) -> Part:
        def work(progress: Progress) -> Terms:
            rows, chosen = self.memory.rows, self.settings.features
            if chosen.across:  # tokens are drawn over the whole batch: it stays in one piece
                fitting = list(batches)
                self.memory.check_rows(max(map(rows_of, batches)))
            else:
                fitting = micro_batches(batches, rows)
            seed = self.settings.seed
            found = masked_terms(self.subject, fitting, units, features=chosen, seed=seed, rows=rows, progress=progress)
            return replace(found, peak_bytes=peak_bytes(self._device))

        return Part(name, sum(map(rows_of, batches)) * sum(map(len, units.values())), work)

    def _slopes(self, number: int, batch: Batch, probes: range) -> Part:
        some = self._projections(probes)

        def work(progress: Progress) -> Terms:
            found = self._sloped(micro_batches([batch], self.memory.rows), some, self.dtype, progress)
            return replace(found, peak_bytes=peak_bytes(self._device))

        name = f"sketch-{number:04}-probes-{probes.start}-{probes.stop}"
        return Part(name, rows_of(batch) * 2 * (1 + len(some.trajectory) + len(some.output)), work)

    def _sloped(
        self, batches: Sequence[Batch], some: Projections, dtype: torch.dtype, progress: Progress = silent
    ) -> Terms:
        return slope_terms(
            self.subject,
            batches,
            some,
            groups=self.groups,
            features=self.settings.features,
            dtype=None if dtype == self.subject.dtype else dtype,
            progress=progress,
        )

    def _projections(self, probes: range) -> Projections:
        """Projections of the trajectory and of the output."""
        seed = self.settings.seed
        if self.settings.weighting == "output":
            return Projections(range(0), probes, seed)
        output = range(*(-(-end // PROBES_PER_OUTPUT_PROBE) for end in (probes.start, probes.stop)))
        return Projections(probes, output, seed)

    @cached_property
    def few(self) -> tuple[UnitGroup, ...]:
        """Groups whose units the sketch masks one by one."""
        return tuple(group for group in self.groups if group.kind in MASKED)

    @cached_property
    def keys(self) -> list[int]:
        """Keys of the distinct samples, in an order that does not depend on their places."""
        return sorted({key for batch in self.batches for key in sample_keys(batch)})

    @cached_property
    def dtype(self) -> torch.dtype:
        """What passes multiply in: a faster type than the network's own, if it ranks one sample's units as that does.

        Mostly it does; where masks are the least number of float32, or values are large, it may not.
        """
        own = self.subject.dtype
        fastest = pass_dtype(torch.empty((), dtype=own, device=self._device))
        if fastest == own:
            return own
        some = self._projections(range(FIRST_PROBES))
        row = TRAJECTORY if some.trajectory else OUTPUT
        exact = self._sloped(self._sample, some, own)
        try:
            quick = self._sloped(self._sample, some, fastest)
        except (BadInput, NonFiniteActivation):  # an operator does not mix it with others, or masks overflow
            return own
        exactly, quickly = (torch.cat([terms.sums[g][row] for g in self.groups]) for terms in (exact, quick))
        alike = bool(torch.isfinite(quickly).all()) and rank_correlation(exactly, quickly) >= ALIKE
        return fastest if alike else own

    @cached_property
    def memory(self) -> Memory:
        """What one sample takes, seen on the largest."""
        first, *others = self.groups
        chosen, seed = self.settings.features, self.settings.seed
        dtype = self.dtype if self.settings.scorer == "sketch" else None  # outside of what is measured, which is slow

        def one_sample() -> None:
            # Two, one by one: what is left of the last sample, unit or probe is still there when the next is in work.
            units = {first: range(first.units)[:2], **{group: range(0) for group in others}}
            masked_terms(self.subject, self._sample * 2, units, features=chosen, seed=seed, rows=1)
            if dtype is not None:
                some = self._projections(range(self.settings.probes or MOST_PROBES))
                self._sloped(self._sample, some, dtype)

        return measured(one_sample, self._device, self.memory_budget)

    @cached_property
    def _sample(self) -> list[Batch]:
        """One of the largest."""
        widest = max(self.batches, key=lambda batch: sum(value[0].numel() for value in batch.values()))
        return [{name: value[:1] for name, value in widest.items()}]

    @property
    def _device(self) -> torch.device:
        return self.subject.program.device
