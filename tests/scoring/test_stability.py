"""Stability of a ranking equals a simulation, predicted counts equal brute force, and `score` stops there."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from optin_deploy.scoring import unit_job as job_module
from optin_deploy.scoring import unit_parts
from optin_deploy.scoring.parts import MemoryStore
from optin_deploy.scoring.settings import ScoreSettings
from optin_deploy.scoring.stability import enough, rank_stability
from optin_deploy.scoring.subject import Subject
from optin_deploy.scoring.unit_job import score_units
from optin_deploy.scoring.unit_scores import UnitScores
from support.tiny_scoring import bert, one_thread, subject_of, text_batch

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)

UNITS = 400


def values(seed: int = 0) -> list[Tensor]:
    """Scores of two layers, over several orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(UNITS, generator=generator, dtype=torch.float64).exp().split(UNITS // 2))


def relative(share: float) -> list[Tensor]:
    return [share * layer for layer in values()]


def test_without_errors_the_ranking_is_stable() -> None:
    assert rank_stability(values(), [torch.zeros(UNITS // 2)] * 2) == 1.0
    assert rank_stability([torch.tensor([2.0])], [torch.tensor([1.0])]) == 1.0, "one unit has one rank"
    assert rank_stability([torch.zeros(0), torch.zeros(1)], [torch.zeros(0), torch.ones(1)]) == 1.0


def test_stability_falls_as_errors_grow() -> None:
    found = [rank_stability(values(), relative(share)) for share in (0.001, 0.01, 0.1, 0.3, 1.0, 10.0)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.9999
    assert found[-1] < 0.5


@pytest.mark.parametrize("share", [0.05, 0.2, 0.6])
def test_stability_is_spearmans_correlation_with_a_ranking_of_new_noise(share: float) -> None:
    rng = np.random.default_rng(3)
    score_, error = torch.cat(values()).numpy(), torch.cat(relative(share)).numpy()
    wanted = np.mean(
        [scipy.stats.spearmanr(score_, score_ + error * rng.standard_normal(UNITS)).statistic for _ in range(200)]
    )
    assert rank_stability(values(), relative(share)) == pytest.approx(wanted, abs=0.01)
    assert 1 - rank_stability(values(), relative(share)) == pytest.approx(1 - wanted, rel=0.1)


def test_units_of_all_layers_are_ranked_together() -> None:
    """Two layers apart by far: their own order is noise, but most pairs of units are certain."""
    scores, errors = [torch.ones(50), 1000 * torch.ones(50)], [torch.ones(50), torch.ones(50)]
    scores = [layer + torch.linspace(0, 1e-3, 50) for layer in scores]
    assert 0.6 < rank_stability(scores, errors) < 0.9
    assert abs(rank_stability(scores[:1], errors[:1])) < 0.2


def test_units_of_equal_score_without_errors_do_not_count_as_unstable() -> None:
    scores, errors = torch.cat([torch.zeros(3000), torch.rand(3000) + 1]), torch.zeros(6000)
    errors[3000:] = 1e-9
    assert rank_stability([scores], [errors]) > 0.99999


def test_the_same_question_has_the_same_answer() -> None:
    torch.manual_seed(1)
    first = rank_stability(values(), relative(0.2))
    torch.manual_seed(2)
    assert rank_stability(values(), relative(0.2)) == first


# --- how many draws are enough --------------------------------------------------------------------------------


def brute_force(share: float, now: int, most: int, target: float, *, finite: bool) -> int:
    for draws in range(now, most + 1):
        left = [1 / n - (1 / most if finite else 0) for n in (now, draws)]
        factor = math.sqrt(left[1] / left[0]) if now < most else 0.0
        if rank_stability(values(), relative(share * factor)) >= target:
            return draws
    return most


@pytest.mark.parametrize("finite", [False, True])
@pytest.mark.parametrize(
    ("share", "now", "most", "target"),
    [
        (0.1, 2, 40, 0.9),  # at once
        (0.4, 2, 40, 0.98),
        (0.9, 3, 60, 0.97),
        (0.9, 32, 50, 0.99),
        (5.0, 1, 9, 0.999),  # never, or at the last
        (5.0, 9, 9, 0.999),
        (5.0, 8, 9, 0.999),
    ],
)
def test_the_predicted_number_is_the_smallest_that_reaches_the_target(
    share: float, now: int, most: int, target: float, finite: bool
) -> None:
    found = enough(values(), relative(share), now, most, target, without_replacement=finite)
    assert found == brute_force(share, now, most, target, finite=finite)
    assert now <= found <= most


def test_errors_of_a_whole_population_are_nothing() -> None:
    """At `most` draws without replacement every target is met, so that the one before must be told apart."""
    assert enough(values(), relative(50.0), 2, 100, 1.0, without_replacement=True) == 100
    assert enough(values(), relative(0.3), 2, 100, 0.999, without_replacement=True) < 100


# --- the stop rule of `score_units` ---------------------------------------------------------------------------------


@cache
def subject(labels: int = 3) -> Subject:
    return subject_of(bert(labels=labels))


def scored(batches: Any = None, store: MemoryStore | None = None, **options: Any) -> UnitScores:
    settings = ScoreSettings(**options)
    return score_units(subject(), batches or [text_batch((4, 7, 5))], settings, kinds=("heads", "neurons"), store=store)


def ranking(found: UnitScores, units: str) -> float:
    return float(found.provenance["rank_stability"][units])


def same(found: UnitScores, other: UnitScores, kind: str) -> None:
    for group in subject().layout.groups:
        if group.kind == kind:
            torch.testing.assert_close(found.scores[group.name], other.scores[group.name], rtol=1e-12, atol=0)


def test_probes_are_added_until_the_ranking_of_neurons_is_stable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "ESTIMATES", 3)
    first = scored(probes=1)
    monkeypatch.setattr(job_module, "STABLE_NEURONS", 0.0)
    assert scored().provenance["probes"] == 1, "stable enough: the first round is the last"
    target = (1 + ranking(first, "neurons")) / 2
    monkeypatch.setattr(job_module, "STABLE_NEURONS", target)
    monkeypatch.setattr(job_module, "MOST_PROBES", 60)
    done = MemoryStore()
    found = scored(store=done)
    assert 1 < found.provenance["probes"] < 60
    # Each round takes further probes; those before are not taken again.
    rounds = sorted(tuple(map(int, name.split("-")[-2:])) for name in done.parts if name.startswith("sketch"))
    assert len(rounds) > 1
    assert [last for _, last in rounds] == [*(first for first, _ in rounds[1:]), found.provenance["probes"]]
    assert ranking(found, "neurons") >= target > ranking(first, "neurons")
    same(found, scored(probes=found.provenance["probes"]), "neurons")  # rounds add up to what one would have been


@pytest.mark.parametrize("samples", [3, 5, 12])
def test_the_first_round_takes_so_many_probes_that_there_are_enough_estimates(
    samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_module, "ESTIMATES", 12)
    monkeypatch.setattr(job_module, "STABLE_NEURONS", 0.0)
    assert scored([text_batch((4,) * samples)]).provenance["probes"] == math.ceil(12 / samples)


def test_a_ranking_that_never_is_stable_ends_at_the_most_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "ESTIMATES", 3)
    monkeypatch.setattr(job_module, "MOST_PROBES", 5)
    monkeypatch.setattr(job_module, "STABLE_NEURONS", 1.1)
    found = scored()
    assert found.provenance["probes"] == 5
    assert ranking(found, "neurons") < 1


def test_a_given_number_of_probes_is_taken_whatever_the_ranking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "STABLE_NEURONS", 1.1)
    assert scored(probes=2).provenance["probes"] == 2
    assert scored(probes=20).provenance["probes"] == 20, "more than are taken unasked, too"


def test_samples_under_masks_are_added_until_the_ranking_of_heads_is_stable(monkeypatch: pytest.MonkeyPatch) -> None:
    many = [text_batch((3, 7, 5, 4, 6, 2, 8, 3, 5, 4, 6, 7))]
    monkeypatch.setattr(job_module, "HEAD_SAMPLES", 2)
    monkeypatch.setattr(unit_parts, "HEAD_CHUNK", 3)
    first = scored(many, probes=1, head_samples=2)
    assert 0 < ranking(first, "heads") < 1
    target = (3 + ranking(first, "heads")) / 4
    monkeypatch.setattr(job_module, "STABLE_HEADS", target)
    found = scored(many, probes=1)
    assert 2 < found.provenance["masked_samples"] < 12
    assert ranking(found, "heads") >= target
    again = scored(many, probes=1, head_samples=found.provenance["masked_samples"])
    same(found, again, "heads")
    monkeypatch.setattr(job_module, "STABLE_HEADS", 1.0)
    whole = scored(many, probes=1)
    assert whole.provenance["masked_samples"] == 12
    assert ranking(whole, "heads") == 1
    assert scored(many, probes=1, head_samples=5).provenance["masked_samples"] == 5, "as many as asked for"
    assert scored(many, probes=1, head_samples=99).provenance["masked_samples"] == 12, "all there are"


def test_exact_output_terms_alone_need_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "ESTIMATES", 1)
    for classes, output_probes in ((3, 1), (12, 16)):
        settings = ScoreSettings(weighting="output")
        told = score_units(subject(classes), [text_batch((4, 7))], settings).provenance
        assert (told["probes"], told["output_probes"]) == (0, output_probes)
        assert (told["rank_stability"]["neurons"] == 1.0) == (classes == 3)
