"""Kind `score`: seconds of the sketch and of the exact scorer on this device, and in forward-equivalents."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.cells import Cell
from benchmarks.gpu.engines import Skipped
from benchmarks.gpu.workbench import SEED, Workbench
from optin_deploy.runtimes.device import float32_mode

Batch = dict[str, Tensor]
KINDS = ("heads", "neurons")
EXACT_BATCHES = 2
"""Batches on which the exact scorer is timed; every further batch is the same work."""
UNITS_A_BRANCH = 16
"""Units of each branch that the exact scorer masks: all layers, as later ones take shorter forwards, and so many that
they share forwards as in earnest."""


def score_times(cell: Cell, bench: Workbench) -> dict[str, Any]:
    """Time both scorers on random calibration data.

    Returns: seconds of one dense forward over the set, of the sketch (with the probes and samples that it took until
        its ranking was stable), of the exact scorer (extrapolated: it says from what), and both as
        forward-equivalents.
    Raises: Skipped: the packages that read graphs are not here.
    """
    try:
        from optin_deploy.network.read_torch import read_module
        from optin_deploy.pruning.networks import find_in
        from optin_deploy.scoring.masking_units import masked_terms
        from optin_deploy.scoring.settings import ScoreSettings
        from optin_deploy.scoring.subject import Subject
        from optin_deploy.scoring.unit_job import score_units
    except ImportError as err:
        raise Skipped(f"kind score: {err}; bring onnx, onnx_ir and pydantic along.") from err
    model = bench.dense(cell.model)
    batches = [bench.inputs(cell, seed=SEED + i) for i in range(cell.samples // cell.batch)]
    network = read_module(model, {name: value[:2] for name, value in batches[0].items()}, dynamo=False)
    subject = Subject.make(find_in(network).layout, device=bench.device)
    seconds = partial(elapsed, bench)

    def score(some: list[Batch], **how: int) -> Any:
        return score_units(subject, some, ScoreSettings(seed=SEED, **how), kinds=KINDS)  # type: ignore[arg-type]

    with float32_mode(tf32=cell.precision == "tf32"):
        seconds(lambda: forward(model, batches[:1]))  # warm-up
        forward_s = median(seconds(lambda: forward(model, batches)) for _ in range(3))
        score(batches[:1], probes=1, head_samples=1)
        scores: list[Any] = []
        sketch_s = seconds(lambda: scores.append(score(batches)))
        some = batches[:EXACT_BATCHES]
        units = {
            group: range(min(UNITS_A_BRANCH, group.units)) for group in subject.layout.groups if group.kind in KINDS
        }

        def masked(chosen: Mapping[Any, range]) -> None:
            with torch.no_grad():
                masked_terms(subject, some, chosen)

        seconds(lambda: masked(units))  # warm-up
        some_s = seconds(lambda: masked(units))
    measured, total = sum(map(len, units.values())), sum(group.units for group in units)
    exact_s = some_s * total / measured * len(batches) / len(some)
    taken = ("probes", "output_probes", "masked_samples")
    return {
        "samples": len(batches) * cell.batch,
        "seed": SEED,
        "forward_s": forward_s,
        "sketch_s": sketch_s,
        "sketch_forwards": sketch_s / forward_s,
        "sketch_took": {name: scores[0].provenance[name] for name in taken},
        "exact_s": exact_s,
        "exact_extrapolated_from": {"units": measured, "of_units": total, "batches": len(some), "seconds": some_s},
        "exact_forwards": exact_s / forward_s,
    }


def elapsed(bench: Workbench, work: Callable[[], object]) -> float:
    """Seconds of a piece of work, until the device has finished it."""
    bench.synchronize()
    start = time.perf_counter()
    work()
    bench.synchronize()
    return time.perf_counter() - start


def forward(model: nn.Module, batches: Sequence[Batch]) -> None:
    """One inference pass over all batches."""
    with torch.inference_mode():
        for batch in batches:
            model(**batch)
