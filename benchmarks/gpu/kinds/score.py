"""Kind `score`: seconds of the sketch and of the exact scorer on this device, and in forward-equivalents."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from benchmarks.gpu.cells import Cell
from benchmarks.gpu.precision import matmul_mode
from benchmarks.gpu.workbench import SEED, Dense, Workbench
from optin_deploy.masking import Batch, inference
from optin_deploy.scoring import Scores, ScoreSettings, exact_terms, score
from optin_deploy.scoring.terms import attention_branches, ffn_branches

EXACT_BATCHES = 2
"""Batches on which the exact scorer is timed; every further batch is the same work."""
UNITS_A_BRANCH = 16
"""Units of each branch that the exact scorer masks: all layers, as later ones take shorter forwards, and so many that
they share forwards as in earnest."""
WARM_UP = ScoreSettings(probes=1, head_samples=1, seed=SEED)


def score_times(cell: Cell, bench: Workbench) -> dict[str, Any]:
    """Time both scorers on random calibration data.

    Returns: seconds of one dense forward over the set, of the sketch (with the probes and samples that it took until
        its ranking was stable), of the exact scorer (extrapolated: it says from what), and both as
        forward-equivalents.
    """
    dense = bench.dense(cell.model)
    batches = [bench.inputs(cell, seed=SEED + i) for i in range(cell.samples // cell.batch)]

    def seconds(work: Callable[[], object]) -> float:
        bench.synchronize()
        start = time.perf_counter()
        work()
        bench.synchronize()
        return time.perf_counter() - start

    with matmul_mode(cell.precision):
        seconds(lambda: forward(dense, batches[:1]))  # warm-up
        forward_s = median(seconds(lambda: forward(dense, batches)) for _ in range(3))
        score(dense.model, dense.layout, batches[:1], WARM_UP)
        scores: list[Scores] = []
        sketch_s = seconds(lambda: scores.append(score(dense.model, dense.layout, batches, ScoreSettings(seed=SEED))))
        exact = exact_seconds(dense, batches, seconds)
    return {
        "samples": len(batches) * cell.batch,
        "seed": SEED,
        "forward_s": forward_s,
        "sketch_s": sketch_s,
        "sketch_forwards": sketch_s / forward_s,
        "sketch_took": {name: scores[0].provenance[name] for name in ("probes", "output_probes", "head_samples")},
        **exact,
        "exact_forwards": exact["exact_s"] / forward_s,
    }


def forward(dense: Dense, batches: list[dict[str, torch.Tensor]]) -> None:
    """One inference pass over all batches."""
    with torch.inference_mode():
        for batch in batches:
            dense.model(**batch)


def exact_seconds(
    dense: Dense, batches: list[dict[str, torch.Tensor]], seconds: Callable[[Callable[[], object]], float]
) -> dict[str, Any]:
    """The exact scorer on few units and batches, scaled to all; what every batch needs anyway is counted apart."""
    branches = (*attention_branches(dense.layout), *ffn_branches(dense.layout))
    some: list[Batch] = [*batches[:EXACT_BATCHES]]
    units = {branch: range(min(UNITS_A_BRANCH, branch.units)) for branch in branches}

    def run(chosen: dict[Any, range]) -> Callable[[], object]:
        return lambda: exact_terms(dense.model, dense.layout, some, chosen)

    with inference(dense.model), torch.no_grad():
        seconds(run(units))  # warm-up
        basis_s = seconds(run({}))
        some_s = seconds(run(units))
    measured, total = sum(map(len, units.values())), sum(branch.units for branch in branches)
    whole_s = basis_s + max(some_s - basis_s, 0.0) * total / measured
    return {
        "exact_s": whole_s * len(batches) / len(some),
        "exact_extrapolated_from": {"units": measured, "of_units": total, "batches": len(some), "seconds": some_s},
    }
