"""Kind `pair`: the dense model and its pruned variants, open side by side in one engine, with parity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.cells import Cell
from benchmarks.gpu.engines import Launch, open_engine
from benchmarks.gpu.timing import back_to_back, single_calls, speedup, times
from benchmarks.gpu.workbench import SEED, Variant, Workbench
from optin_deploy.exporters.precisions import TOLERANCES
from optin_deploy.measuring.device_clock import timer_for
from optin_deploy.measuring.stats import throughput
from optin_deploy.runtimes.device import float32_mode


def pair(cell: Cell, bench: Workbench) -> dict[str, Any]:
    """Time and compare.

    Returns: tokens, seed, ok (parity of all variants within the limit), and for each variant its times, parity
        and, if pruned, plan, ideal and measured speed-up.
    """
    pruned = bench.variants(cell)
    models = {"dense": bench.dense(cell.model)} | {name: v.model for name, v in pruned.items()}
    inputs = bench.inputs(cell)
    references = {name: reference(model, inputs) for name, model in models.items()}
    timer = timer_for(bench.device)
    how: dict[str, Any] = {"timed_s": cell.timed_s / 2, "blocks": cell.blocks, "seed": SEED}
    with ExitStack() as stack:
        launches = {
            name: stack.enter_context(open_engine(cell.engine, model, inputs, cell.precision))
            for name, model in models.items()
        }
        stretches, calls = back_to_back(launches, timer, **how), single_calls(launches, timer, **how)
        checks = {name: check_parity(references[name], launch, cell.precision) for name, launch in launches.items()}
    variants = {
        name: {**times(stretches[name]), **times(calls[name], "call_"), "parity": checks[name]} for name in models
    }
    for name, found in variants.items():
        found["throughput"] = throughput(found["p50_ms"], batch=cell.batch)
        if name in pruned:
            found |= {
                **describe(pruned[name]),
                **speedup(stretches["dense"], stretches[name], seed=SEED),
                **speedup(calls["dense"], calls[name], "call_", seed=SEED),
            }
    return {
        "tokens": bench.cost(cell.model, cell.seq).tokens,
        "seed": SEED,
        "ok": all(check["ok"] for check in checks.values()),
        "variants": variants,
    }


def reference(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Eager float32 output of these weights, TF32 off, (batch, tokens, hidden)."""
    with float32_mode(), torch.inference_mode():
        states: Tensor = model(**inputs).last_hidden_state
    return states


def check_parity(expected: Tensor, launch: Launch, precision: str) -> dict[str, Any]:
    """What the timed engine puts out, against the reference; over the limit it says so and stays in the results.

    Returns: error (None: NaN, infinity or another shape), limit, ok.
    """
    with torch.inference_mode():
        launch().fill_(math.nan)  # an engine that writes nothing, or somewhere else, is found out
        if expected.device.type == "cuda":
            torch.cuda.synchronize()  # engines with a stream of their own must not overtake the fill
        error = parity_error(expected, launch())
    limit = TOLERANCES[precision]
    return {"error": error if math.isfinite(error) else None, "limit": limit, "ok": error <= limit}


def parity_error(expected: Tensor, found: Tensor) -> float:
    """max |expected - found| / max(1, max |expected|), infinite where either holds no number or the shapes differ."""
    if expected.shape != found.shape:
        return float("inf")
    difference = (expected.float() - found.float()).abs().max()
    error = float(difference / expected.float().abs().max().clamp(min=1))
    return error if error == error else float("inf")


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
