"""The simulated machine behaves as stated, and few runs of the protocol on it make a page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.latency import simulated
from benchmarks.latency.simulated import RUN_SECONDS, SCENARIOS, Found, Machine, Scenario, Session, checks, page
from optin_deploy.measuring.gate import Verdict


def runs_of(session: Session, machine: Machine, count: int) -> np.ndarray:
    taken = []
    for _ in range(count):
        before = machine.clock()
        session.run({})
        taken.append(machine.clock() - before)
    return np.array(taken)


def test_runs_have_noise_tail_and_drift() -> None:
    machine = Machine(0.0, np.random.default_rng(0))
    taken = runs_of(Session(machine, 1.0), machine, 20_000) / RUN_SECONDS
    assert np.median(taken) == pytest.approx(1.0, abs=0.02)
    assert 0.007 < np.mean(taken > 1.3) < 0.013
    normal = np.log(taken[taken < 1.3])
    means = normal[: len(normal) // 50 * 50].reshape(-1, 50).mean(axis=1)  # a second each
    assert np.std(np.diff(normal)) == pytest.approx(np.sqrt(2) * 0.01, rel=0.1)
    assert 0.02 < np.std(means) < 0.04, "the speed drifts by more than noise: 0.01 / sqrt(50)"


def test_a_session_keeps_its_luck_and_its_slowdown() -> None:
    machine = Machine(0.2, np.random.default_rng(1))
    medians = [np.median(runs_of(Session(machine, 2.0), machine, 200)) / RUN_SECONDS for _ in range(60)]
    assert np.std(np.log(medians)) == pytest.approx(0.2, rel=0.25)
    assert np.exp(np.mean(np.log(medians))) == pytest.approx(2.0, rel=0.1)


def test_a_run_follows_from_its_seed() -> None:
    first, again, other = (simulated.one_run(0.015, 1.0, seed=seed) for seed in (3, 3, 4))
    assert first == again != other


def test_calm_machines_see_a_slowdown_and_no_other() -> None:
    calm = SCENARIOS[0]
    slow = simulated.simulate(calm, 1.10, 8)
    assert slow.detected == 1.0
    assert slow.outcomes == {"holds": 0, "straddles": 0, "unstable": 0, "fails": 1}
    assert 0.001 < slow.half_width < 0.02
    assert simulated.simulate(calm, 1.0, 8).outcomes["holds"] == 1


def test_shares_by_hand() -> None:
    verdicts = [
        Verdict("holds", 1.0, (0.99, 1.01), ""),
        Verdict("holds", 1.02, (1.01, 1.03), ""),
        Verdict("straddles", 1.04, (1.02, 1.06), ""),
        Verdict("unstable", 0.9, (0.8, 0.98), ""),
    ]
    found = simulated.summed(Scenario("usual", 0.015), 1.03, verdicts)
    assert (found.runs, found.covered, found.detected) == (4, 0.5, 0.75)
    assert found.half_width == pytest.approx(0.015)
    assert found.outcomes == {"holds": 0.5, "straddles": 0.25, "unstable": 0.25, "fails": 0.0}


def test_what_does_not_hold_is_said() -> None:
    outcomes = {"holds": 1.0, "straddles": 0.0, "unstable": 0.0, "fails": 0.0}
    same = Found("usual", 0.015, 1.0, 2000, 0.95, 0.05, 0.01, outcomes)
    slow = replace(same, slowdown=1.03, detected=0.99)
    assert [row[-1] for row in checks([same, slow])] == ["holds", "holds"]
    for bad in (replace(same, covered=0.92), replace(same, covered=0.98), replace(slow, detected=0.89)):
        assert [row[-1] for row in checks([bad])] == ["**does not hold**"]
    assert checks([replace(slow, scenario="noisy", detected=0.1)]) == [], "only reported"
    assert "**does not hold**" in page([replace(same, covered=0.92)])


def test_few_runs_make_a_page_and_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["simulated", "--runs", "2", "--out", str(tmp_path)])
    simulated.main()
    said = (tmp_path / "latency_simulated.md").read_text()
    assert capsys.readouterr().out.strip() in said
    data = json.loads((tmp_path / "latency_simulated.json").read_text())
    assert len(data["found"]) == 9
    assert {row["runs"] for row in data["found"]} == {2}
    assert data["settings"]["blocks"] == 12
