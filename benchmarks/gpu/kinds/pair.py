"""Kind `pair`: the dense model and its pruned variants, open side by side in one engine, with parity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.cells import Cell
from benchmarks.gpu.engines import Run, open_engine
from benchmarks.gpu.precision import LIMITS, matmul_mode, parity_error
from benchmarks.gpu.timing import compare, measure
from benchmarks.gpu.workbench import SEED, Variant, Workbench
from optin_deploy.measuring.device_clock import timer_for


def pair(cell: Cell, bench: Workbench) -> dict[str, Any]:
    """Time and compare.

    Returns: tokens, seed, ok (parity of all variants within the limit), and for each variant its times, parity
        and, if pruned, plan, ideal and measured speed-up.
    """
    pruned = bench.variants(cell)
    models = {"dense": bench.dense(cell.model)} | {name: v.model for name, v in pruned.items()}
    inputs = bench.inputs(cell)
    references = {name: reference(model, inputs) for name, model in models.items()}
    with ExitStack() as stack:
        stack.enter_context(matmul_mode(cell.precision))
        runs = {
            name: stack.enter_context(open_engine(cell.engine, model, inputs, cell.precision))
            for name, model in models.items()
        }
        samples = measure(runs, timer_for(bench.device), timed_s=cell.timed_s, blocks=cell.blocks, seed=SEED)
        checks = {name: check_parity(references[name], run, cell.precision) for name, run in runs.items()}
    variants = {name: {**samples[name].to_json(cell.batch), "parity": checks[name]} for name in models}
    for name, variant in pruned.items():
        variants[name] |= {**describe(variant), **compare(samples["dense"], samples[name], seed=SEED)}
    return {
        "tokens": bench.cost(cell.model, cell.seq).tokens,
        "seed": SEED,
        "ok": all(check["ok"] for check in checks.values()),
        "variants": variants,
    }


def reference(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Eager float32 output of these weights, TF32 off, (batch, tokens, hidden)."""
    with matmul_mode("fp32"), torch.inference_mode():
        states: Tensor = model(**inputs).last_hidden_state
    return states


def check_parity(expected: Tensor, run: Run, precision: str) -> dict[str, Any]:
    """What the timed engine puts out, against the reference; over the limit it says so and stays in the results.

    Returns: error (None: NaN, infinity or another shape), limit, ok.
    """
    with torch.inference_mode():
        run().fill_(math.nan)  # an engine that writes nothing, or somewhere else, is found out
        if expected.device.type == "cuda":
            torch.cuda.synchronize()  # engines with a stream of their own must not overtake the fill
        error = parity_error(expected, run())
    limit = LIMITS[precision]
    return {"error": error if math.isfinite(error) else None, "limit": limit, "ok": error <= limit}


def describe(variant: Variant) -> dict[str, Any]:
    """What was cut: units a layer, share of MACs, hash, ideal speed-up."""
    plan = variant.plan
    return {
        "plan_hash": plan.hash,
        "macs_kept": variant.kept,
        "ideal": 1 / variant.kept,
        "heads": [*map(len, plan.heads)],
        "neurons": [*map(len, plan.neurons)],
    }
