"""The library in one call: score, search, compensate, rewrite."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from optin_deploy.arch.resolve import resolve, served
from optin_deploy.arch.spec import ArchSpec
from optin_deploy.arguments import checked, whole
from optin_deploy.budget import Limits
from optin_deploy.compensate import refit
from optin_deploy.cost.macs import mac_cost
from optin_deploy.cost.params import count_params, param_cost
from optin_deploy.curves import error_curves
from optin_deploy.data.batches import make_batches
from optin_deploy.errors import BadInput
from optin_deploy.guard import alone, check_module, working
from optin_deploy.judging import judged_samples
from optin_deploy.layout import ModelLayout, check_layout
from optin_deploy.masking import Batch
from optin_deploy.plan import PruningPlan
from optin_deploy.progress import Progress, silent
from optin_deploy.proof import prove
from optin_deploy.pruned import PrunedModel
from optin_deploy.rewrite.torch import rewrite_torch
from optin_deploy.rewrite.verify import masked_vs_rewritten
from optin_deploy.scoring import ScoreSettings, score
from optin_deploy.search import (
    check_align,
    check_plan,
    check_search,
    check_units,
    default_align,
    make_plan,
    search_within,
)
from optin_deploy.storage import sha256_tensors
from optin_deploy.token_weights import TokenWeights, measure_token_weights

if TYPE_CHECKING:
    from optin_deploy.jobs.modules import PrunedModule


def prune(
    model: nn.Module,
    batches: Any,
    *,
    flops: float | None = None,
    params: float | None = None,
    size: int | None = None,
    seq_len: int = 128,
    align: int | None = None,
    allocation: str = "curves",
    settings: ScoreSettings | None = None,
    compensation: bool = True,
    spec: ArchSpec | None = None,
    seed: int = 0,
) -> PrunedModel | PrunedModule:
    """Make a smaller copy of a trained model, without retraining; the input is untouched.

        pruned = optin_deploy.prune(model, batches, flops=0.6)
        pruned.save("smaller")
        model = optin_deploy.load("smaller")

    Families of `optin_deploy.arch.table` are cut module by module, and can be saved and loaded as transformers models;
    any other module by the graph that it is exported to: then only `model`, `network` and `plan` are returned.
    Args:
        model: a transformers model or any torch module, dense.
        batches: calibration inputs, a list, a generator or a DataLoader of batches: dicts of tensors, arrays or lists
            by the names of the model's inputs, or tuples in their order. Labels are left out.
        flops: share of the dense MACs to keep, in (0, 1]; 0.6 if nothing is limited.
        params: share of the dense parameters to keep, in (0, 1].
        size: most bytes of all weights in float32.
        seq_len: tokens at which MACs are counted (images: the model's own size).
        align: FFN widths in multiples of this; default: 16, or the whole width where that is less.
        allocation: where to cut: `curves`, `uniform` or `paper`; see `search_within`.
        settings: how units are scored; default: `ScoreSettings(seed=seed)`.
        compensation: re-solve the kept projections in closed form.
        spec: an own architecture row.
        seed: of the random projections.
    Raises: BadInput and its kinds; see errors.py.
    """
    allowed, seed = Limits(flops, params, size), whole(seed, "seed")
    settings = checked(settings, ScoreSettings, "settings") or ScoreSettings(seed=seed)
    seq_len, compensation = whole(seq_len, "seq_len"), bool(checked(compensation, bool, "compensation"))
    check_search(16 if align is None else align, allocation)
    check_module(model)
    if spec is None and not served(model):
        from optin_deploy.jobs.modules import prune_module

        how = {"align": align, "allocation": allocation, "settings": settings, "compensation": compensation}
        with alone(model):
            return prune_module(model, batches, limits=allowed, seed=seed, **how)  # type: ignore[arg-type]
    with working(model):
        layout = resolve(model, spec)
        align = default_align(layout) if align is None else align
        check_align(align, layout)
        given = make_batches(model, batches)
        if allocation == "curves":
            judged_samples(given)  # enough of them
        prove(model, layout, given)
        cost = mac_cost(model, layout, seq_len=seq_len)
        limits = allowed.within(cost, param_cost(model, layout))
        check_units(limits, layout, cost, align=align, allocation=allocation)
        scores = score(model, layout, given, settings)
        weights = None
        if compensation or allocation == "curves":
            weights = measure_token_weights(model, layout, given, seed=seed)
        curves = error_curves(model, layout, scores, given, token_weights=weights) if allocation == "curves" else None
        masks = search_within(scores, layout, limits, align=align, allocation=allocation, curves=curves)
        plan = check_plan(make_plan(masks, layout, cost))
        return cut(model, layout, plan, given, compensation=compensation, token_weights=weights)


def cut(
    model: nn.Module,
    layout: ModelLayout,
    plan: PruningPlan,
    batches: Sequence[Batch],
    *,
    compensation: bool = True,
    token_weights: TokenWeights | None = None,
    preprocessor: Any = None,
    progress: Progress = silent,
) -> PrunedModel:
    """Compensate, rewrite, and prove that the rewritten model is the masked one.

    Args: token_weights: what each token of these batches counts in the compensation; None = all the same.
    Raises: ParityFailure: the smaller model differs from the masked one.
    """
    started = time.perf_counter()
    with working(model):
        check_layout(model, layout)
        if not isinstance(plan, PruningPlan):
            raise BadInput(f"plan is a {type(plan).__name__}; optin_deploy.search.make_plan makes one.")
        plan.check(layout)
        batches = make_batches(model, batches)
        smaller = rewrite_torch(model, layout, plan)
        error = masked_vs_rewritten(model, smaller, layout, plan, batches[0])
        if compensation:
            refit(model, smaller, layout, plan, batches, token_weights=token_weights, progress=progress)
            refitted = masked_vs_rewritten(model, smaller, layout, plan, batches[0], refitted=True)
            error = max(error, refitted)
    report = {
        "dense_weights": sha256_tensors(model.state_dict()),
        "kept": plan.kept,
        "prunable_kept": plan.prunable_kept,
        "params": {"dense": count_params(model), "pruned": count_params(smaller)},
        "parity": {"masked_vs_rewritten": error},
        "compensation": compensation,
        "seconds": round(time.perf_counter() - started, 3),
    }
    return PrunedModel(smaller, plan, layout, report, preprocessor)
