"""`optin score` as a user meets it: shards, torchrun, Ray, Ctrl-C give the same scores; what cannot be is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from optin_deploy.errors import BadInput
from optin_deploy.files.names import LOCK
from optin_deploy.files.ownership import RECORD
from optin_deploy.jobs.cluster import score_on_ray
from optin_deploy.jobs.stages import ScoreRequest
from optin_deploy.jobs.workspace import Workspace
from optin_deploy.pruning.source import Source
from optin_deploy.scoring import unit_parts
from optin_deploy.scoring.settings import ScoreSettings
from optin_deploy.scoring.unit_scores import UnitScores
from support.part_workers import Log, watched
from support.project import ROOT
from support.tiny_checkpoint import SEQ_LEN, Shell, bert, lines, root, run, snapshot, temporary_files

FINISHED = {"source.json", "dense.onnx", "scores.safetensors"}
PIECES = 8
"""Units of one part, so that an exact scoring has PARTS."""
PARTS = 52
"""Two batches of 12 heads and 192 neurons, 8 units a part."""
CHILD = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may ignore it
sys.path.insert(0, sys.argv.pop(1))
from support.part_workers import Log, watched
from optin_deploy.cli import main
from optin_deploy.scoring import unit_parts
unit_parts.UNITS_A_PART, log = int(sys.argv.pop(1)), Log(Path(sys.argv.pop(1)))
with watched(log, 0.1):
    main()
"""


def score_options(out: Path, *more: object) -> list[object]:
    return ["score", bert(), "--calibration", lines(), "--seq-len", SEQ_LEN, "--out", out, *more]


@cache
def plain(*flags: object) -> UnitScores:
    """What one `optin score` writes."""
    out = Path(tempfile.mkdtemp(dir=root())) / "plain"
    with pytest.MonkeyPatch.context() as patch:
        assert run("optin", *score_options(out, *flags), monkeypatch=patch) == 0
    return found_in(out)


def found_in(out: Path) -> UnitScores:
    return Workspace(out).read_scores()


def names(folder: Path) -> set[str]:
    """Of all but our record and lock."""
    return {path.name for path in folder.iterdir()} - {RECORD, LOCK}


def check(out: Path, *flags: object) -> None:
    """The folder holds the scores of a plain run, and nothing else."""
    found, expected = found_in(out), plain(*flags)
    for kind in ("scores", "errors"):
        torch.testing.assert_close(dict(getattr(found, kind)), dict(getattr(expected, kind)), rtol=1e-6, atol=0)
    for name in ("samples", "probes", "masked_samples", "scorer"):
        assert found.provenance[name] == expected.provenance[name]
    assert names(out) == FINISHED
    assert temporary_files(out) == []


def environment(**more: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return {**clean, "OMP_NUM_THREADS": "1", **more}


# many processes


@pytest.mark.parametrize("scorer", ["sketch", "exact"])
@pytest.mark.parametrize("order", [("1/2", "2/2"), ("3/3", "1/3", "2/3")], ids=" ".join)
def test_shards_one_after_another_write_the_scores_of_a_plain_run(
    shell: Shell, tmp_path: Path, scorer: str, order: tuple[str, ...]
) -> None:
    out = tmp_path / "work"
    for place, shard in enumerate(order):
        ran = shell("optin", *score_options(out, "--scorer", scorer, "--shard", shard))
        assert ran.code == 0, ran.err
        assert "error" not in ran.err
        if place < len(order) - 1:
            number, _, count = shard.partition("/")
            told = rf"worker {number} of {count} has done its parts; (\d+) of (\d+) are left to others\."
            assert 0 < int(re.search(told, ran.out)[1]) < int(re.search(told, ran.out)[2])
            assert "run the same command" in ran.out
            assert "optin plan" not in ran.out
            assert names(out) == {"source.json", "parts"}
    assert f"Wrote {out / 'scores.safetensors'}. Next: optin plan {out}" in ran.out
    check(out, "--scorer", scorer)
    ran = shell("optin", *score_options(out, "--scorer", scorer, "--shard", order[0]))
    assert "Found finished" in ran.out


def test_a_shard_run_twice_does_nothing_twice(shell: Shell, tmp_path: Path) -> None:
    out, log = tmp_path / "work", Log(tmp_path / "log")
    with watched(log):
        for _ in range(2):
            assert shell("optin", *score_options(out, "--shard", "1/2")).code == 0
    assert len(log.parts()) == len(set(log.parts())) > 0


def test_a_rank_of_torchrun_scores_without_a_word_and_helps(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    ran = shell("optin", *score_options(tmp_path / "work"))
    assert (ran.code, ran.out, ran.err) == (0, "", "")
    check(tmp_path / "work")


@pytest.mark.slow
def test_torchrun_writes_the_scores_of_a_plain_run(tmp_path: Path) -> None:
    out = tmp_path / "work"
    command = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc-per-node=2", "-m", "optin_deploy"]
    done = subprocess.run(
        [*map(str, command), *map(str, score_options(out))],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"Next: optin plan {out}") == 1  # only the first process tells
    check(out)


@pytest.fixture
def ray_environment() -> Iterator[dict[str, str]]:
    """For a local Ray that keeps its files together; whatever is left of it is ended, and shown as an error."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # a short path: its sockets lie in it
    mark = f"OPTIN_TEST={folder}"
    yield environment(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", RAY_TMPDIR=folder, OPTIN_TEST=folder)
    deadline = time.monotonic() + 20
    while (left := processes_with(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)
    assert left == []


def processes_with(variable: str) -> list[int]:
    """Processes that have this in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if variable.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # ended, or somebody else's
            continue
    return found


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="shows no processes that Ray left behind")
def test_ray_writes_the_scores_of_a_plain_run_and_leaves_nothing_running(
    tmp_path: Path, ray_environment: dict[str, str]
) -> None:
    out = tmp_path / "work"
    command = [sys.executable, "-m", "optin_deploy", *map(str, score_options(out, "--ray", 2))]
    done = subprocess.run(command, env=ray_environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"Wrote {out / 'scores.safetensors'}. Next: optin plan {out}" in done.stdout
    check(out)


class FakeRay:
    """Runs its tasks in this process, one after another."""

    class exceptions:
        class RayTaskError(Exception):
            cause: Exception

    def __init__(self) -> None:
        self.did: list[str] = []

    def is_initialized(self) -> bool:
        return False

    def init(self, **options: Any) -> None:
        self.did.append(f"init {options['address']}")

    def shutdown(self) -> None:
        self.did.append("shutdown")

    def remote(self, **options: Any) -> Any:
        self.did.append(f"retries {options['max_retries']}")
        return lambda work: type("Remote", (), {"remote": staticmethod(lambda *args: (work, args))})

    def get(self, tasks: list[Any]) -> list[Any]:
        found = []
        for work, args in tasks:
            try:
                found.append(work(*args))
            except ValueError as err:
                failed = self.exceptions.RayTaskError("of a worker, with all of its traceback")
                failed.cause = err
                raise failed from err
        return found


@pytest.fixture(name="fake_ray")
def _fake_ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setenv("RAY_ADDRESS", "head:1234")
    return fake


def test_ray_gets_a_task_for_each_worker_and_is_shut_down(shell: Shell, tmp_path: Path, fake_ray: FakeRay) -> None:
    ran = shell("optin", *score_options(tmp_path / "work", "--ray", 3))
    assert ran.code == 0, ran.err
    assert "Wrote" in ran.out
    assert fake_ray.did == ["init head:1234", "retries 3", "shutdown"]
    check(tmp_path / "work")
    assert "Found finished" in shell("optin", *score_options(tmp_path / "work", "--ray", 3)).out


def test_ray_without_a_worker_is_refused(tmp_path: Path, fake_ray: FakeRay) -> None:
    request = ScoreRequest(Source(str(bert())), tmp_path / "work", ScoreSettings())
    with pytest.raises(BadInput, match="--ray 0: possible are 1 to"):
        score_on_ray(request, 0)
    assert fake_ray.did == []


def test_an_error_of_a_ray_worker_is_told_as_one_of_ours(shell: Shell, tmp_path: Path, fake_ray: FakeRay) -> None:
    ran = shell("optin", *score_options(tmp_path / "work", "--ray", 2, "--memory-budget", "1KiB"))
    assert ran.code == 2
    assert "error: scoring one sample takes" in ran.err
    assert "RayTaskError" not in ran.err
    assert fake_ray.did[-1] == "shutdown"


def test_without_ray_the_command_that_installs_it_is_told(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    ran = shell("optin", *score_options(tmp_path / "work", "--ray", 2))
    assert ran.code == 2
    assert "pip install 'optin-deploy[ray]'" in ran.err


# options


def test_the_options_are_those_of_the_scores(shell: Shell, tmp_path: Path) -> None:
    flags = ["--weighting", "normalised", "--kl-weight", 0.5, "--features", "ffn", "--tokens", 4, "--probes", 3]
    ran = shell("optin", *score_options(tmp_path / "work", *flags, "--seed", 7))
    assert ran.code == 0, ran.err
    told = found_in(tmp_path / "work").provenance
    expected = {"scorer": "sketch", "weighting": "normalised", "kl_weight": 0.5, "probes": 3, "seed": 7}
    assert {name: told[name] for name in expected} == expected
    assert told["features"] == {"site": "ffn", "tokens": 4, "across": False}


def test_paper_draws_tokens_across_the_batch(shell: Shell, tmp_path: Path) -> None:
    ran = shell("optin", *score_options(tmp_path / "work", "--scorer", "exact", "--paper"))
    assert ran.code == 0, ran.err
    assert found_in(tmp_path / "work").provenance["features"] == {"site": "ffn", "tokens": 768, "across": True}
    found, other = found_in(tmp_path / "work").scores, plain("--scorer", "exact").scores
    assert not any(torch.equal(found[name], other[name]) for name in other)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--paper"], ["--paper", "--scorer exact"]),
        (["--scorer", "bogus"], ["'bogus'", "sketch, exact"]),
        (["--weighting", "bogus"], ["--weighting 'bogus'", "paper, normalised, output"]),
        (["--features", "bogus"], ["--features 'bogus'", "block, ffn"]),
        (["--tokens", 1], ["--tokens 1", "possible are 2 to"]),
        (["--probes", 0], ["--probes 0", "possible are 1 to"]),
        (["--kl-weight", -1], ["--kl-weight"]),
        (["--memory-budget", "2GB"], ["--memory-budget '2GB'", "512MiB"]),
        (["--memory-budget", "0"], ["--memory-budget '0'", "512MiB"]),
        (["--memory-budget", "-1MiB"], ["--memory-budget '-1MiB'", "512MiB"]),
        (["--shard", "0/4"], ["--shard 0/4", "1/4 to 4/4"]),
        (["--shard", "5/4"], ["--shard 5/4", "1/4 to 4/4"]),
        (["--shard", "x"], ["--shard 'x'", "i/N", "1/4"]),
        (["--shard", "1/0"], ["--shard '1/0'", "i/N"]),
        (["--ray", "two"], ["--ray"]),
        (["--ray", 0], ["--ray"]),
        (["--ray", 2, "--shard", "1/4"], ["--ray", "leave out --shard"]),
        (["--scorer", "exact", "--paper", "--tokens", 5], ["--paper", "leave out --features and --tokens"]),
        (["--scorer", "exact", "--paper", "--features", "ffn"], ["--paper", "leave out --features and --tokens"]),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_an_impossible_option_is_refused_and_nothing_is_written(
    shell: Shell, tmp_path: Path, flags: list[object], says: list[str]
) -> None:
    out = tmp_path / "work"
    for more in ([], ["--dry-run"]):
        ran = shell("optin", *score_options(out, *flags, *more))
        assert ran.code == 2
        assert "Traceback" not in ran.err
        plain_words = " ".join(re.sub(r"[│\n]", " ", ran.err).split())
        assert [part for part in says if part not in plain_words] == [], plain_words
        assert not out.exists()


@pytest.mark.parametrize("flags", [["--memory-budget", "2GB"], ["--weighting", "bogus"], ["--paper"]])
def test_export_refuses_them_too_also_in_a_dry_run(shell: Shell, tmp_path: Path, flags: list[str]) -> None:
    out = tmp_path / "work"
    common = [bert(), "--calibration", lines(), "--seq-len", SEQ_LEN, "--out", out, *flags]
    for more in ([], ["--dry-run"]):
        ran = shell("optin-export", *common, *more)
        assert ran.code == 2
        assert flags[0] in ran.err
        assert not out.exists()


@pytest.mark.parametrize("scorer", ["sketch", "exact"])
def test_a_budget_below_one_sample_is_refused_with_one_that_works(shell: Shell, tmp_path: Path, scorer: str) -> None:
    out = tmp_path / "work"
    ran = shell("optin", *score_options(out, "--scorer", scorer, "--memory-budget", "1KiB"))
    assert ran.code == 2
    told = re.search(r"takes ([\d.]+) MiB, .* Give --memory-budget (\d+MiB) or more", ran.err)
    assert told, ran.err
    assert float(told[1]) <= int(told[2][:-3])
    assert names(out) == {"source.json"}
    ran = shell("optin", *score_options(out, "--scorer", scorer, "--memory-budget", told[2]))
    assert ran.code == 0, ran.err
    memory = found_in(out).provenance["memory"]
    assert memory["budget_bytes"] == int(told[2][:-3]) * 2**20
    assert memory["row_bytes"] <= memory["budget_bytes"]
    check(out, "--scorer", scorer)  # the budget changes nothing but the batches


def test_export_keeps_to_the_budget_and_reports_how_it_scored(shell: Shell, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--engine", "torch", "--no-dense", "--align", 8, "--seed", 3, "--weighting", "output"]
    common = [bert(), "--calibration", lines(), "--seq-len", SEQ_LEN, "--out", out, *flags]
    assert shell("optin-export", *common, "--memory-budget", "1KiB").code == 2
    ran = shell("optin-export", *common, "--memory-budget", "2MiB")
    assert ran.code == 0, ran.err
    settings = json.loads((out / "report.json").read_text())["settings"]
    assert settings["seed"] == settings["scoring"]["seed"] == found_in(out).provenance["seed"] == 3
    assert settings["scoring"]["weighting"] == found_in(out).provenance["weighting"] == "output"
    assert found_in(out).provenance["memory"]["budget_bytes"] == 2 * 2**20


@pytest.mark.parametrize("flags", [[], ["--shard", "1/2"], ["--ray", 2], ["--memory-budget", "1KiB"]], ids=str)
def test_a_dry_run_writes_nothing(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[object]
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = shell("optin", *score_options(Path("work"), *flags, "--dry-run"))
    assert ran.code == 0, ran.err
    assert "nothing was written" in ran.out
    assert "work/scores.safetensors" in ran.out
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_over_parts_leaves_them(shell: Shell, tmp_path: Path) -> None:
    out = tmp_path / "work"
    shell("optin", *score_options(out, "--shard", "1/2"))
    before = snapshot(out)
    assert shell("optin", *score_options(out, "--shard", "2/2", "--dry-run")).code == 0
    assert snapshot(out) == before


def test_help_has_a_panel_for_scoring_and_one_for_many_processes_with_examples(shell: Shell) -> None:
    said = shell("optin", "score", "--help").out
    panels = {title: said.split(f" {title} ─")[1].split("╰")[0] for title in ("Scoring", "Many processes")}
    for option in ("--scorer", "--paper", "--weighting", "--kl-weight", "--features", "--tokens", "--probes"):
        assert option in panels["Scoring"]
    assert "--memory-budget" in panels["Scoring"]
    assert "--shard" in panels["Many processes"]
    assert "--ray" in panels["Many processes"]
    assert "torchrun --nproc-per-node=4 --max-restarts=3 -m optin_deploy score" in " ".join(said.split())
    assert "--shard 2/8" in said
    export = shell("optin", "export", "--help").out
    assert "--memory-budget" in export.split(" Scoring ─")[1].split("╰")[0]
    assert "--shard" not in export


# Ctrl-C


@pytest.mark.slow
def test_after_ctrl_c_the_same_command_goes_on_and_scores_no_finished_part_again(shell: Shell, tmp_path: Path) -> None:
    out, log = tmp_path / "work", Log(tmp_path / "log")
    options = score_options(out, "--scorer", "exact")
    arguments = [ROOT / "tests", PIECES, log.path, *options]
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, *map(str, arguments)], stderr=subprocess.PIPE, text=True, env=environment()
    )
    deadline = time.monotonic() + 240  # imports and the export of the model come first
    while len(log.parts("finished")) < 5 and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    said = child.communicate(timeout=60)[1]
    assert child.returncode == 130, said
    assert "run the same command again" in said
    assert "Traceback" not in said
    assert temporary_files(out) == []
    assert names(out) == {"source.json", "parts"}
    done = log.parts("finished")
    assert 5 <= len(done) < 40
    with pytest.MonkeyPatch.context() as patch, watched(log):
        patch.setattr(unit_parts, "UNITS_A_PART", PIECES)
        ran = shell("optin", *options)
    assert ran.code == 0, ran.err
    assert "Wrote" in ran.out
    assert log.scored_again() == []
    assert len(log.parts("finished")) == len(set(log.parts("finished"))) == PARTS
    check(out, "--scorer", "exact")
