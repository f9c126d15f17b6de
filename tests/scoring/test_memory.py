"""Memory is measured on one sample, held against what is free, and changes no score."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from optin_deploy.errors import BadInput
from optin_deploy.scoring import memory as memory_module
from optin_deploy.scoring.memory import SHARE, Memory, PeakBytes, free_bytes, measured, micro_batches, peak_bytes
from optin_deploy.scoring.settings import Features, ScoreSettings
from optin_deploy.scoring.subject import Subject
from optin_deploy.scoring.unit_job import score_units
from optin_deploy.scoring.unit_scores import UnitScores
from support.tiny_scoring import bert, image_batch, masked_lm, one_thread, subject_of, text_batch, vit

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)

CPU = torch.device("cpu")
TEXT = [text_batch((3, 7, 5)), text_batch((6, 2), padding=1, seed=1)]
MODELS: dict[str, Callable[[], Any]] = {
    "3 classes": bert,
    "12 classes": lambda: bert(labels=12),
    "words": masked_lm,
    "images": vit,
}


@cache
def subject(name: str = "3 classes") -> Subject:
    return subject_of(MODELS[name]())


KIB = 1024


def kib(count: float = 1) -> torch.Tensor:
    """A tensor of so many KiB."""
    return torch.zeros(int(count * KIB), dtype=torch.uint8)


def chain() -> None:
    a = kib(4)  # 4
    b = a + 1  # 8
    del a  # 4
    c = torch.cat([b, b])  # 12
    del b  # 8
    c.add_(1)  # 8, in place
    c.view(2, -1)[0].t()  # 8, a view
    kib(1)  # 9


def inside_an_expression() -> None:
    a = kib(1)
    ((a + 1) + 1) + 1  # a, the sum in hand and the next one


def keeps_nothing() -> None:
    for _ in range(5):
        kib(2)


@pytest.mark.parametrize(("work", "most"), [(chain, 12), (inside_an_expression, 3), (keeps_nothing, 2)])
def test_the_peak_of_a_chain_of_operations_is_that_of_a_count_by_hand(work: Callable[[], None], most: int) -> None:
    with PeakBytes() as peak:
        work()
    assert peak.most == most * KIB


def test_what_was_there_before_does_not_count() -> None:
    a = kib(8)
    with PeakBytes() as peak:
        a.add_(1)
        b = a[: 2 * KIB] + 1
        del a, b
        kib(1)
    assert peak.most == 2 * KIB


def test_a_backward_pass_counts_what_the_graph_keeps() -> None:
    """exp keeps its result: three links of 4 KiB, the sum of 4 bytes, and while it runs back at most two gradients."""
    x = torch.zeros(KIB, requires_grad=True)  # 4 KiB, before
    with PeakBytes() as forward:
        y = x.exp().exp().exp()
    assert forward.most == 3 * 4 * KIB
    del y
    with torch.no_grad(), PeakBytes() as without:
        y = x.exp().exp().exp()
    assert without.most == 2 * 4 * KIB
    del y
    with PeakBytes() as both:
        y = x.exp().exp().exp()
        total = y.sum()
        del y
        (gradient,) = torch.autograd.grad(total, x, retain_graph=True)
    assert torch.isfinite(gradient).all()
    assert both.most == pytest.approx(5 * 4 * KIB, abs=64)


def test_an_error_inside_is_raised_and_ends_the_count() -> None:
    with pytest.raises(KeyError), PeakBytes() as peak:
        kib(1)
        raise KeyError
    before = peak.most
    kib(5)
    assert peak.most == before == KIB


# --- what is free ---------------------------------------------------------------------------------------------


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(text)


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 1000),
        ({"memory_max": "max\n", "memory_current": "400\n"}, 1000),
        ({"memory_max": "700\n", "memory_current": "400\n"}, 300),
        ({"memory_max": "7000\n", "memory_current": "400\n"}, 1000),
        ({"memory_max": "700\n", "memory_current": "900\n"}, 0),
        ({"memory_max": "700\n"}, 1000),
        ({"memory_max": "700\n", "memory_current": "690\n", "memory_stat": "anon 90\ninactive_file 500\n"}, 510),
        ({"memory_max": "700\n", "memory_current": "690\n", "memory_stat": "inactive_file\n"}, 10),
    ],
)
def test_free_memory_lies_within_the_limit_of_the_container(
    files: dict[str, str], free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, **files)
    monkeypatch.setattr(memory_module, "CGROUP", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert free_bytes(CPU) == free
    assert measured(lambda: kib(0), CPU, None) == Memory(int(SHARE * free), 1) if free else True


def test_the_peak_of_the_process_is_resident_memory() -> None:
    found = peak_bytes(CPU)
    assert psutil.Process().memory_info().rss <= found + 2**20
    assert found < 2**40


# --- how many samples fit -------------------------------------------------------------------------------------


def test_rows_are_whole_samples() -> None:
    assert [Memory(budget, 100).rows for budget in (100, 199, 200, 1050)] == [1, 1, 2, 10]


def test_micro_batches_hold_the_same_samples_in_order() -> None:
    batches = [text_batch((3, 7, 5, 2, 4)), text_batch((6, 2), seed=1)]
    for limit, sizes in ((1, [1] * 7), (2, [2, 2, 1, 2]), (3, [3, 2, 2]), (100, [5, 2])):
        found = micro_batches(batches, limit)
        assert [len(batch["input_ids"]) for batch in found] == sizes
        ids = [row for batch in found for row in batch["input_ids"].tolist()]
        assert ids == [row for batch in batches for row in batch["input_ids"].tolist()]
        assert all(batch.keys() == batches[0].keys() for batch in found)


@pytest.mark.parametrize("scorer", ["exact", "sketch"])
def test_a_budget_below_one_sample_is_refused_with_what_one_takes(scorer: str) -> None:
    settings = ScoreSettings(scorer, probes=2)
    before = score_units(subject(), TEXT, settings).provenance["memory"]["row_bytes"]
    with pytest.raises(BadInput, match=r"one sample takes \d\.\d MiB, but the memory budget is \d\.\d MiB") as caught:
        score_units(subject(), TEXT, settings, memory_budget=before - 1)
    assert "Give --memory-budget 1MiB or more, or a smaller --seq-len" in str(caught.value)
    score_units(subject(), TEXT, settings, memory_budget=before)


def test_the_advised_budget_is_enough() -> None:
    with pytest.raises(BadInput) as caught:
        measured(lambda: kib(3 * KIB + 1), CPU, 5)
    (advised,) = re.findall(r"--memory-budget (\d+)MiB", str(caught.value))
    assert measured(lambda: kib(3 * KIB + 1), CPU, int(advised) * 2**20).rows == 1


def test_a_batch_whose_tokens_are_drawn_together_is_never_divided() -> None:
    """With `--paper` a smaller batch would be another draw, and other scores."""
    settings = ScoreSettings("exact", features=Features("ffn", 6, across=True))
    batch = text_batch((6, 5, 4, 6))
    free = score_units(subject(), [batch], settings)
    row = free.provenance["memory"]["row_bytes"]
    with pytest.raises(BadInput, match="scoring 4 samples at once takes"):
        score_units(subject(), [batch], settings, memory_budget=3 * row)
    found = score_units(subject(), [batch], settings, memory_budget=4 * row)
    for a, b in zip(all_of(found), all_of(free), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-18)


def all_of(found: UnitScores) -> list[torch.Tensor]:
    return [*found.scores.values(), *found.errors.values()]


MANY: list[tuple[str, list[Any]]] = [
    ("3 classes", [text_batch((7, 4)), text_batch((5,), seed=1)]),
    ("words", [text_batch((6, 4))]),
    ("images", [image_batch(2)]),
]


@pytest.mark.parametrize("scorer", ["exact", "sketch"])
@pytest.mark.parametrize(("name", "batches"), MANY, ids=[name for name, _ in MANY])
def test_a_tight_budget_is_kept_and_changes_no_score(name: str, batches: list[Any], scorer: str) -> None:
    settings = ScoreSettings(scorer, features=Features(tokens=4), probes=3)
    free = score_units(subject(name), batches, settings)
    row = free.provenance["memory"]["row_bytes"]
    data = sum(value.nbytes for batch in batches for value in batch.values())
    for samples in (1, 2):
        with PeakBytes() as peak:
            found = score_units(subject(name), batches, settings, memory_budget=samples * row)
        told = found.provenance["memory"]
        assert (told["budget_bytes"], told["row_bytes"], told["rows"]) == (samples * row, row, samples)
        for a, b in zip(all_of(found), all_of(free), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-18)
        # Samples are copied to be drawn; the rest is sums and the like.
        assert peak.most < 1.06 * samples * row + data


def test_without_a_budget_most_of_what_is_free_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optin_deploy.scoring.memory.free_bytes", lambda device: 10**9)
    told = score_units(subject("images"), [image_batch(2)], ScoreSettings("exact")).provenance["memory"]
    assert told["budget_bytes"] == 0.8 * 10**9
    assert told["rows"] == told["budget_bytes"] // told["row_bytes"]
    assert told["peak_bytes"] >= 2**20


def test_a_sample_is_measured_on_the_longest_text() -> None:
    def row(batches: list[Any], **options: Any) -> int:
        found = score_units(subject("12 classes"), batches, ScoreSettings(**options))
        return int(found.provenance["memory"]["row_bytes"])

    short, long = text_batch((4,)), text_batch((16,))
    assert row([short, long], probes=1) == row([long, short, short], probes=1)
    assert row([long], probes=1) > row([short], probes=1)
    assert row([long], probes=12) > row([long], probes=1), "all projections of one sample at once"
    assert row([long], scorer="exact") < row([long], probes=1)
