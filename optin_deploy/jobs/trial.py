"""What a plan does to the outputs, on calibration samples that its compensation has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from optin_deploy.data.rows import Batch, rows_of
from optin_deploy.jobs.pruning import Ready, make
from optin_deploy.judging import joined, judged_samples, samples_of
from optin_deploy.network.graph import Network
from optin_deploy.network.run import Program
from optin_deploy.planning.plan import NetworkPlan
from optin_deploy.progress import Progress, silent
from optin_deploy.scoring.losses import output_distance
from optin_deploy.scoring.subject import Subject, valid_of


def unseen_error(ready: Ready, plan: NetworkPlan, *, compensation: bool = True, progress: Progress = silent) -> float:
    """Mean distance of the smaller network's outputs to the dense ones, as error curves measure it, of a whole plan.

    Every fourth calibration sample, at most 128 of them, judge what the others fitted.
    Raises: BadInput: too few samples. NotProven: our fault.
    """
    batches = ready.rows.calibration.batches
    marks = judged_samples(batches)
    rest = [~mark for mark in marks]
    fitting = tuple(samples_of(batch, mark) for batch, mark in zip(batches, rest, strict=True) if mark.any())
    weights = ready.token_weights() if compensation else None
    rows = replace(ready.rows.calibration, batches=fitting, labels=(None,) * sum(map(rows_of, fitting)))
    part = replace(ready, rows=replace(ready.rows, calibration=rows))
    part.know_token_weights(None if weights is None else weights.chosen(rest))
    smaller = make(part, plan, compensation=compensation, progress=progress).network
    with torch.inference_mode():
        return distance(ready.subject, smaller, joined(batches, marks))


def distance(subject: Subject, smaller: Network, batches: Sequence[Batch]) -> float:
    """Mean distance of the outputs of a smaller network to those of the dense one."""
    program, total = Program(smaller), 0.0
    names = [port.name for port in smaller.inputs]
    for batch in batches:
        feeds, valid = {name: batch[name] for name in names}, valid_of(batch)
        dense, found = (subject.reading.read(each(feeds).outputs, valid) for each in (subject.program, program))
        total += float(output_distance(dense, found.values).sum())
    return total / sum(map(rows_of, batches))
