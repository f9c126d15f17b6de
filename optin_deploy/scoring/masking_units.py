"""The OPTIN score as published, on any network: mask one unit, run what lies behind it, measure how its path bends.

    score(u) = sum over features k behind u of D(F_k, F_k with u masked) + lambda * output distance

Only what lies downstream of a group's sites runs again; several units share a run, each on its own copy of the samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from optin_deploy.masking import Batch, rows_of
from optin_deploy.progress import Progress, silent
from optin_deploy.scoring.features import ALL_TOKENS, Features, trajectory_distance
from optin_deploy.scoring.losses import output_distance
from optin_deploy.scoring.memory import micro_batches
from optin_deploy.scoring.subject import Dense, Subject, dense_run
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
    done, total = 0, len(batches) * sum(map(len, units.values()))
    parts = micro_batches(batches, 1) if subject.alone else batches
    for batch in parts:
        count = rows_of(batch)
        dense = dense_run(subject, batch, features, seed)
        terms.samples += count
        terms.forward_seconds += dense.seconds
        times = units_at_once(subject, dense, count, rows)
        many = {name: _repeat(value, times, count) for name, value in batch.items()}
        needs = {name for group in units for name in subject.cones[group.name].needs}
        values = {**subject.run(many, watch=needs).watched, **subject.fed(many)}
        for group, wanted in units.items():
            for start in range(0, len(wanted), times):
                chunk = list(wanted[start : start + times])
                moved, changed = _apart(subject, group, chunk, dense, values, many, times)
                terms.sums[group][:, chunk] += sums_of(moved, changed)
                progress(done := done + len(chunk), total * len(parts) // len(batches))
    return terms


def units_at_once(subject: Subject, dense: Dense, count: int, rows: int | None) -> int:
    """Units that share a run of `count` samples: so many that it fills the device, and that samples times units stay
    below `rows`."""
    if subject.alone:
        return 1
    tokens = max((len(tokens.valid.flatten()) for tokens in dense.tokens.values()), default=count)
    full = max(1, TOKENS_A_RUN.get(subject.program.device.type, MOST_TOKENS) // tokens)
    return full if rows is None else max(1, min(full, rows // count))


def _repeat(value: Tensor, times: int, count: int) -> Tensor:
    return value.repeat(times, *(1,) * (value.dim() - 1)) if len(value) == count else value


def _apart(
    subject: Subject,
    group: UnitGroup,
    chunk: Sequence[int],
    dense: Dense,
    values: Mapping[str, Tensor],
    many: Batch,
    times: int,
) -> tuple[Tensor, Tensor]:
    """How far each unit's absence moves features and output, (units, samples) each."""
    count = rows_of(many) // times
    kept = torch.ones(times, group.units, device=subject.program.device)
    kept[torch.arange(len(chunk)), list(chunk)] = 0
    masks = subject.masks(group, kept.repeat_interleave(count, 0))
    behind = subject.behind(group)
    cone = subject.cones[group.name]
    bent = subject.program(
        {name: values[name] for name in cone.needs},
        masks=masks,
        watch=[feature.value for feature in behind],
        cone=cone,
    )
    grams = [dense.grams[feature.value] for feature in behind]
    moved = torch.zeros(times, count, device=subject.program.device)
    if behind:
        weight = dense.tokens[behind[0].value].weight
        moved = weight * trajectory_distance(grams, [dense.gram(f, bent.watched[f.value], times) for f in behind])
    output = subject.reading.output
    if output not in bent.outputs:
        return moved[: len(chunk)], torch.zeros(len(chunk), count)
    valid = None if dense.valid is None else dense.valid.repeat(times, 1)
    readout = subject.reading.read({output: bent.outputs[output]}, valid)
    return moved[: len(chunk)], output_distance(dense.readout, readout.values)[: len(chunk)]


def sums_of(moved: Tensor, changed: Tensor) -> Tensor:
    """Sums of D, O, D^2, O^2 and D O over the samples, (5, units), in float64."""
    d, o = moved.double().cpu(), changed.double().cpu()
    both = d * o if d.shape == o.shape else torch.zeros_like(d)  # one D a batch: no samples to compare
    return torch.stack([x.sum(1) for x in (d, o, d.square(), o.square(), both)])
