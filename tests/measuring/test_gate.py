"""The latency gate: verdicts on constructed timings, pins, and the command from end to end; nothing is timed here."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from optin_deploy.errors import BadInput, GateFailed, TooUnstable
from optin_deploy.measuring import timing as timing_module
from optin_deploy.measuring.comparing import comparison_of
from optin_deploy.measuring.gate import Gate, GatedPoint, LatencyLimit, limit_of, verdict_of
from optin_deploy.measuring.points import Point
from optin_deploy.measuring.timing import PairTiming
from support.made_timings import FAILS, HOLDS, STRADDLES, UNSTABLE, FakeMeasuring, made
from support.tiny_checkpoint import Ran, Shell, finished_job, snapshot, temporary_files

FIVE_PERCENT = LatencyLimit("max_ratio", 1.05)


# the judge


@pytest.mark.parametrize(
    ("timing", "outcome"),
    [
        (made(0.5), "holds"),
        (made(1.0, spread=0.02), "holds"),
        (made(1.0499), "holds"),
        (made(1.0501), "fails"),
        (made(1.2, spread=0.02), "fails"),
        (made(1.04, spread=0.03), "straddles"),  # below the limit, but not surely
        (made(1.06, spread=0.03), "straddles"),  # above it, but not surely
        (made(1.2, same=1.05), "unstable"),
        (made(0.5, same=0.95), "unstable"),  # nothing is judged, not even what looks good
        (made(0.5, same=1.005), "holds"),  # less than 1%
    ],
)
def test_the_interval_decides(timing: PairTiming, outcome: str) -> None:
    verdict = verdict_of(timing, FIVE_PERCENT)
    assert verdict.outcome == outcome
    low, high = verdict.ci95
    assert (low, high) == pytest.approx((1 / timing.ci95[1], 1 / timing.ci95[0]))
    assert low <= verdict.ratio <= high
    if outcome == "straddles":
        assert low < 1.05 < high


@pytest.mark.parametrize(
    ("ratio", "outcome"), [(1 / 1.6, "holds"), (1 / 1.501, "holds"), (1 / 1.499, "fails"), (1.0, "fails")]
)
def test_a_least_speedup_is_the_inverse_of_a_ratio(ratio: float, outcome: str) -> None:
    verdict = verdict_of(made(ratio), LatencyLimit("min_speedup", 1.5))
    assert verdict.outcome == verdict_of(made(ratio), LatencyLimit("max_ratio", 1 / 1.5)).outcome == outcome
    assert f"speed-up is {1 / ratio:.3f}" in verdict.sentence
    assert "asked 1.5" in verdict.sentence


@pytest.mark.parametrize(
    ("timing", "says"),
    [
        (made(1.0), ("holds", "is 1.000", "95% CI 1.000 to 1.000", "limit 1.05")),
        (made(1.2), ("fails", "is 1.200", "limit 1.05", "pin")),
        (made(1.05, spread=0.05), ("undecided", "is 1.050", "limit 1.05", "Measure again")),
        (made(1.2, same=1.1), ("not judged", "0.909 to 0.909", "1.200", "measure again", "--threads")),
    ],
)
def test_a_sentence_has_the_numbers_the_limit_and_the_next_step(timing: PairTiming, says: tuple[str, ...]) -> None:
    sentence = verdict_of(timing, FIVE_PERCENT).sentence
    assert [part for part in says if part not in sentence] == []


def test_one_limit_is_given() -> None:
    assert limit_of(1.05, None) == FIVE_PERCENT
    assert limit_of(None, 2.0).max_ratio == 0.5
    for both in ((None, None), (1.05, 1.0)):
        with pytest.raises(BadInput, match="--max-ratio"):
            limit_of(*both)
    for value in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(BadInput, match="positive"):
            limit_of(value, None)


def gate_of(*timings: PairTiming) -> Gate:
    points = [
        GatedPoint(batch + 1, 16, timing, verdict_of(timing, FIVE_PERCENT)) for batch, timing in enumerate(timings)
    ]
    return Gate(FIVE_PERCENT, points, {}, {}, {})


@pytest.mark.parametrize(
    ("timings", "worst"),
    [
        ([HOLDS, HOLDS], "holds"),
        ([HOLDS, STRADDLES], "straddles"),
        ([UNSTABLE, STRADDLES], "unstable"),
        ([FAILS, UNSTABLE, HOLDS], "fails"),
    ],
)
def test_the_worst_point_decides_and_speaks(timings: list[PairTiming], worst: str) -> None:
    gate = gate_of(*timings)
    assert gate.outcome == worst
    spoken = [i + 1 for i, point in enumerate(gate.points) if point.verdict.outcome == worst]
    assert [int(line.split()[0]) for line in gate.sentence.splitlines()] == spoken


def test_a_gate_refuses_what_fails_and_if_strict_what_is_undecided() -> None:
    gate_of(HOLDS).check(strict=True)
    gate_of(STRADDLES).check()
    for gate, strict in ((gate_of(FAILS), False), (gate_of(STRADDLES), True)):
        with pytest.raises(GateFailed) as refused:
            gate.check(strict=strict)
        assert refused.value.exit_code == 1
    with pytest.raises(TooUnstable) as doubted:
        gate_of(UNSTABLE).check()
    assert doubted.value.exit_code == 4


# the command


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes `optin gate` find these timings."""
    finished_job()  # which measures too

    def install(*timings: PairTiming) -> FakeMeasuring:
        measuring = FakeMeasuring(timings)
        monkeypatch.setattr(timing_module, "measure_pair", measuring)
        return measuring

    return install


def gate(shell: Shell, *arguments: object) -> Ran:
    return shell("optin", "gate", *arguments, "--threads", 1)


def test_the_dense_model_behind_the_pruned_one_fails(shell: Shell, fake: Any) -> None:
    measuring = fake(FAILS)
    out = finished_job()
    ran = gate(shell, out, out / "dense.onnx", "--max-ratio", 1.05)
    assert ran.code == 1
    assert "1.200 [1.200, 1.200]" in ran.out
    assert re.search(r"error: 1 x 16 fails: .*limit 1.05", ran.err)
    ((found, candidate),) = measuring.outputs
    (feeds,) = measuring.feeds
    for name, output in (("model.onnx", found), ("dense.onnx", candidate)):
        session = onnxruntime.InferenceSession(out / name, providers=["CPUExecutionProvider"])
        np.testing.assert_allclose(output["logits"], session.run(None, feeds)[0], atol=1e-6)
    assert not np.allclose(found["logits"], candidate["logits"], atol=1e-4)


def test_an_unchanged_artifact_holds(shell: Shell, fake: Any) -> None:
    fake(made(1.0, spread=0.01))
    ran = gate(shell, finished_job() / "model.onnx", finished_job(), "--max-ratio", 1.05)
    assert ran.code == 0, ran.err
    assert "1 x 16 holds" in ran.out
    assert "warning" not in ran.err


def test_a_speedup_is_asked_for(shell: Shell, fake: Any) -> None:
    for timing, code in ((made(0.6), 0), (made(0.7), 1)):
        fake(timing)
        assert gate(shell, finished_job() / "dense.onnx", finished_job(), "--min-speedup", 1.5).code == code


@pytest.mark.parametrize(
    ("timing", "flags", "code", "says"),
    [
        (STRADDLES, [], 0, "warning: 1 x 16 is undecided"),
        (STRADDLES, ["--strict"], 1, "error: 1 x 16 is undecided"),
        (UNSTABLE, [], 4, "error: 1 x 16 is not judged"),
        (UNSTABLE, ["--strict"], 4, "error: 1 x 16 is not judged"),
    ],
)
def test_what_cannot_be_told_has_codes_of_its_own(
    shell: Shell, fake: Any, timing: PairTiming, flags: list[str], code: int, says: str
) -> None:
    fake(timing)
    ran = gate(shell, finished_job(), finished_job(), "--max-ratio", 1.05, *flags)
    assert ran.code == code
    assert says in ran.err


def test_every_point_is_measured_and_the_worst_decides(shell: Shell, fake: Any) -> None:
    measuring = fake(HOLDS, FAILS, HOLDS)
    points = ["--at", "batch=2,seq=12", "--at", "batch=3", "--at", "seq=7"]
    ran = gate(shell, finished_job(), finished_job() / "dense.onnx", "--max-ratio", 1.05, *points)
    assert ran.code == 1
    assert "error: 3 x 16 fails" in ran.err
    assert [feeds["input_ids"].shape for feeds in measuring.feeds] == [(2, 12), (3, 16), (1, 7)]


def test_the_file_holds_verdict_samples_hashes_and_environment(shell: Shell, fake: Any, tmp_path: Path) -> None:
    fake(FAILS)
    out = tmp_path / "new" / "gate.json"
    ran = gate(shell, finished_job(), finished_job() / "dense.onnx", "--max-ratio", 1.05, "--out", out)
    assert ran.code == 1  # and yet the file is there
    data = json.loads(out.read_text())
    assert (data["schema_version"], data["verdict"], data["limit"]) == (1, "fails", {"max_ratio": 1.05})
    assert (data["engine"], data["precision"], data["threads"]) == ("onnx", None, 1)
    report = json.loads((finished_job() / "report.json").read_text())
    for role, name in (("baseline", "model.onnx"), ("candidate", "dense.onnx")):
        about = data["artifacts"][role]
        assert about["file"] == name
        assert about["sha256"] == report["hashes"][name]
        assert about["size_bytes"] == (finished_job() / name).stat().st_size
    (row,) = data["points"]
    assert (row["batch"], row["seq_len"], row["verdict"]) == (1, 16, "fails")
    assert row["ratio"] == pytest.approx(1.2)
    assert row["samples_ms"]["baseline"] == [list(block) for block in FAILS.dense_ms]
    assert row["samples_ms"]["candidate"] == [list(block) for block in FAILS.pruned_ms]
    assert row["samples_ms"]["again"] == [list(block) for block in FAILS.again_ms]
    assert (row["baseline"]["p50_ms"], row["candidate"]["p50_ms"]) == pytest.approx((10, 12))
    assert "cpu_model" in data["environment"]
    assert temporary_files(tmp_path) == []


def test_a_real_measurement_is_judged(shell: Shell, tmp_path: Path) -> None:
    # A limit that no machine comes near: two blocks of tiny models say nothing else.
    out = tmp_path / "gate.json"
    ran = gate(shell, finished_job(), finished_job() / "dense.onnx", "--max-ratio", 1e9, "--out", out)
    assert ran.code in (0, 4), ran.err
    assert len(json.loads(out.read_text())["points"][0]["samples_ms"]["again"]) == 2


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(shell: Shell, finished: Path) -> None:
    before = snapshot(finished)
    flags = ["--at", "batch=2", "--dry-run"]
    ran = gate(
        shell, finished, finished / "dense.onnx", "--max-ratio", 1.05, "--out", finished.with_name("x.json"), *flags
    )
    assert ran.code == 0, ran.err
    assert "would measure" in ran.out
    assert "2 x 16" in ran.out
    ran = gate(shell, finished, "--pin", finished / "baseline.json", *flags)
    assert ran.code == 0, ran.err
    assert "would pin" in ran.out
    assert snapshot(finished) == before
    assert not finished.with_name("x.json").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{job}"], "--max-ratio"),
        (["{job}", "--max-ratio", "1.05"], "CANDIDATE is missing"),
        (["{job}", "{job}"], "neither of --max-ratio"),
        (["{job}", "{job}", "--max-ratio", "1.05", "--min-speedup", "1"], "both of --max-ratio"),
        (["{job}", "{job}", "--max-ratio", "-1"], "--max-ratio -1"),
        (["{job}", "{job}/none.onnx", "--max-ratio", "1.05"], "none.onnx does not exist"),
        (["{job}/none", "{job}", "--max-ratio", "1.05"], "none does not exist"),
        (["{job}", "{job}/model", "--max-ratio", "1.05"], "output folder of `optin-export`"),
        (["{job}", "{job}/report.md", "--max-ratio", "1.05"], "report.md"),
        (["{job}", "{job}", "--max-ratio", "1.05", "--engine", "bogus"], "bogus"),
        (["{job}", "{job}", "--max-ratio", "1.05", "--engine", "torch"], "possible: onnx,"),
        (["{job}", "{job}", "--max-ratio", "1.05", "--precision", "int3"], "int3"),
        (["{job}", "{job}", "--max-ratio", "1.05", "--precision", "bf16"], "bfloat16"),
        (["{job}", "{job}", "--max-ratio", "1.05", "--precision", "fp16"], "optin build"),
        (["{job}", "{job}", "--max-ratio", "1.05", "--at", "batch=0"], "batch=0"),
        (["{job}", "{job}", "--max-ratio", "1.05", "--at", "seq=7", "--at", "seq=7"], "seq=7 is given twice"),
        (["{job}", "{job}", "--max-ratio", "1.05", "--at", "batch=2000000000"], "a batch of 2000000000 takes"),
        (["{job}", "{job}", "--max-ratio", "1.05", "--at", "seq=1000"], "model.onnx does not run"),
        (["{job}", "{job}", "--max-ratio", "1.05", "--at", "batch=1000000000000"], "possible are 1 to 2147483647"),
        (["{job}", "{job}", "--max-ratio", "1.05", "--out", "{job}"], "is a folder"),
        (["{job}", "{job}", "--max-ratio", "1.05", "--out", "{job}/model.onnx"], "would replace"),
        (["{job}", "--pin", "{job}/model.onnx"], "would replace"),
        (["{job}", "--pin", "{job}/pin.txt"], ".json"),
        (["{job}", "--pin", "{job}/report.json"], "no earlier result"),
        (["{job}", "--pin", "{job}/report.json", "--dry-run"], "no earlier result"),
        (["{job}", "{job}", "--pin", "pin.json"], "leave out CANDIDATE"),
        (["{job}", "--pin", "pin.json", "--strict"], "--strict"),
        (["{job}/report.json", "{job}", "--max-ratio", "1.05"], "not a pin"),
        (["{job}/absent.json", "{job}", "--max-ratio", "1.05"], "--pin"),
    ],
)
def test_bad_input_exits_2_and_says_what_to_do(
    shell: Shell, finished: Path, arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished.parent)
    before = snapshot(finished)
    ran = shell("optin", "gate", *(argument.format(job=finished) for argument in arguments))
    assert ran.code == 2
    assert says in ran.err
    assert "Traceback" not in ran.err
    assert snapshot(finished) == before
    assert list(finished.parent.glob("*.json")) == []


def test_a_negative_number_of_threads_is_refused() -> None:
    with pytest.raises(BadInput, match="--threads -1"):
        comparison_of(finished_job(), finished_job(), threads=-1)


def test_the_length_comes_from_a_plan_of_ours_or_is_128(tmp_path: Path) -> None:
    assert comparison_of(finished_job() / "dense.onnx").points == (Point(1, 16),)
    model = Path(shutil.copy(finished_job() / "model.onnx", tmp_path))
    assert comparison_of(model).points == (Point(1, 128),)
    (tmp_path / "plan.json").write_text('{"planned_values": {}}')  # another tool's
    assert comparison_of(model).points == (Point(1, 128),)


# pins


def pinned(shell: Shell, folder: Path, *flags: object) -> Path:
    """A pin beside a copy of the finished job's folder."""
    file = folder.parent / "baseline.json"
    ran = gate(shell, folder, "--pin", file, *flags)
    assert ran.code == 0, ran.err
    assert f"optin gate {file} CANDIDATE" in ran.out
    return file


def test_a_pin_brings_artifact_and_settings_back(shell: Shell, finished: Path, fake: Any) -> None:
    file = pinned(shell, finished, "--at", "batch=2,seq=9", "--at", "batch=1")
    data = json.loads(file.read_text())
    report = json.loads((finished / "report.json").read_text())
    assert data == {
        "schema_version": 1,
        "artifact": "finished/model.onnx",
        "sha256": report["hashes"]["model.onnx"],
        "size_bytes": (finished / "model.onnx").stat().st_size,
        "engine": "onnx",
        "precision": None,
        "threads": 1,
        "points": [{"batch": 2, "seq": 9}, {"batch": 1, "seq": 16}],
    }
    measuring = fake(HOLDS, HOLDS)
    ran = shell("optin", "gate", file, finished / "dense.onnx", "--max-ratio", 1.05)
    assert ran.code == 0, ran.err
    assert [feeds["input_ids"].shape for feeds in measuring.feeds] == [(2, 9), (1, 16)]
    assert comparison_of(file, finished).threads == 1
    measuring = fake(HOLDS)
    ran = shell("optin", "gate", file, finished, "--max-ratio", 1.05, "--at", "batch=4")
    assert ran.code == 0, ran.err
    assert [feeds["input_ids"].shape for feeds in measuring.feeds] == [(4, 16)]
    assert comparison_of(file, finished, threads=2).threads == 2


def test_pin_and_artifact_move_together(shell: Shell, finished: Path, tmp_path: Path) -> None:
    file = pinned(shell, finished)
    there = tmp_path / "elsewhere"
    there.mkdir()
    shutil.move(finished, there / finished.name)
    with pytest.raises(BadInput, match="is missing"):
        comparison_of(file)
    contest = comparison_of(Path(shutil.move(file, there)))
    assert contest.baseline == there / finished.name / "model.onnx"


def test_a_changed_artifact_is_refused_with_both_hashes(shell: Shell, finished: Path) -> None:
    file = pinned(shell, finished)
    model = finished / "model.onnx"
    content = model.read_bytes()
    was = json.loads(file.read_text())["sha256"]
    dense = json.loads((finished / "report.json").read_text())["hashes"]["dense.onnx"]
    shutil.copy(finished / "dense.onnx", model)
    ran = shell("optin", "gate", file, finished, "--max-ratio", 1.05)
    assert ran.code == 2
    assert was in ran.err
    assert dense in ran.err
    model.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # of the same size
    with pytest.raises(BadInput, match=was):
        comparison_of(file)


@pytest.mark.parametrize(
    "artifact",
    ["../finished/model.onnx", "finished/../../model.onnx", "/etc/hostname", "..\\model.onnx", "C:\\model.onnx", ""],
)
def test_a_pin_that_leads_out_of_its_folder_is_refused(shell: Shell, finished: Path, artifact: str) -> None:
    file = pinned(shell, finished)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"artifact": artifact}))
    with pytest.raises(BadInput, match="own folder"):
        comparison_of(file)


def test_a_pin_lies_beside_its_artifact_or_above(shell: Shell, finished: Path, tmp_path: Path) -> None:
    aside = tmp_path / "aside" / "baseline.json"
    ran = gate(shell, finished, "--pin", aside)
    assert ran.code == 2
    assert "beside the artifact or above" in ran.err
    assert not aside.exists()
    for _ in range(2):  # a pin may be replaced
        assert gate(shell, finished, "--pin", finished / "baseline.json").code == 0
    assert json.loads((finished / "baseline.json").read_text())["artifact"] == "model.onnx"


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 2},
        {"schema_version": "1"},
        {"points": []},
        {"points": [{"batch": 0, "seq": None}]},
        {"points": [{"batch": 1, "seq": 8, "more": 1}]},
        {"points": [{"batch": 1, "seq": 8}] * 101},
        {"threads": -1},
        {"threads": 1.5},
        {"more": 1},
        {"sha256": None},
    ],
    ids=str,
)
def test_a_damaged_pin_is_refused(shell: Shell, finished: Path, change: dict[str, Any]) -> None:
    file = pinned(shell, finished)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    ran = shell("optin", "gate", file, finished, "--max-ratio", 1.05)
    assert ran.code == 2
    assert "not a pin of this version" in ran.err
    assert "--pin FILE" in ran.err


def test_a_pin_without_a_field_is_refused(shell: Shell, finished: Path) -> None:
    file = pinned(shell, finished)
    data = json.loads(file.read_text())
    for name in data:
        file.write_text(json.dumps({k: v for k, v in data.items() if k != name}))
        with pytest.raises(BadInput, match=name):
            comparison_of(file)


def test_a_baseline_that_does_not_run_is_not_pinned(shell: Shell, finished: Path) -> None:
    ran = gate(shell, finished, "--pin", finished / "baseline.json", "--at", "seq=1000")
    assert ran.code == 2
    assert "does not run" in ran.err
    assert not (finished / "baseline.json").exists()
