"""Quality at many budgets, and the smallest model that is good enough."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import optin_deploy
from optin_deploy.checkpoint.loading import load_dense
from optin_deploy.data.samples import read_samples
from optin_deploy.errors import BadInput, InfeasibleBudget, QualityLimit
from optin_deploy.feeds.rows import Feeds
from optin_deploy.jobs import sweep as module
from optin_deploy.jobs.planner import Planner
from optin_deploy.jobs.prepared import Prepared, prepare
from optin_deploy.jobs.stages import ScoreRequest
from optin_deploy.jobs.sweep import HEADER, BudgetTrials, SweepPoint, check_shares, smallest_within
from optin_deploy.jobs.workspace import Workspace
from optin_deploy.planning.budget import Limits, parse_shares
from optin_deploy.planning.plan import NetworkPlan
from optin_deploy.planning.widths import Choice
from optin_deploy.pruning.ready import Ready
from optin_deploy.pruning.source import Source
from optin_deploy.quality.quality import Quality
from optin_deploy.scoring.settings import ScoreSettings
from support.tiny_checkpoint import CLASSES, SEQ_LEN, Shell, bert, classifier, labelled, lines, root, texts

SHARES = "0.9,0.5,0.2"


@cache
def judging() -> Path:
    """Rows that calibration does not have, labelled by the classifier's own predictions: its accuracy is 1."""
    dense = load_dense(str(classifier()))
    rows = []
    for first, second in pairwise(texts()):
        text = " ".join((*second.split()[::2], *first.split()[1::2]))
        encoded = dense.preprocessor(text, truncation=True, max_length=SEQ_LEN, return_tensors="pt")
        with torch.inference_mode():
            rows.append({"text": text, "label": CLASSES[int(dense.model(**encoded).logits.argmax())]})
    path = root() / "judging.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def point(flops: float, drop: float) -> SweepPoint:
    return SweepPoint(flops, flops, 1, Quality("accuracy", 1.0, 1.0 - drop / 100, 10), 0.0)


@given(
    drops=st.lists(st.floats(0, 50), min_size=101, max_size=101),
    allowed=st.floats(0, 50),
    least=st.floats(0, 0.98),
)
def test_bisection_finds_the_smallest_share_that_brute_force_finds(
    drops: list[float], allowed: float, least: float
) -> None:
    drops = sorted(drops, reverse=True)  # the more stays, the less is lost
    tried: list[float] = []

    def at(share: float) -> SweepPoint:
        assert share > least, "below what can be cut"
        tried.append(share)
        return point(share, drops[round(100 * share)])

    good = [n for n in range(int(100 * least) + 1, 100) if point(n / 100, drops[n]).quality.drop <= allowed]
    if not good:
        with pytest.raises(QualityLimit, match=r"--max-drop .*: no smaller model .* 99% of the MACs lose"):
            smallest_within(allowed, least, at)
        return
    assert round(100 * smallest_within(allowed, least, at).flops) == min(good)
    assert len(tried) <= 7


def test_budgets_at_which_nothing_would_be_left_are_too_small() -> None:
    def at(share: float) -> SweepPoint:
        if share < 0.07:
            raise InfeasibleBudget("nothing is left")
        return point(share, 0)

    assert smallest_within(90.0, 0.0, at).flops == 0.07


def test_the_model_that_is_returned_was_judged_itself_even_where_quality_does_not_fall_evenly() -> None:
    drops = {n: (0.5 if n % 3 else 2.0) for n in range(101)}
    found = smallest_within(1.0, 0.0, lambda share: point(share, drops[round(100 * share)]))
    assert found.quality.drop <= 1.0


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("0.5", (0.5,)),
        ("0.9,0.5", (0.9, 0.5)),
        (" 0.4, 0.4,0.3", (0.4, 0.3)),
        ("90%, 33.3%", (0.9, 0.333)),
        (None, module.SHARES),
    ],
)
def test_shares_are_read(text: str | None, shares: tuple[float, ...]) -> None:
    assert parse_shares(text) == shares


@pytest.mark.parametrize("text", ["", "a", "0.5;0.4", "0.5,,0.4"])
def test_other_shares_are_refused(text: str) -> None:
    with pytest.raises(BadInput, match="give shares with commas"):
        parse_shares(text)
    with pytest.raises(BadInput, match=r"--flops 0\.0: give the share to keep"):
        parse_shares("0.5,0")


@pytest.fixture(name="work", scope="module")
def _work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with scores of the classifier."""
    out = tmp_path_factory.mktemp("sweep") / "work"
    source = Source(str(classifier()), calibration=str(lines()), seq_len=SEQ_LEN)
    ScoreRequest(source, out, ScoreSettings(probes=2, head_samples=4)).run()
    return out


@pytest.fixture(name="folder")
def _folder(work: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(work, tmp_path / "work"))


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_sweep_judges_models_as_a_user_would(shell: Shell, folder: Path) -> None:
    ran = shell("optin", "sweep", folder, "--eval", judging(), "--flops", SHARES, "--align", 8)
    assert ran.code == 0, ran.err
    table = rows_of(folder)
    assert tuple(table[0]) == HEADER
    assert [row["flops"] for row in table] == ["0.9", "0.5", "0.2"]
    assert all(row["metric"] == "accuracy" and float(row["dense"]) == 1.0 for row in table)
    for row in table:  # the same model by the other commands, judged row by row
        assert shell("optin", "plan", folder, "--flops", row["flops"], "--align", 8).code == 0
        assert shell("optin", "rewrite", folder).code == 0
        model, dense = optin_deploy.load(folder), load_dense(str(classifier()))
        right = 0
        samples = read_samples(judging())
        for sample in samples:
            encoded = dense.preprocessor(sample.text, truncation=True, max_length=SEQ_LEN, return_tensors="pt")
            with torch.inference_mode():
                right += model.config.id2label[int(model(**encoded).logits.argmax())] == sample.label
        assert float(row["pruned"]) == pytest.approx(right / len(samples), abs=1e-4)
        assert float(row["drop"]) == pytest.approx(100 - 100 * right / len(samples), abs=0.01)
        plan = json.loads((folder / "plan.json").read_text())
        cost = plan["cost"]
        assert float(row["kept"]) == pytest.approx(cost["macs_pruned"] / cost["macs_dense"], abs=1e-4)
        assert int(row["parameters"]) == cost["weights_pruned"]
        assert row["pruned"] in ran.out
    with Image.open(folder / "sweep.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Shares of the plans that are cut while this is open."""
    cuts: list[float] = []
    real = module.make

    def counting(ready: Ready, plan: NetworkPlan, **options: Any) -> Any:
        cuts.append(plan.settings["flops"])
        return real(ready, plan, **options)

    with monkeypatch.context() as patched:
        patched.setattr(module, "make", counting)
        yield cuts


@pytest.mark.slow
def test_models_are_made_once(shell: Shell, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("optin", "sweep", folder, "--align", 8)
    with counted(monkeypatch) as cuts:
        assert shell(*command, "--flops", "0.9,0.5").code == 0
        assert len(cuts) == 2
        written = rows_of(folder)
        assert written[0]["metric"] == "same_prediction"  # the lines have no labels
        assert shell(*command, "--flops", "0.5,0.9,0.7").code == 0
        assert len(cuts) == 3
        assert [rows_of(folder)[i] for i in (1, 0)] == written
        for other in (["--eval", judging()], ["--no-compensation"], ["--align", 4], ["--allocation", "paper"]):
            before = len(cuts)
            assert shell(*command, "--flops", "0.5", *other).code == 0
            assert len(cuts) == before + 1, other


def test_an_interrupted_sweep_keeps_its_points_and_a_damaged_file_is_made_again(
    shell: Shell, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("optin", "sweep", folder, "--align", 8, "--flops", "0.9,0.5")
    real = module.BudgetTrials._made

    def failing(self: object, flops: float) -> SweepPoint:
        if flops == 0.5:
            raise KeyboardInterrupt
        return real(self, flops)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(module.BudgetTrials, "_made", failing)
        assert shell(*command).code == 130
    assert not (folder / "sweep.csv").exists()
    with counted(monkeypatch) as cuts:
        assert shell(*command).code == 0
    assert len(cuts) == 1
    (folder / "sweep.json").write_text((folder / "sweep.json").read_text()[:-9])
    with counted(monkeypatch) as cuts:
        assert shell(*command).code == 0
    assert len(cuts) == 2


def test_new_scores_remove_a_sweep(shell: Shell, folder: Path) -> None:
    assert shell("optin", "sweep", folder, "--align", 8, "--flops", "0.5").code == 0
    ran = shell("optin", "score", classifier(), "--calibration", lines(), "--seq-len", SEQ_LEN, "--out", folder,
                "--probes", 3)  # fmt: skip
    assert ran.code == 0, ran.err
    assert not list(folder.glob("sweep.*"))


def test_points_of_other_class_names_are_made_again(folder: Path) -> None:
    model = Path(shutil.copytree(classifier(), folder.parent / "model"))
    rows = judging()
    keys = []
    for names in (CLASSES, CLASSES, CLASSES[::-1]):
        config = json.loads((model / "config.json").read_text())
        config["id2label"] = {str(number): name for number, name in enumerate(names)}
        config["label2id"] = {name: number for number, name in enumerate(names)}
        (model / "config.json").write_text(json.dumps(config))
        prepared = prepare(replace(Workspace(folder).source(), model=str(model), evaluation=str(rows)), folder)
        keys.append(BudgetTrials(Planner(Workspace(folder), prepared, Choice()))._key)
    assert keys[0] == keys[1] != keys[2]


def test_curves_are_measured_for_a_sweep_that_needs_them(shell: Shell, folder: Path) -> None:
    ran = shell("optin", "sweep", folder, "--align", 8, "--flops", "0.5")
    assert ran.code == 0, ran.err
    assert (folder / "curves.json").exists()


def test_max_drop_plans_the_smallest_model_that_is_good_enough(shell: Shell, folder: Path) -> None:
    judged = ("--eval", judging(), "--align", 8)
    ran = shell("optin", "plan", folder, "--max-drop", 10, *judged)
    assert ran.code == 0, ran.err
    plan = json.loads((folder / "plan.json").read_text())
    settings = plan["settings"]
    trials = {p["flops"]: p["quality"] for p in json.loads((folder / "sweep.json").read_text())["points"]}
    drops = {flops: 100 * (q["dense"] - q["pruned"]) for flops, q in trials.items()}
    assert drops[settings["flops"]] <= 10
    assert drops[round(settings["flops"] - 0.01, 2)] > 10  # one percent less was tried, and is not
    assert plan["cost"]["macs_pruned"] / plan["cost"]["macs_dense"] <= settings["flops"]
    assert settings["max_drop"] == 10
    assert f"{drops[settings['flops']]:.2f} points lost on 59 rows" in ran.out


def test_the_whole_job_takes_max_drop_and_reports_on_the_rows_of_eval(shell: Shell, tmp_path: Path) -> None:
    out = tmp_path / "out"
    data = ("--calibration", lines(), "--eval", judging(), "--seq-len", SEQ_LEN)
    ran = shell("optin-export", classifier(), *data, "--max-drop", 20, "--engine", "torch", "--align", 8,
                "--no-dense", "--out", out)  # fmt: skip
    assert ran.code == 0, ran.err
    report = json.loads((out / "report.json").read_text())
    assert report["quality"]["metric"] == "accuracy"
    assert report["quality"]["samples"] == len(read_samples(judging()))
    assert report["quality"]["pruned"] >= 0.8
    assert report["macs"]["kept"] < 0.99
    assert report["settings"]["max_drop"] == 20
    assert report["settings"]["evaluation"] == str(judging())


def held_out(prepared: Prepared) -> Feeds:
    found = prepared.ready.rows.held_out
    assert found is not None
    return found


def test_eval_rows_do_not_change_what_is_calibrated_on() -> None:
    source = Source(str(classifier()), calibration=str(lines()), seq_len=SEQ_LEN)
    plain, judged = prepare(source), prepare(replace(source, evaluation=str(judging())))
    assert plain.key == judged.key
    assert len(held_out(judged)) == len(read_samples(judging())) != len(held_out(plain))


def test_rows_that_calibration_learned_from_do_not_judge(tmp_path: Path) -> None:
    source = Source(str(classifier()), calibration=str(lines()), seq_len=SEQ_LEN)
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(labelled().read_text() + judging().read_text())
    plain, judged = held_out(prepare(source)), held_out(prepare(replace(source, evaluation=str(mixed))))
    assert len(judged) == len(plain) + len(read_samples(judging()))
    only = tmp_path / "only.jsonl"
    rows = [json.loads(line) for line in labelled().read_text().splitlines()]
    held = {tuple(row) for batch in plain.batches for row in batch["input_ids"].tolist()}
    encode = load_dense(str(classifier())).preprocessor
    width = {len(row) for row in held}.pop()
    seen = [
        row
        for row in rows
        if tuple(encode(row["text"], truncation=True, max_length=SEQ_LEN, padding="max_length")["input_ids"][:width])
        not in held
    ]
    assert len(seen) == len(rows) - len(plain)
    only.write_text("".join(json.dumps(row) + "\n" for row in seen))
    with pytest.raises(BadInput, match="all 48 rows that should judge give the network the same inputs as calibration"):
        prepare(replace(source, evaluation=str(only)))


def test_rows_that_nobody_judges_by_are_not_refused(tmp_path: Path) -> None:
    """Ten texts are the same to the network: without --eval none of them can judge, and with it none has to."""
    alike = tmp_path / "alike.txt"
    alike.write_text("".join(f"{'the game ' * SEQ_LEN}{i}\n" for i in range(10)))
    source = Source(str(classifier()), calibration=str(alike), seq_len=SEQ_LEN)
    with pytest.raises(BadInput, match="all 2 rows that should judge give the network the same inputs"):
        prepare(source)
    prepared = prepare(replace(source, evaluation=str(judging())))
    assert len(prepared.ready.rows.calibration) == 8
    assert len(held_out(prepared)) == len(read_samples(judging()))
    source = replace(source, calibration=str(lines()))
    assert prepare(source).key == prepare(replace(source, evaluation=str(judging()))).key, "scores stay usable"


def test_rows_are_labelled_all_or_none(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text(judging().read_text() + '{"text": "a game"}\n')
    with pytest.raises(BadInput, match=r"1 of the 60 rows that judge have no label\. Label all rows, or none"):
        prepare(Source(str(classifier()), calibration=str(lines()), seq_len=SEQ_LEN, evaluation=str(path)))


def test_a_loss_of_just_what_is_allowed_is_allowed() -> None:
    for dense, pruned, points in ((0.95, 0.90, 5), (0.92, 0.90, 2), (1.0, 48 / 50, 4)):
        assert Quality("accuracy", dense, pruned, 50).drop == points


def test_a_precision_that_loses_more_than_max_drop_fails_the_job(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr("optin_deploy.jobs.export.quality_of", lambda *rest: Quality("accuracy", 1.0, 0.7, 59))
    data = ("--calibration", lines(), "--eval", judging(), "--seq-len", SEQ_LEN)
    ran = shell("optin-export", classifier(), *data, "--max-drop", 20, "--engine", "torch", "--align", 8,
                "--no-dense", "--out", out)  # fmt: skip
    assert ran.code == 1
    assert "torch in fp32 does not (accuracy 0.7000, dense 1.0000: 30.00 points lost on 59 rows)" in ran.err
    assert json.loads((out / "report.json").read_text())["quality"]["pruned"] == 0.7


def test_a_limit_that_nothing_holds_is_a_failed_limit(shell: Shell, folder: Path) -> None:
    def never(self: module.BudgetTrials, flops: float) -> SweepPoint:
        return point(flops, 7.0)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module.BudgetTrials, "_made", never)
        ran = shell("optin", "plan", folder, "--max-drop", 5, "--eval", judging())
    assert ran.code == 1
    assert "99% of the MACs lose 7.00 points" in ran.err
    assert not (folder / "plan.json").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--max-drop", "-1"), "--max-drop -1.0: give points"),
        (("--max-drop", "nan"), "--max-drop nan: give points"),
        (("--max-drop", "1", "--flops", "0.5"), "leave out every other budget"),
        (("--max-drop", "1", "--eval", "missing.jsonl"), "missing.jsonl"),
        (("--flops", "0.5", "--eval", "missing.jsonl"), "--eval judges models for --max-drop"),
    ],
)
def test_impossible_wishes_are_refused(shell: Shell, folder: Path, options: tuple[str, ...], says: str) -> None:
    ran = shell("optin", "plan", folder, *options)
    assert ran.code == 2
    assert says in ran.err
    assert not (folder / "plan.json").exists()


def test_a_sweep_refuses_impossible_shares_before_any_work(shell: Shell, folder: Path) -> None:
    for shares, says in (("0.5,0", "--flops 0.0"), ("0.0002,0.0001", "--flops 0.0001"), ("x", "commas")):
        ran = shell("optin", "sweep", folder, "--flops", shares)
        assert ran.code == 2
        assert says in ran.err
    assert not list(folder.glob("sweep.*"))


def test_a_share_that_leaves_no_unit_of_an_encoder_is_refused_before_any_work() -> None:
    prepared = prepare(Source(str(bert()), calibration=str(lines()), seq_len=SEQ_LEN))
    planner = Planner(Workspace(Path("nowhere")), prepared, Choice(align=8, allocation="curves"))
    with pytest.raises(InfeasibleBudget, match=r"--flops 0\.001: with the fewest units of heads, .* are left\. Use --"):
        check_shares(planner, (0.0005, 0.001))


def test_a_sweep_goes_on_without_shares_that_cannot_be_met(
    shell: Shell, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    command, real = ("optin", "sweep", folder, "--align", 8), module.BudgetTrials._made

    def late(self: object, flops: float) -> SweepPoint:  # known only when the plan is made
        if flops == 0.8:
            raise InfeasibleBudget("made up")
        return real(self, flops)  # type: ignore[arg-type]

    monkeypatch.setattr(module.BudgetTrials, "_made", late)
    ran = shell(*command, "--flops", "0.0001,0.9,0.8,0.5")
    assert ran.code == 0
    assert [row["flops"] for row in rows_of(folder)] == ["0.9", "0.5"]
    assert caplog.text.count("--flops 0.0001 is left out: ") == 1
    assert "--flops 0.8 is left out: made up" in caplog.text


def test_eval_labels_must_be_the_models(shell: Shell, folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a game", "label": "cooking"}\n')
    ran = shell("optin", "sweep", folder, "--eval", rows)
    assert ran.code == 2
    assert "'cooking' is not one of the model's" in ran.err


def test_dry_runs_write_nothing(shell: Shell, folder: Path, tmp_path: Path) -> None:
    before = sorted(folder.iterdir())
    ran = shell("optin", "sweep", folder, "--dry-run")
    assert (ran.code, ran.out) == (0, f"would make and judge {len(module.SHARES)} models on 12 rows\n")
    ran = shell("optin", "plan", folder, "--max-drop", 2, "--dry-run")
    assert ran.code == 0
    assert "--max-drop 2" in ran.out
    ran = shell("optin", "plan", folder, "--flops", 0.5, "--dry-run")
    assert ran.code == 0, ran.err
    for impossible in (("plan", "--max-drop", 2), ("sweep",)):
        ran = shell("optin", impossible[0], folder, *impossible[1:], "--eval", "missing.jsonl", "--dry-run")
        assert ran.code == 2
        assert "missing.jsonl" in ran.err
    ran = shell("optin", "plan", tmp_path / "nothing", "--max-drop", 2, "--dry-run")
    assert ran.code == 2
    assert sorted(folder.iterdir()) == before
    ran = shell("optin-export", bert(), "--calibration", lines(), "--seq-len", SEQ_LEN, "--max-drop", 2, "--dry-run",
                "--out", tmp_path / "out")  # fmt: skip
    assert ran.code == 0, ran.err
    assert "--max-drop 2" in ran.out


def test_limits_refuse_a_loss_beside_a_budget() -> None:
    assert str(Limits(max_drop=0.5)) == "drop0.5"
    with pytest.raises(BadInput, match="finds the budget itself"):
        Limits(params=0.5, max_drop=1.0)
