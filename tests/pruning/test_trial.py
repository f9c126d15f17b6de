"""A trial judges a whole plan as it would be cut, by samples that its compensation has not seen."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from optin_deploy.cutting.graph import cut
from optin_deploy.errors import BadInput
from optin_deploy.feeds.feeds import Halves
from optin_deploy.feeds.rows import Feeds, rows_of
from optin_deploy.network.probe import probes_of
from optin_deploy.network.read import read
from optin_deploy.network.run import Program
from optin_deploy.planning.plan import NetworkPlan, plan_of
from optin_deploy.pruning.networks import Found
from optin_deploy.pruning.pruning import make, ready_of
from optin_deploy.pruning.ready import Ready
from optin_deploy.pruning.trial import unseen_error
from optin_deploy.structure.branches import bypassed
from optin_deploy.structure.find import find
from support.own_regression import distance, images, judged_rows, texts
from support.tiny_scoring import Batch, bare_bert, bert, dinov2, one_thread, rows, vit

pytestmark = pytest.mark.usefixtures("by_torchscript")

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)

CASES: dict[str, Callable[[], tuple[nn.Module, list[Batch]]]] = {
    "bert: post-LN": lambda: (bert(), texts()),
    "bare bert": lambda: (bare_bert(), texts()),
    "vit: pre-LN": lambda: (vit(), images()),
    "dinov2: gated FFN": lambda: (dinov2(gated=True), images()),
}


def feeds(batches: list[Batch]) -> Feeds:
    return Feeds(tuple(batches), (None,) * sum(map(rows_of, batches)), "the tests")


def ready(model: nn.Module, batches: list[Batch]) -> Ready:
    network = read(model)
    probes = probes_of(network)
    return ready_of(Found(find(network, probes), tuple(probes)), Halves(feeds(batches), None))


def plan_for(of: Ready) -> NetworkPlan:
    """Every other unit of every branch, and none of the first attention's."""
    groups = [group for group in of.layout.groups if group.kind in ("heads", "neurons")]
    keep = {group.name: tuple(range(0, group.units, 2)) for group in groups}
    assert groups[0].name in bypassed(of.layout)
    return plan_of(of.layout, {**keep, groups[0].name: ()})


class Runs(nn.Module):
    """A network in the place of a module."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program

    def forward(self, **batch: Tensor) -> Mapping[str, Tensor]:
        names = [port.name for port in self.program.network.inputs]
        outputs = self.program({name: batch[name] for name in names}).outputs
        return Outputs(outputs)


class Outputs(dict[str, Tensor]):
    """As transformers give them."""

    __getattr__ = dict.__getitem__


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_error_is_that_of_a_model_compensated_on_the_other_samples(case: str, weighted: bool) -> None:
    model, batches = CASES[case]()
    of = ready(model, batches)
    plan, weights = plan_for(of), of.token_weights() if weighted else None
    of.know_token_weights(weights)
    found = unseen_error(of, plan)
    fitting, judging = (judged_rows(batches, judged) for judged in (False, True))
    other = ready(model, fitting)
    if weights is not None:
        singles = {
            name: [one[i : i + 1] for one in every for i in range(len(one))] for name, every in weights.of.items()
        }
        some = {name: tuple(one for i, one in enumerate(every) if i % 4 != 3) for name, every in singles.items()}
        weights = replace(weights, of=some)
    other.know_token_weights(weights)
    smaller = make(other, plan).network
    assert found == pytest.approx(distance(Runs(Program(smaller)), model, judging), rel=1e-5)
    assert found > 1e-6


def test_without_compensation_the_model_is_only_cut() -> None:
    model, batches = bert(), texts()
    of = ready(model, batches)
    plan = plan_for(of)
    found = unseen_error(of, plan, compensation=False)
    smaller = cut(of.layout, plan.keep)
    assert found == pytest.approx(distance(Runs(Program(smaller)), model, judged_rows(batches, True)), rel=1e-5)
    assert found != pytest.approx(unseen_error(of, plan), rel=1e-3)


@pytest.mark.slow
def test_batches_of_one_sample_do_not_enter() -> None:
    """One batch in four has no sample left to fit."""
    model = bert()
    singles: list[Batch] = [rows(batch, [i]) for batch in texts() for i in range(len(batch["input_ids"]))]
    errors = [unseen_error(of, plan_for(of)) for of in (ready(model, batches) for batches in (texts(), singles))]
    assert errors[0] == pytest.approx(errors[1], rel=1e-6)


def test_of_many_samples_some_fit_that_are_spread_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = bert(), texts()
    of = ready(model, batches)
    of.know_token_weights(None)
    plan, fitting = plan_for(of), judged_rows(batches, False)
    half = ready(model, fitting[1::2])
    half.know_token_weights(None)
    monkeypatch.setattr("optin_deploy.pruning.trial.MOST_FITTED", len(fitting) // 2)
    expected = distance(Runs(Program(make(half, plan).network)), model, judged_rows(batches, True))
    assert len(fitting) % 2 == 0
    assert unseen_error(of, plan) == pytest.approx(expected, rel=1e-5)


def test_too_few_samples_are_refused() -> None:
    batch = {name: torch.as_tensor(value)[:3] for name, value in texts()[0].items()}
    of = ready(copy.deepcopy(bert()), [batch])
    with pytest.raises(BadInput, match="too few"):
        unseen_error(of, plan_for(of))
