"""`optin show`: scores as numbers and colours in the terminal, the picture, and what is told before there is a plan."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image
from rich.console import Console

from optin_deploy.jobs.workspace import Workspace
from optin_deploy.planning.plan import NetworkPlan
from optin_deploy.pruning.source import Source
from optin_deploy.reporting.score_table import (
    PALETTE,
    colour_levels,
    compact,
    facts_of,
    heatmap,
    print_scores,
    relative_error,
    spread_table,
)
from optin_deploy.scoring.unit_scores import UnitScores
from support.tiny_checkpoint import copy_of, finished_job

if TYPE_CHECKING:
    from support.tiny_checkpoint import Shell

HEADS = [[6.0, 0.06, 3.0], [0.0, 0.94]]
CELLS = [["3.0", ".03", "1.5"], ["0", ".47"]]
"""HEADS / 2, their mean."""
NAMES = ["layer.0: heads", "layer.1: heads"]
LARGE = ["layer.0: neurons", "layer.1: neurons"]
NEURONS = [[1e-3 * (1 + unit % 5) for unit in range(75)], [0.0] * 70]
PROVENANCE = {"scorer": "sketch", "samples": 1024, "probes": None, "seconds": 12.3456, "seed": 0}


def tensors(layers: Sequence[Sequence[float]]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(x, dtype=torch.float64) for x in layers)


def some_scores(*, share: float = 0.0) -> UnitScores:
    """Of two layers; errors are this share of the scores of neurons, and four fifths of it of heads."""
    scores = dict(zip(NAMES, tensors(HEADS), strict=True)) | dict(zip(LARGE, tensors(NEURONS), strict=True))
    errors = {name: values * share * (0.8 if name in NAMES else 1.0) for name, values in scores.items()}
    return UnitScores(scores, errors, "hash", PROVENANCE)


@pytest.fixture(name="work")
def _work(tmp_path: Path) -> Path:
    """An output folder as `optin score` leaves it."""
    workspace = Workspace.claim(tmp_path / "work", Source("some-bert"))
    workspace.write_scores(some_scores())
    return workspace.root


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def cells(text: str) -> list[list[str]]:
    """The numbers of a heatmap's rows."""
    return [line.split()[2:] for line in text.splitlines() if re.match(r"layer\.\d: heads", line)]


# the heatmap


def test_a_unit_is_shown_relative_to_the_mean_of_all() -> None:
    lines = heatmap(tensors(HEADS), NAMES, width=80)
    assert cells("\n".join(line.plain for line in lines)) == CELLS
    assert "mean of all 5 (2.0e+00 = 1.0)" in lines[0].plain
    assert "higher = keep" in lines[0].plain


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        *[(0, "0"), (1e-12, "~0"), (1e-9, "1e-9"), (3.4e-5, "3e-5"), (0.0094, "9e-3"), (0.0096, ".01"), (0.034, ".03")],
        *[(0.994, ".99"), (0.996, "1.0"), (1, "1.0"), (9.94, "9.9"), (9.96, "10"), (47.4, "47"), (1600, "1600")],
    ],
)
def test_a_ratio_is_compact(ratio: float, text: str) -> None:
    assert compact(ratio) == text


def test_a_compact_ratio_is_right_to_its_digits_and_fits() -> None:
    for ratio in np.exp(np.linspace(np.log(1e-9), np.log(9999), 2000)):
        text = compact(float(ratio))
        assert len(text) <= 4
        assert float(text) == pytest.approx(ratio, rel=0.5 if ratio < 0.1 else 0.06)


def test_all_zero_scores_are_said_to_be_zero() -> None:
    lines = heatmap(tensors([[0.0, 0.0], [0.0]]), NAMES, width=80)
    assert "all scores are 0" in lines[0].plain
    assert cells("\n".join(line.plain for line in lines)) == [["0", "0"], ["0"]]


def test_more_heads_than_fit_go_into_further_blocks() -> None:
    heads = [[float(i + 1) for i in range(30)], [1.0] * 25]
    lines = [line.plain for line in heatmap(tensors(heads), NAMES, width=80)][1:]
    assert max(map(len, lines)) <= 80
    headers = [line.split()[1:] for line in lines if line.startswith("group")]
    assert [int(head) for header in headers for head in header] == list(range(30))
    assert list(map(len, headers)) == [10, 10, 10], "of like width, not 14, 14 and 2"
    rows = cells("\n".join(lines))
    assert [sum(map(len, rows[layer::2])) for layer in range(2)] == [30, 25]


def test_colours_on_a_terminal_are_those_of_the_picture() -> None:
    lines = heatmap(tensors([[1.0, 10.0], [100.0]]), NAMES, width=80)
    shown = {}
    for kind, system in (("terminal", "truecolor"), ("log", None)):
        out = io.StringIO()
        console = Console(file=out, force_terminal=kind == "terminal", color_system=system, width=80)
        for line in lines:
            console.print(line)
        shown[kind] = out.getvalue()
    assert "\x1b" not in shown["log"]
    lowest, highest = "48;2;68;1;84", "48;2;253;231;37"
    assert [shown["terminal"].count(colour) for colour in (lowest, highest)] == [1, 1]
    assert tuple(to_hex(matplotlib.colormaps["viridis"](i / 9)) for i in range(10)) == PALETTE


def test_text_can_be_read_on_every_colour() -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    scores = tensors([[10 ** (i / 9) for i in range(10)]])
    line = heatmap(scores, NAMES[:1], width=80)[2]
    for span in line.spans:
        style: Any = span.style
        light, dark = sorted((luminance(style.color.name), luminance(style.bgcolor.name)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) > 4.5, "WCAG AA"  # contrast of small text


def test_levels_are_the_logarithm_between_lowest_and_highest() -> None:
    levels = colour_levels(tensors([[1.0, 10.0], [1000.0, 0.0]]))
    assert [x.tolist() for x in levels] == [pytest.approx([0, 1 / 3]), [1, 0]]
    assert [x.tolist() for x in colour_levels(tensors([[0.0], [0.0]]))] == [[0], [0]]
    assert [x.tolist() for x in colour_levels(tensors([[5.0], [5.0]]))] == [[0], [0]]
    assert [x.tolist() for x in colour_levels(tensors([[5.0], [0.0]]))] == [[1], [0]]


# neurons, errors, provenance


def test_large_groups_are_summarised() -> None:
    rng = np.random.default_rng(0)
    neurons = [list(np.exp(rng.normal(0, 3, n))) for n in (101, 70)]
    groups = dict(zip(LARGE, tensors(neurons), strict=True))
    header, rows = spread_table(groups, {name: torch.zeros_like(values) for name, values in groups.items()})
    assert header == ["group", "units", "mean", "5%", "median", "95%"]
    for name, row, values in zip(groups, rows, neurons, strict=True):
        expected = [np.mean(values), *np.quantile(values, [0.05, 0.5, 0.95])]
        assert row == [name, str(len(values)), *(f"{x:.1e}" for x in expected)]


def test_the_relative_error_is_that_of_the_median_unit_with_a_score() -> None:
    values, errors = tensors([[1.0, 2.0, 4.0, 0.0], [0.1, 1.0, 0.4, 0.0]])
    assert relative_error(values, errors) == "10.0%"  # of 10%, 50% and 10%
    assert relative_error(torch.zeros(2), torch.zeros(2)) == "-"


def test_errors_are_shown_where_they_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    print_scores(some_scores())
    assert "standard error" not in capsys.readouterr().out
    print_scores(some_scores(share=0.25))
    out = capsys.readouterr().out
    assert "relative standard error of the median unit: 20.0%" in out
    assert [line.split()[-2] for line in out.splitlines() if re.match(r"│ layer", line)] == ["25.0%", "-"]


def test_a_group_with_fewer_units_takes_no_line_where_it_has_none() -> None:
    lines = [line.plain for line in heatmap(tensors([[1.0] * 2, [1.0] * 40]), NAMES, width=80)][1:]
    assert [line.split()[0] for line in lines] == ["group", "layer.0:", *["layer.1:", "group"] * 3, "layer.1:"]


def test_long_names_are_shown_by_their_end() -> None:
    line = heatmap(tensors([[1.0, 2.0]]), ["model." * 20 + "attention: heads"], width=80)[2].plain
    assert line.startswith("...")
    assert "attention: heads" in line
    assert len(line) <= 80


def test_provenance_is_told_in_words() -> None:
    provenance = {
        **PROVENANCE,
        "peak_memory_bytes": 3 * 2**29,
        "forward_equivalents": 4.0,
        "rank_stability": {"heads": 0.98, "neurons": None},
        "paper": False,
        "load_average": [0.5, 2],
    }
    assert list(facts_of(provenance)) == [
        ("scorer", "sketch"),
        ("samples", "1,024"),
        ("seconds", "12.35"),
        ("seed", "0"),
        ("peak memory", "1.50 GiB"),
        ("forward equivalents", "4"),
        ("rank stability heads", "0.98"),
        ("paper", "no"),
        ("load average", "0.5, 2"),
    ]
    assert list(facts_of(provenance, ("weighting", "seed", "scorer"))) == [("seed", "0"), ("scorer", "sketch")]


# the command


def test_show_scores_prints_them_and_draws_them(shell: Shell, work: Path) -> None:
    before = names(work)
    ran = shell("optin", "show", "scores", work)
    assert ran.code == 0, ran.err
    assert cells(ran.out) == CELLS
    assert "some-bert" in ran.out
    assert re.search(r"samples +1,024\n", ran.out)
    assert "\x1b" not in ran.out
    assert f"Wrote {work / 'scores.png'}" in ran.out
    assert names(work) == sorted([*before, "scores.png"])
    with Image.open(work / "scores.png") as image:
        assert image.format == "PNG"


def test_show_scores_alone_means_the_current_folder(shell: Shell, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    assert shell("optin", "show", "scores").code == 0
    assert (work / "scores.png").is_file()


def test_a_folder_named_scores_is_a_folder(shell: Shell, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work.rename(work.with_name("scores")).parent)
    ran = shell("optin", "show", "scores")
    assert ran.code == 0, ran.err
    assert "Next: optin plan scores" in ran.out
    assert not Path("scores/scores.png").exists()
    assert shell("optin", "show", "scores", "scores").code == 0
    assert Path("scores/scores.png").is_file()


def test_a_dry_run_prints_and_writes_nothing(shell: Shell, work: Path) -> None:
    before = names(work)
    ran = shell("optin", "show", "scores", work, "--dry-run")
    assert ran.code == 0, ran.err
    assert cells(ran.out) == CELLS
    assert f"would write {work / 'scores.png'}" in ran.out
    assert names(work) == before


@pytest.mark.parametrize("words", [["colours", "work"], ["work", "scores"], ["scor"]])
def test_what_cannot_be_shown_is_told_with_what_can(
    shell: Shell, work: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(work.parent)
    ran = shell("optin", "show", *words)
    assert (ran.code, ran.out) == (2, "")
    assert words[0] in ran.err
    assert "optin show DIR" in ran.err
    assert "optin show scores DIR" in ran.err
    assert not (work / "scores.png").exists()


def test_before_a_plan_show_tells_what_was_scored_and_the_next_step(shell: Shell, work: Path) -> None:
    before = names(work)
    ran = shell("optin", "show", work)
    assert ran.code == 0, ran.err
    assert "4 groups, 150 units scored" in ran.out
    assert re.search(r"scorer +sketch\n", ran.out)
    assert f"Next: optin plan {work}" in ran.out
    assert f"optin show scores {work}" in ran.out
    assert names(work) == before


def test_with_a_plan_show_prints_the_plan(shell: Shell, work: Path) -> None:
    NetworkPlan({"layer.0: heads": (0, 2), "layer.1: neurons": tuple(range(40))}).write(work / "plan.json")
    ran = shell("optin", "show", work)
    assert ran.code == 0, ran.err
    assert "There stay 4 of 5 heads, 115 of 145 neurons." in ran.out
    assert "Nothing was cut in 2 of 4 groups: 1 of heads, 1 of neurons." in ran.out
    found = [re.split(r" *│ *", line)[1:3] for line in ran.out.splitlines() if line.startswith("│")]
    assert found == [["layer.0", "2 of 3 heads"], ["layer.1", "40 of 70 neurons"]]
    assert "Next" not in ran.out


def test_a_finished_job_tells_what_stays_once(shell: Shell, finished: Path) -> None:
    ran = shell("optin", "show", finished)
    assert ran.code == 0, ran.err
    assert ran.out.count("keeps ") == ran.out.count("There stay ") == ran.out.count("# Pruning report") == 1
    plan = json.loads((finished / "plan.json").read_text())
    plan["keep"]["bert.encoder.layer.0: neurons"].pop()
    (finished / "plan.json").write_text(json.dumps(plan))
    newer = shell("optin", "show", finished).out
    assert newer.count("There stay ") == 2, "the report is about another plan"


@pytest.mark.parametrize("words", [[], ["scores"]])
def test_damaged_scores_are_refused_and_nothing_is_drawn(shell: Shell, work: Path, words: list[str]) -> None:
    name = "scores.safetensors"
    (work / name).write_text("{")
    ran = shell("optin", "show", *words, work)
    assert ran.code == 2
    assert name in ran.err
    assert "optin score" in ran.err
    assert not (work / "scores.png").exists()


def test_without_scores_and_plan_show_says_what_to_run(shell: Shell, work: Path) -> None:
    for path in work.glob("scores.*"):
        path.unlink()
    assert "optin plan" in shell("optin", "show", work).err
    ran = shell("optin", "show", "scores", work)
    assert ran.code == 2
    assert "optin score" in ran.err


def test_a_report_of_any_size_is_not_printed(shell: Shell, tmp_path: Path) -> None:
    folder = copy_of(finished_job(), tmp_path / "work")
    os.truncate(folder / "report.md", 2**40)
    ran = shell("optin", "show", folder)
    assert ran.code == 2
    assert f"{folder / 'report.md'} has 1099511627776 bytes" in ran.err
