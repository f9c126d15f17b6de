"""What a plan does to the outputs, on calibration samples that its compensation has not seen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from optin_deploy.common.progress import Progress, silent
from optin_deploy.feeds.rows import Batch, rows_of
from optin_deploy.network.graph import Network
from optin_deploy.network.run import Program
from optin_deploy.planning.plan import NetworkPlan
from optin_deploy.pruning.pruning import make
from optin_deploy.pruning.ready import Ready
from optin_deploy.quality.held_out import joined, judged_samples
from optin_deploy.scoring.losses import Readout, output_distance
from optin_deploy.scoring.subject import Subject, read_tokens

MOST_FITTED = 512
"""Samples that a repair is tried on; with more it does better, but not one plan more than another."""


def unseen_error(ready: Ready, plan: NetworkPlan, *, compensation: bool = True, progress: Progress = silent) -> float:
    """Mean distance of the smaller network's outputs to the dense ones, as error curves measure it, of a whole plan.

    Every fourth calibration sample, at most 128 of them, judge what others fitted, at most `MOST_FITTED` of them.
    Raises: BadInput: too few samples. NotProven: our fault.
    """
    fitting = _fitting(judged_samples(ready.rows.calibration.batches))
    part = ready.some(fitting, weighted=compensation)
    return error_of(ready, make(part, plan, compensation=compensation, progress=progress).network)


def _fitting(judging: Sequence[Tensor]) -> Tensor:
    """Which samples fit, (rows,): of those that do not judge some that are spread over all lengths."""
    rest = ~torch.cat(list(judging))
    every = max(1, -(-int(rest.sum()) // MOST_FITTED))
    return rest & (rest.cumsum(0) % every == 0)


def error_of(ready: Ready, smaller: Network) -> float:
    """Mean distance of a smaller network's outputs to the dense ones, on the calibration samples that judge.

    Raises: BadInput: too few samples.
    """
    batches, program = ready.rows.calibration.batches, Program(smaller)
    judged = joined(batches, judged_samples(batches))
    with torch.inference_mode():
        dense = ready.kept("judged", lambda: [_read(ready.subject, ready.subject.program, batch) for batch in judged])
        found = (_read(ready.subject, program, batch) for batch in judged)
        total = sum(float(output_distance(one, other.values).sum()) for one, other in zip(dense, found, strict=True))
    return total / sum(map(rows_of, judged))


def _read(subject: Subject, program: Program, batch: Batch) -> Readout:
    feeds = {port.name: batch[port.name] for port in program.network.inputs}
    return subject.reading.read(program(feeds).outputs, read_tokens(batch))
