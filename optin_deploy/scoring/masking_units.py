"""The OPTIN score as published, on any network: mask one unit, run what lies behind it, measure how its path bends.

    score(u) = sum over features k behind u of D(F_k, F_k with u masked) + lambda * output distance

Only what lies downstream of a group's sites runs again; several units share a run, each on its own copy of the samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from optin_deploy.common.progress import Progress, silent
from optin_deploy.feeds.rows import Batch, rows_of
from optin_deploy.scoring.copies import copies
from optin_deploy.scoring.dense_run import DenseBatch, dense_run
from optin_deploy.scoring.features import trajectory_distance
from optin_deploy.scoring.losses import output_distance
from optin_deploy.scoring.memory import micro_batches
from optin_deploy.scoring.settings import ALL_TOKENS, Features
from optin_deploy.scoring.subject import Subject
from optin_deploy.scoring.terms import Terms
from optin_deploy.structure.groups import UnitGroup

TOKENS_A_RUN = {"cpu": 4096}
"""Units share a run until it holds this many tokens: enough to fill the device's matrix products."""
MOST_TOKENS = 65536
"""The same on a GPU."""


def masked_terms(
    subject: Subject,
    batches: Sequence[Batch],
    units: Mapping[UnitGroup, Sequence[int]],
    *,
    features: Features = ALL_TOKENS,
    seed: int = 0,
    rows: int | None = None,
    progress: Progress = silent,
) -> Terms:
    """Score the given units of the given groups on all batches; other units stay 0.

    Args:
        seed: of the draw of tokens, if `features` asks for one.
        rows: most samples times units in one run, for memory; None = no limit.
    Source: Khaki & Plataniotis, ICLR 2024, section 3.
    """
    terms = Terms.zeros(units)
    needs = {name for group in units for name in subject.cones[group.name].needs}
    if len(subject.reading.outputs) > 1:  # one may change alone
        needs |= {*subject.reading.outputs}
    parts = micro_batches(batches, 1) if subject.alone else batches
    done, total = 0, len(parts) * sum(map(len, units.values()))
    for batch in parts:
        dense = dense_run(subject, batch, features, seed, watch=needs)
        base = _Base(subject, dense, {**dense.values.watched, **subject.fed(batch)}, rows_of(batch))
        terms.samples += base.samples
        terms.forward_seconds += dense.seconds
        most = units_at_once(subject, dense, base.samples, rows)
        for group, wanted in units.items():
            for chunk in _chunks(wanted, most):
                terms.sums[group][:, chunk] += sums_of(*base.apart(group, chunk))
                progress(done := done + len(chunk), total)
    return terms


def units_at_once(subject: Subject, dense: DenseBatch, samples: int, rows: int | None) -> int:
    """Units that share a run: so many that it fills the device, and that samples times units stay below `rows`."""
    if subject.alone:
        return 1
    tokens = max((len(tokens.valid.flatten()) for tokens in dense.tokens.values()), default=samples)
    full = max(1, TOKENS_A_RUN.get(subject.program.device.type, MOST_TOKENS) // tokens)
    return full if rows is None else max(1, min(full, rows // samples))


def _chunks(units: Sequence[int], most: int) -> Iterable[list[int]]:
    """Split units into as few chunks as possible, about equal in size."""
    runs = -(-len(units) // most)
    size = -(-len(units) // max(1, runs))
    return (list(units[start : start + size]) for start in range(0, len(units), max(1, size)))


class _Base:
    """The dense run of one batch, and runs of it in which single units are absent."""

    def __init__(self, subject: Subject, dense: DenseBatch, values: Mapping[str, Tensor], samples: int) -> None:
        self.samples = samples
        self._subject, self._dense, self._values = subject, dense, values
        self._grams = {f.value: dense.gram(f, dense.values.watched[f.value]) for f in subject.features}

    def apart(self, group: UnitGroup, units: Sequence[int]) -> tuple[Tensor, Tensor]:
        """How far each unit's absence moves features and output, (units, samples) each."""
        subject, dense, times = self._subject, self._dense, len(units)
        cone, behind = subject.cones[group.name], subject.behind(group)
        kept = torch.ones(times, group.units, device=subject.program.device)
        kept[torch.arange(times), list(units)] = 0
        bent = subject.program(
            copies(subject.structure, {name: self._values[name] for name in cone.needs}, times),
            masks=subject.masks(group, kept.repeat_interleave(self.samples, 0)),
            watch=[feature.value for feature in behind],
            cone=cone,
        )
        moved = changed = torch.zeros(times, self.samples, device=subject.program.device)
        if behind:
            grams = [dense.gram(f, bent.watched[f.value], times) for f in behind]
            weight = dense.tokens[behind[0].value].weight
            moved = weight * trajectory_distance([self._grams[f.value] for f in behind], grams)
        if any(name in bent.outputs for name in subject.reading.outputs):
            valid = None if dense.valid is None else dense.valid.repeat(times, 1)
            others = [name for name in subject.reading.outputs if name not in bent.outputs]
            same = {name: self._values[name].repeat(times, 1, *[1] * (self._values[name].dim() - 2)) for name in others}
            readout = subject.read({**bent.outputs, **same}, valid)
            changed = output_distance(dense.readout, readout.values)
        return moved, changed


def sums_of(moved: Tensor, changed: Tensor) -> Tensor:
    """Sums of D, O, D^2, O^2 and D O over the samples, (5, units), in float64."""
    d, o = moved.double().cpu(), changed.double().cpu()
    both = d * o if d.shape == o.shape else torch.zeros_like(d)  # one D a batch: no samples to compare
    return torch.stack([x.sum(1) for x in (d, o, d.square(), o.square(), both)])
