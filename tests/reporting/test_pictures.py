"""scores.png shows what the scores are: colours by log10 of the score, ranks, and one curve a layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from optin_deploy.reporting.pictures import ANNOTATED_COLUMNS, draw_scores
from optin_deploy.reporting.score_table import MOST_CELLS
from optin_deploy.scoring.unit_scores import UnitScores

LOWEST, MIDDLE, HIGHEST, WHITE = (68, 1, 84), (33, 145, 140), (253, 231, 37), (255, 255, 255)
"""Viridis at 0, 0.5 and 1, as published; and paper."""
NEURONS = [[4.0, 0.5, 2.0], [0.1, 0.3, 0.2]]


def scores_of(heads: list[list[float]], neurons: list[list[float]] | None = None, **provenance: Any) -> UnitScores:
    """`heads` are small groups; `neurons` make large ones, in which each number is that of many units."""
    both = {"heads": heads, "neurons": [[x for x in layer for _ in range(many(layer))] for layer in neurons or NEURONS]}
    scores = {
        f"layer.{n}: {kind}": torch.tensor(x, dtype=torch.float64)
        for kind, layers in both.items()
        for n, x in enumerate(layers)
    }
    return UnitScores(scores, {name: torch.zeros_like(x) for name, x in scores.items()}, "hash", provenance)


def many(layer: list[float]) -> int:
    """How often each number of a layer stands in a group that is too large for cells."""
    return MOST_CELLS // len(layer) + 1


def log_normal(layers: int, heads: int, neurons: int) -> UnitScores:
    rng = np.random.default_rng(0)
    drawn = [[list(np.exp(rng.normal(-i, 2, n))) for i in range(layers)] for n in (heads, neurons)]
    return scores_of(*drawn, scorer="sketch")


def pixels(path: Path) -> np.ndarray:
    """(height, width, 3)."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def places(image: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """(2, n): rows and columns of the pixels of one colour."""
    return np.stack(np.nonzero(np.abs(image - colour).max(-1) <= 2))


@contextmanager
def drawn_figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Figure]]:
    """The figures that are saved inside, to ask them for their texts and lines."""
    saved: list[Figure] = []
    save = Figure.savefig

    def noted(self: Figure, *args: Any, **options: Any) -> None:
        saved.append(self)
        save(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", noted)
        yield saved


def test_a_head_has_the_colour_of_the_logarithm_of_its_score(tmp_path: Path) -> None:
    draw_scores(scores_of([[1, 10], [100, 1]]), tmp_path / "scores.png")
    image = pixels(tmp_path / "scores.png")
    found = {colour: places(image, colour) for colour in (LOWEST, MIDDLE, HIGHEST)}
    cell = found[HIGHEST].shape[1]
    assert cell > 1000
    assert found[MIDDLE].shape[1] == pytest.approx(cell, rel=0.1)
    assert found[LOWEST].shape[1] == pytest.approx(2 * cell, rel=0.1)
    highest, middle = (np.median(found[colour], axis=1) for colour in (HIGHEST, MIDDLE))
    assert highest[0] > middle[0] + 20, "layer 1 is below layer 0"
    assert highest[1] < middle[1] - 20, "head 0 is left of head 1"


def test_a_head_that_a_layer_does_not_have_stays_blank(tmp_path: Path) -> None:
    draw_scores(scores_of([[1, 100], [10]]), tmp_path / "scores.png")
    image = pixels(tmp_path / "scores.png")
    column, row = np.median(places(image, HIGHEST), axis=1)[1], np.median(places(image, MIDDLE), axis=1)[0]
    around = image[int(row) - 10 : int(row) + 10, int(column) - 10 : int(column) + 10]
    assert (around == WHITE).all()


def test_zero_has_the_lowest_colour_and_differs_from_the_only_other_score(tmp_path: Path) -> None:
    draw_scores(scores_of([[0, 3], [3, 3]]), tmp_path / "scores.png")
    image = pixels(tmp_path / "scores.png")
    assert places(image, HIGHEST).shape[1] == pytest.approx(3 * places(image, LOWEST).shape[1], rel=0.1)


def test_one_dead_head_leaves_colours_to_the_others(tmp_path: Path) -> None:
    draw_scores(scores_of([[1, 1e-3], [1e-3, 1e-300]]), tmp_path / "scores.png")
    image = pixels(tmp_path / "scores.png")
    areas = [places(image, colour).shape[1] for colour in (HIGHEST, MIDDLE, LOWEST)]
    assert np.array(areas) / areas[0] == pytest.approx([1, 2, 1], rel=0.1)


def test_cells_tell_the_rank_among_all_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with drawn_figures(monkeypatch) as figures:
        draw_scores(scores_of([[3, 1], [2, 5, 0]]), tmp_path / "scores.png")
    found = {text.get_position(): text.get_text() for text in figures[0].axes[0].texts}
    ranks = {(0, 0): "2", (0, 1): "4", (1, 0): "3", (1, 1): "1", (1, 2): "5"}
    assert found == {(column + 0.5, row + 0.5): rank for (row, column), rank in ranks.items()}


def test_rows_bear_the_names_of_their_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with drawn_figures(monkeypatch) as figures:
        draw_scores(scores_of([[3, 1], [2, 5, 0]]), tmp_path / "scores.png")
    labels = [text.get_text() for text in figures[0].axes[0].get_yticklabels()]
    assert labels == ["layer.0: heads", "layer.1: heads"]


@pytest.mark.parametrize(("heads", "texts"), [(ANNOTATED_COLUMNS, 2 * ANNOTATED_COLUMNS), (ANNOTATED_COLUMNS + 1, 0)])
def test_many_heads_have_colours_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heads: int, texts: int) -> None:
    with drawn_figures(monkeypatch) as figures:
        draw_scores(log_normal(2, heads, 3), tmp_path / "scores.png")
    assert len(figures[0].axes[0].texts) == texts


def test_a_large_group_is_one_falling_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with drawn_figures(monkeypatch) as figures:
        draw_scores(scores_of([[1, 2], [3, 4]], [[4.0, 0.5, 2.0], [0.1, 0.3]]), tmp_path / "scores.png")
    curves = figures[0].axes[1]
    assert curves.get_yscale() == "log"
    found = [np.array(line.get_data()) for line in curves.lines]  # each (2, units)
    steps = many([1, 2, 3]), many([1, 2])
    assert found[0][1].tolist() == [score for score in (4.0, 2.0, 0.5) for _ in range(steps[0])]
    assert found[1][1].tolist() == [score for score in (0.3, 0.1) for _ in range(steps[1])]
    for line in found:
        assert line[0] == pytest.approx(np.arange(1, line.shape[1] + 1) / line.shape[1])
    assert len({to_hex(line.get_color()) for line in curves.lines}) == 2


def test_the_title_says_how_the_scores_were_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"scorer": "sketch", "seed": 3, "probes": None, "samples": 1024, "rank_stability": 0.98765}
    with drawn_figures(monkeypatch) as figures:
        draw_scores(scores_of([[1, 2], [3, 4]], **told), tmp_path / "scores.png")
    assert figures[0].get_suptitle() == "scorer sketch, samples 1,024, rank stability 0.9877"


@pytest.mark.parametrize(
    "scores",
    [
        scores_of([[0, 0], [0]], [[0, 0], [0, 0]]),
        scores_of([[2, 2], [2]], [[1, 1], [1, 1]]),
        scores_of([[7]], [[3]]),
        scores_of([[1e-300, 0], [1e300]], [[5e-324, 0], [0, 1e300]]),
        log_normal(6, 12, 40),
        log_normal(40, 40, 5),
    ],
    ids=["zero", "equal", "single", "extreme", "6x12", "40x40"],
)
def test_any_scores_give_a_whole_picture_and_no_warning(tmp_path: Path, scores: UnitScores) -> None:
    draw_scores(scores, tmp_path / "scores.png")
    image = pixels(tmp_path / "scores.png")
    assert 250 < image.shape[0] < 2000
    assert 800 < image.shape[1] < 2500
    half = image.shape[1] // 2
    for part in (image[:, :half], image[:, half:]):
        assert (part != 255).any(-1).mean() > 0.01, "something is drawn"
    assert (image[[0, -1]] == 255).all()
    assert (image[:, [0, -1]] == 255).all(), "nothing is cut off at the edges"


def test_a_deeper_model_has_a_higher_picture(tmp_path: Path) -> None:
    heights = []
    for layers in (12, 24):
        draw_scores(log_normal(layers, 12, 3), tmp_path / "scores.png")
        heights.append(pixels(tmp_path / "scores.png").shape[0])
    assert heights[1] > 1.5 * heights[0]


def settings() -> dict[str, Any]:
    """matplotlib's, but for the window system, which asking for it would choose."""
    return {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}


def test_the_same_scores_give_the_same_bytes_and_no_setting_is_changed(tmp_path: Path) -> None:
    before = settings()
    for name in ("first.png", "second.png"):
        draw_scores(log_normal(3, 4, 20), tmp_path / name)
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()
    assert settings() == before
    with Image.open(tmp_path / "first.png") as image:
        assert "Software" not in image.info


def test_an_old_picture_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "scores.png"
    path.write_text("old")
    draw_scores(log_normal(2, 2, 3), path)
    assert pixels(path).size
    assert [found.name for found in tmp_path.iterdir()] == ["scores.png"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_while_drawing_keeps_the_old_picture_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def half(self: Figure, path: Path, **options: Any) -> None:
        path.write_bytes(b"half")
        raise error

    path = tmp_path / "scores.png"
    path.write_text("old")
    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(error):
        draw_scores(log_normal(2, 2, 3), path)
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["scores.png"]
