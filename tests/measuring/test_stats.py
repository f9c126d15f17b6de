"""The interval covers what it should; percentiles and throughput have the right units."""

from __future__ import annotations

import numpy as np
import pytest

from optin_deploy.errors import BadInput
from optin_deploy.measuring.stats import bootstrap_ci, percentile, throughput


def test_interval_covers_the_true_ratio_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    true_ratio, trials = 1.7, 400
    covered = 0
    for trial in range(trials):
        logs = np.log(true_ratio) + 0.05 * rng.standard_normal(12)
        low, high = bootstrap_ci(logs, resamples=1000, seed=trial)
        covered += low <= true_ratio <= high
    assert 0.925 <= covered / trials <= 0.975  # 0.95, and its standard error is 0.011


def test_interval_of_many_replicates_is_the_normal_one() -> None:
    logs = 0.3 + 0.1 * np.random.default_rng(0).standard_normal(400)
    half = 1.966 * logs.std(ddof=1) / np.sqrt(logs.size)  # Student's t of 399
    expected = np.exp([logs.mean() - half, logs.mean() + half])
    np.testing.assert_allclose(bootstrap_ci(logs), expected, rtol=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_swapping_or_scaling_the_models_swaps_or_scales_the_interval(seed: int) -> None:
    logs = np.random.default_rng(seed).normal(0.2, 0.1, 12)
    low, high = bootstrap_ci(logs, seed=seed)
    np.testing.assert_allclose(bootstrap_ci(-logs, seed=seed), (1 / high, 1 / low), rtol=1e-9)
    np.testing.assert_allclose(bootstrap_ci(logs + np.log(3), seed=seed), (3 * low, 3 * high), rtol=1e-9)


def test_a_higher_level_gives_a_wider_interval() -> None:
    logs = np.random.default_rng(0).normal(0.2, 0.1, 12)
    narrow, wide = bootstrap_ci(logs, level=0.8), bootstrap_ci(logs, level=0.99)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_equal_replicates_give_a_point() -> None:
    assert bootstrap_ci([np.log(2.0)] * 12) == pytest.approx((2.0, 2.0), rel=1e-12)


def test_the_seed_fixes_the_interval() -> None:
    logs = np.random.default_rng(0).normal(0.2, 0.1, 12)
    assert bootstrap_ci(logs, seed=3) == bootstrap_ci(logs, seed=3) != bootstrap_ci(logs, seed=4)


@pytest.mark.parametrize("logs", [[], [0.1], [0.1, np.inf], [0.1, np.nan], [[0.1, 0.2], [0.3, 0.4]]])
def test_unusable_replicates_are_refused(logs: list[float]) -> None:
    with pytest.raises(BadInput):
        bootstrap_ci(logs)


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0])
def test_a_level_that_is_no_share_is_refused(level: float) -> None:
    with pytest.raises(BadInput, match="level"):
        bootstrap_ci([0.1, 0.2], level=level)


def test_percentiles_interpolate() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile(np.arange(101.0), 95) == 95.0


@pytest.mark.parametrize(("samples", "q"), [([], 50), ([1.0], -1), ([1.0], 101)])
def test_impossible_percentiles_are_refused(samples: list[float], q: float) -> None:
    with pytest.raises(BadInput):
        percentile(samples, q)


def test_throughput_is_samples_per_second() -> None:
    assert throughput(20.0, batch=8) == 400.0


@pytest.mark.parametrize(("latency_ms", "batch"), [(0.0, 1), (float("nan"), 1), (1.0, 0)])
def test_impossible_throughput_is_refused(latency_ms: float, batch: int) -> None:
    with pytest.raises(BadInput):
        throughput(latency_ms, batch=batch)
