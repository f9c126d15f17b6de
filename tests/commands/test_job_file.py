"""`optin-export --config JOB.toml`, and the job.toml beside each result."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from optin_deploy.commands.values import options
from support.tiny_checkpoint import POSITIONS, SEQ_LEN, Shell, bert, classifier, labelled, lines, text_options

ASKED = f"""
model = "model"
calibration = "lines.txt"
seq-len = {SEQ_LEN}
flops = 0.7
allocation = "uniform"
at = ["batch=2,seq=8"]
threads = 1
dense = false
out = "made"
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a model, its rows and a job."""
    (tmp_path / "model").symlink_to(bert(), target_is_directory=True)
    (tmp_path / "lines.txt").write_text(lines().read_text())
    (tmp_path / "job.toml").write_text(ASKED.replace('at = ["batch=2,seq=8"]\nthreads = 1\n', ""))
    return tmp_path


def test_a_file_says_what_options_say_and_the_result_says_it_again(
    shell: Shell, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.parent)  # paths of a file are of its own folder
    ran = shell("optin-export", "--config", place / "job.toml")
    assert ran.code == 0, ran.err
    beside = place / "made" / "job.toml"
    expected = tomllib.loads((place / "job.toml").read_text())
    paths = {"model": str(place / "model"), "calibration": str(place / "lines.txt")}
    assert tomllib.loads(beside.read_text()) == {**{k: v for k, v in expected.items() if k != "out"}, **paths}
    again = shell("optin-export", "--config", beside, "--out", place / "again", "--dry-run")
    assert again.code == 0, again.err
    assert "budget       --flops 0.7" in again.out
    other = shell("optin-export", "--config", beside, "--out", place / "again", "--dry-run", "--flops", 0.5)
    assert "budget       --flops 0.5" in other.out, "what is typed wins"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("flopps = 0.5", "flopps is no option of a job. Did you mean flops? Possible are align, allocation"),
        ("config = 'x.toml'", "config is no option of a job"),
        ("flops = true", "flops = true; flags are true or false"),
        ("dense = 'no'", 'dense = "no"; flags are true or false'),
        ("at = 'batch=1'", 'at = "batch=1"; give a list of values'),
        ("flops = [0.5]", "flops = [0.5]; give one value"),
        ("task = ''", 'task = ""; give one value'),
        ("[flops]\nshare = 1", 'flops = {"share": 1}; give one value'),
        ("flops = ", "cannot be read"),
        ("at = ['batch=1']\ndense = false", "--at would do nothing: with --no-dense nothing is measured"),
    ],
)
def test_a_wrong_file_is_refused_with_what_is_possible(shell: Shell, tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "job.toml").write_text(f"{line}\n")
    ran = shell("optin-export", bert(), "--config", tmp_path / "job.toml", "--out", tmp_path / "out")
    assert ran.code == 2
    assert said in ran.err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_a_refused_job_leaves_the_file_of_the_finished_one(shell: Shell, finished: Path) -> None:
    before = (finished / "job.toml").read_text()
    ran = shell("optin-export", classifier(), *text_options(labelled(), finished), "--at", f"seq={POSITIONS + 1}")
    assert ran.code == 2, ran.err
    assert f"1 to {POSITIONS} tokens" in ran.err
    assert (finished / "job.toml").read_text() == before


def test_a_value_of_another_type_is_told_as_on_the_command_line(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text("flops = 'much'\n")
    ran = shell("optin-export", bert(), "--config", tmp_path / "job.toml")
    assert ran.code == 2
    assert "--flops" in ran.err


@dataclass(frozen=True)
class Inner:
    """One of them."""

    depth: Annotated[int, typer.Option(help="How deep.")] = 3


@dataclass(frozen=True)
class Outer:
    """Both."""

    name: Annotated[str, typer.Option(help="Which.")]
    inner: Inner


def test_fields_of_values_are_options_with_their_types_defaults_and_help() -> None:
    called: list[object] = []
    app = typer.Typer()

    @app.command()
    @options
    def command(outer: Outer, place: Annotated[Path, typer.Argument()]) -> None:
        """Do it."""
        called.extend((outer, place))

    assert CliRunner().invoke(app, ["here", "--name", "one", "--depth", "4"]).exit_code == 0
    assert called == [Outer("one", Inner(4)), Path("here")]
    assert CliRunner().invoke(app, ["here"]).exit_code == 2, "--name has no default"
    helped = CliRunner().invoke(app, ["--help"]).output
    assert "How deep." in helped
    assert "default: 3" in helped
