"""A trial judges a whole plan as it would be cut, by samples that its compensation has not seen."""

from __future__ import annotations

import pytest
import torch
from test_compensate import CASES, Case, texts
from test_curves import distance, judged_rows
from tiny_scoring import Batch, bare_bert, bert, one_thread, rows
from torch import nn

from optin_deploy.arch.resolve import resolve
from optin_deploy.cost.macs import mac_cost
from optin_deploy.errors import BadInput
from optin_deploy.plan import Masks, PruningPlan
from optin_deploy.pruning import cut
from optin_deploy.search import make_plan
from optin_deploy.token_weights import measure_token_weights
from optin_deploy.trial import unseen_error

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)


def plan_of(model: nn.Module) -> PruningPlan:
    """Every other unit of every branch, and none of the first attention's."""
    layout = resolve(model)
    heads, neurons = (
        [tuple(i % 2 == 0 for i in range(getattr(layer, kind))) for layer in layout.layers]
        for kind in ("heads", "neurons")
    )
    heads[0] = (False,) * len(heads[0])
    return make_plan(Masks(tuple(heads), tuple(neurons), layout.hash), layout, mac_cost(model, layout, seq_len=8))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("case", [*CASES, "bare bert"])
def test_the_error_is_that_of_a_model_compensated_on_the_other_samples(case: str, weighted: bool) -> None:
    chosen: Case | None = CASES[case]() if case in CASES else None
    model, batches = (bare_bert(), texts(0)) if chosen is None else (chosen[0], chosen[3](0))
    layout, plan = resolve(model), plan_of(model)
    fitting, judging = (judged_rows(batches, judged, 4) for judged in (False, True))
    weights = measure_token_weights(model, layout, batches) if weighted else None
    found = unseen_error(model, layout, plan, batches, token_weights=weights)
    if weights is not None:
        singles = [[one[i : i + 1] for one in layer for i in range(len(one))] for layer in weights]
        weights = [[one for i, one in enumerate(layer) if i % 4 != 3] for layer in singles]
    smaller = cut(model, layout, plan, fitting, token_weights=weights).model
    assert found == pytest.approx(distance(smaller, model, judging), rel=1e-5)
    assert found > 1e-6


def test_without_compensation_the_model_is_only_cut() -> None:
    model, batches = bert(), texts(0)
    found = unseen_error(model, resolve(model), plan_of(model), batches, compensation=False)
    smaller = cut(model, resolve(model), plan_of(model), batches, compensation=False).model
    assert found == pytest.approx(distance(smaller, model, judged_rows(batches, True, 4)), rel=1e-5)


def test_batches_of_one_sample_do_not_enter() -> None:
    """One batch in four has no sample left to fit."""
    model = bert()
    singles: list[Batch] = [rows(batch, [i]) for batch in texts(0) for i in range(len(batch["input_ids"]))]
    errors = [unseen_error(model, resolve(model), plan_of(model), batches) for batches in (texts(0), singles)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-6)


def test_too_few_samples_are_refused() -> None:
    batch = {name: torch.as_tensor(value)[:3] for name, value in texts(0)[0].items()}
    model = bert()
    with pytest.raises(BadInput, match="too few"):
        unseen_error(model, resolve(model), plan_of(model), [batch][:1])
