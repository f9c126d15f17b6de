"""Labels against the model: unknown, half, in another order, of numbers; what is refused and what only told."""

from __future__ import annotations

import json
import logging
import re
import shutil
from dataclasses import replace
from functools import cache
from itertools import pairwise, permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from scipy.stats import binom, binomtest
from torch import nn

from optin_deploy.checkpoint.loading import load_dense
from optin_deploy.data.label_order import at_least, check_order, compared, upper_bound
from optin_deploy.data.labels import class_index, classifies
from optin_deploy.errors import BadInput, QualityLimit
from optin_deploy.feeds.rows import Feeds
from optin_deploy.jobs.prepared import prepare
from optin_deploy.jobs.sweep import SweepPoint, smallest_within
from optin_deploy.pruning.source import Source
from optin_deploy.quality.quality import Quality
from support.tiny_checkpoint import CLASSES, SEQ_LEN, classifier, labelled, lines, texts, vit

# What a label stands for


@pytest.mark.parametrize(
    ("names", "label", "index"),
    [
        (CLASSES, "business", 1),
        (CLASSES, 1, 1),
        (("1", "2", "3"), 1, 0),  # ratings: a name first
        (("1.0", "2.0", "3.0"), 1, 0),  # 1.0 in a table is read as 1
        (("cat", "7", "dog"), 1, 1),  # not all names are numbers
        (("01", "02"), "02", 1),
        (("0", "1"), 0, 0),
    ],
)
def test_a_label_is_a_name_or_else_an_index(names: tuple[str, ...], label: str | int, index: int) -> None:
    assert class_index(label, names) == index


@pytest.mark.parametrize("label", [0, 4, "0"])
def test_where_all_names_are_numbers_other_numbers_are_no_indices(label: str | int) -> None:
    """Of labels 0, 1, 2 beside the names 1, 2, 3, the 0 was taken as an index, and the others as names."""
    with pytest.raises(BadInput, match=r"not one of the model's \(1, 2, 3\)\.") as refused:
        class_index(label, ("1", "2", "3"))
    assert repr(label) in str(refused.value)


def test_a_refused_label_is_told_with_the_possible_ones() -> None:
    with pytest.raises(BadInput, match=r"label 'politics' is not .*\(arts, business, sport; or 0 to 2\)"):
        class_index("politics", CLASSES)


@pytest.mark.parametrize(
    ("entries", "classes"), [({}, True), ({"problem_type": "regression"}, False), ({"num_labels": 1}, False)]
)
def test_one_number_or_several_of_a_regression_are_no_classes(entries: dict[str, Any], classes: bool) -> None:
    class ToyForSequenceClassification(nn.Module):
        """Only its config matters."""

        config = SimpleNamespace(**{"num_labels": 3, **entries})

    assert classifies(ToyForSequenceClassification()) == classes


def test_a_name_that_two_classes_share_is_no_label() -> None:
    names = ("arts", "other", "other")
    with pytest.raises(BadInput, match="'other' is the name of 2 classes"):
        class_index("other", names)
    assert [class_index(label, names) for label in ("arts", 1, 2)] == [0, 1, 2]


# Another order


def sampled(
    rows: int, classes: int, right: float, seed: int = 0, share: float | None = None
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Classes of rows, and predictions of which a part is right; share: of class 0."""
    rng = np.random.default_rng(seed)
    shares = None if share is None else [share, *[(1 - share) / (classes - 1)] * (classes - 1)]
    true = rng.choice(classes, rows, p=shares)
    wrong = (true + rng.integers(1, classes, rows)) % classes
    return true, np.where(rng.random(rows) < right, true, wrong)


def test_the_bounds_are_those_of_the_binomial_distribution() -> None:
    for right, count, share in ((0, 9, 0.3), (3, 9, 0.3), (9, 9, 0.3), (40, 60, 0.5), (1, 1, 0.9)):
        assert at_least(right, count, share) == pytest.approx(binom.sf(right - 1, count, share))
        wanted = binomtest(right, count).proportion_ci(0.98, method="exact").high
        assert upper_bound(right, count) == pytest.approx(wanted)


@pytest.mark.parametrize("order", list(permutations(range(4)))[1:])
def test_another_order_is_found(order: tuple[int, ...]) -> None:
    true, predicted = sampled(120, 4, 0.9)
    labels = np.array(order)[true]
    found = compared(labels, predicted, 4)
    assert found.right == int((labels == predicted).sum())
    assert found.other == {label: int(np.argsort(order)[label]) for label in range(4)}
    fitting = max(int((np.array(each)[labels] == predicted).sum()) for each in permutations(range(4)))
    assert found.fitting == fitting
    fixed = sum(i == j for i, j in enumerate(order))
    assert found.verdict == ("unclear" if fixed == 2 else "refused")


def test_another_order_is_found_where_classes_take_turns() -> None:
    labels = np.arange(60) % 2
    assert compared(labels, 1 - labels, 2).other == {0: 1, 1: 0}


def test_the_order_is_told_by_names(caplog: pytest.LogCaptureFixture) -> None:
    true, predicted = sampled(60, 3, 0.93)
    with pytest.raises(BadInput, match=r"eval\.jsonl: the dense model is right on \d of 60 labelled rows") as refused:
        check_order((true + 1) % 3, predicted, CLASSES, "eval.jsonl")
    for part in ("'arts' -> 'sport', 'business' -> 'arts', 'sport' -> 'business'", "another order", "id2label"):
        assert part in str(refused.value)
    swapped = np.array([1, 0, *range(2, 10)])
    true, predicted = sampled(300, 10, 0.9)
    check_order(swapped[true], predicted, [f"class {i}" for i in range(10)], "eval.jsonl")  # most are right
    assert "'class 0' -> 'class 1', 'class 1' -> 'class 0' (label" in caplog.text


@pytest.mark.parametrize(
    ("count", "classes", "right", "share"),
    [(12, 3, 0.6, None), (60, 3, 0.5, None), (40, 2, 0.6, None), (400, 2, 0.58, None), (12, 2, 0.9, 0.9),
     (100, 1000, 0.1, None), (2000, 3, 0.95, 1.0), (6, 3, 0.4, None), (200, 5, 0.4, 0.6)],
)  # fmt: skip
def test_a_weak_but_honest_model_is_not_refused(count: int, classes: int, right: float, share: float | None) -> None:
    for seed in range(20):
        assert compared(*sampled(count, classes, right, seed, share), classes).verdict != "refused"


@pytest.mark.parametrize(
    ("count", "classes", "share", "verdict"),
    [(900, 3, None, "refused"), (900, 2, None, "refused"), (1000, 2, 0.95, "unclear"), (9, 3, None, "unclear")],
)
def test_a_constant_prediction_is_guessing(count: int, classes: int, share: float | None, verdict: str) -> None:
    """Where it is the most frequent class of unequal ones, that is only told."""
    true, _ = sampled(count, classes, 1.0, 1, share)
    assert compared(true, np.zeros_like(true), classes).verdict == verdict


def test_labels_at_random_are_guessing() -> None:
    rng = np.random.default_rng(0)
    for classes in (2, 3, 10):
        assert compared(*rng.integers(0, classes, (2, 2000)), classes).verdict == "refused"
    labels, predicted = sampled(100, 1000, 0.9)
    assert compared(np.random.default_rng(1).permutation(1000)[labels], predicted, 1000).verdict == "refused"


# A gain is no loss


@pytest.mark.parametrize(
    ("found", "holds"),
    [
        (Quality("accuracy", 0.9, 0.9, 100), True),
        (Quality("accuracy", 0.9, 0.89, 100), True),
        (Quality("accuracy", 0.9, 0.88, 100), False),
        (Quality("accuracy", 0.9, 0.94, 100), True),  # so much is noise
        (Quality("accuracy", 4 / 60, 13 / 60, 60), False),
        (Quality("accuracy", 0.0, 0.5, 60), False),
        (Quality("accuracy", 1.0, 1.0, 60), True),
        (Quality("accuracy", 0.0, 0.0, 60), True),
        (Quality("same_prediction", 1.0, 1.0, 60), True),
        (Quality("cosine_to_dense", 1.0, 1.0000001, 60), True),
        (Quality("spearman", 0.8, 0.85, 40), True),
        (Quality("spearman", 0.5, 0.8, 40), False),
        (Quality("spearman", 0.98, 1.0, 8), True),
        (Quality("spearman", -1.0, 0.0, 20), False),  # a dead network is no better than one that ranks backwards
        (Quality("spearman", -0.1, -0.1, 8), False),
        (Quality("spearman", 0.5, 1.0, 3), True),
        (Quality("ndcg_at_10", 0.73, 0.8, 40), True),
        (Quality("ndcg_at_10", 0.73, 0.93, 40), False),
        (Quality("recall_at_10", 0.2, 0.5, 40), False),
    ],
)
def test_a_gain_beyond_noise_does_not_hold(found: Quality, holds: bool) -> None:
    assert found.holds(1.0) == holds


def test_no_budget_is_chosen_by_a_gain() -> None:
    def at(flops: float) -> SweepPoint:
        return SweepPoint(flops, flops, 1, Quality("accuracy", 4 / 60, 13 / 60, 60), 0.0)

    with pytest.raises(QualityLimit, match=r"accuracy goes from 0\.0667 to 0\.2167: .*--eval rows"):
        smallest_within(1.0, 0.1, at)


# In a job


@cache
def judging() -> tuple[dict[str, str], ...]:
    """Rows that calibration does not have, labelled by the classifier itself."""
    dense = load_dense(str(classifier()))
    found = []
    for first, second in pairwise(texts()):
        text = " ".join((*second.split()[::2], *first.split()[1::2]))
        encoded = dense.preprocessor(text, truncation=True, max_length=SEQ_LEN, return_tensors="pt")
        with torch.inference_mode():
            found.append({"text": text, "label": CLASSES[int(dense.model(**encoded).logits.argmax())]})
    return tuple(found)


def written(path: Path, data: Any) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in data))
    return str(path)


def moved(data: Any) -> list[dict[str, str]]:
    return [row | {"label": CLASSES[(CLASSES.index(row["label"]) + 1) % 3]} for row in data]


def source(**options: Any) -> Source:
    return replace(Source(str(classifier()), calibration=str(lines()), seq_len=SEQ_LEN), **options)


def test_eval_labels_in_another_order_are_refused_before_any_work(tmp_path: Path) -> None:
    path = written(tmp_path / "moved.jsonl", moved(judging()))
    with pytest.raises(BadInput, match=r"moved\.jsonl: the dense model is right on 0 of 59 .*No loss of accuracy"):
        prepare(source(evaluation=path))


def test_calibration_labels_in_another_order_are_refused_too(tmp_path: Path) -> None:
    path = written(tmp_path / "moved.jsonl", moved(map(json.loads, labelled().read_text().splitlines())))
    with pytest.raises(BadInput, match=r"moved\.jsonl: the dense model is right on 0 of 12 "):
        prepare(source(calibration=path))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_labels_that_the_model_does_not_know_do_not_stop_calibration(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = [json.loads(line) for line in labelled().read_text().splitlines()]
    path = written(tmp_path / "own.jsonl", [row | {"label": f"n{i}"} for i, row in enumerate(data)])
    found = prepare(source(calibration=path)).ready
    assert found.quality_of(found.network) == Quality("same_prediction", 1.0, 1.0, 12)
    (told,) = warnings(caplog)
    assert re.search(r"own\.jsonl: label 'n\d+' is not one of the model's \(arts, business, sport", told)
    assert "No label is used: agreement is measured" in told
    with pytest.raises(BadInput, match=r"own\.jsonl: label 'n\d+' is not one"):
        prepare(source(evaluation=path))


def test_numbers_from_one_are_other_classes_and_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = [json.loads(line) for line in labelled().read_text().splitlines()]
    path = written(tmp_path / "own.jsonl", [row | {"label": 5 + CLASSES.index(row["label"])} for row in data])
    found = prepare(source(calibration=path)).ready
    assert found.quality_of(found.network).metric == "same_prediction"
    assert re.search(r"label [567] is not one of the model's", caplog.text)


def test_half_labelled_rows_are_judged_by_those_that_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = [json.loads(line) for line in labelled().read_text().splitlines()]
    some = [row if i % 3 else {"text": row["text"]} for i, row in enumerate(data)]
    found = prepare(source(calibration=written(tmp_path / "some.jsonl", some)))
    whole = prepare(source(calibration=str(labelled())))
    assert found.key == whole.key  # calibrated on the same rows
    held_out = found.ready.rows.held_out
    assert held_out is not None
    left = held_out.labels.count(None)
    assert 0 < left < len(held_out) == 12
    assert f"{left} of the 12 rows that judge have no label: quality is that of the others" in caplog.text
    assert found.ready.quality_of(found.ready.network) == Quality("accuracy", 1.0, 1.0, 12 - left)


def test_too_few_labels_are_no_measure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = [json.loads(line) for line in labelled().read_text().splitlines()]
    few = [row if i % 4 == 0 else {"text": row["text"]} for i, row in enumerate(data)]
    found = prepare(source(calibration=written(tmp_path / "few.jsonl", few))).ready
    assert found.quality_of(found.network).metric == "same_prediction"
    assert "too few have one to measure by them" in caplog.text


@pytest.mark.usefixtures("by_torchscript")
def test_labels_of_a_regression_are_numbers(tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(classifier(), num_labels=1)
    folder = Path(shutil.copytree(classifier(), tmp_path / "model"))
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    data = [{"text": row["text"], "label": "good"} for row in judging()]
    with pytest.raises(BadInput, match="the label 'good' is no finite number"):
        prepare(replace(source(evaluation=written(tmp_path / "a.jsonl", data)), model=str(folder)))


def test_identical_rows_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "same.txt"
    path.write_text("the same line\n" * 60)
    with pytest.raises(BadInput, match=r"1 different ones among 60 calibration samples"):
        prepare(source(calibration=str(path)))


def test_texts_that_differ_only_after_the_last_token_do_not_judge(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def data(different: int) -> Source:
        start = "the " * SEQ_LEN
        same = [f"{start} and then {i} {text}" for i, text in enumerate(texts())]
        path = tmp_path / "rows.txt"
        path.write_text("\n".join([*same[different:], *(f"{text} {start}" for text in texts()[:different])]))
        return source(calibration=str(path))

    found = prepare(data(30))

    def ids(part: Feeds | None) -> set[tuple[int, ...]]:
        assert part is not None
        return {tuple(row) for batch in part.batches for row in batch["input_ids"].tolist()}

    rows = found.ready.rows
    calibration, held = ids(rows.calibration), ids(rows.held_out)  # all are cut at SEQ_LEN
    assert not calibration & held
    assert rows.held_out is not None
    assert len(held) == len(rows.held_out) == len(rows.held_out.labels)
    assert f"{12 - len(held)} rows that should judge equal a calibration row and do not count" in caplog.text
    with pytest.raises(BadInput, match=r"all 12 rows that should judge give the network the same inputs.*--seq-len"):
        prepare(data(0))


def test_eval_images_that_calibration_has_under_another_name_do_not_judge(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for index in range(16):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        for folder in ("a", "b") if index < 8 else ("b",):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / folder / f"{folder}{index}.png")
    found = prepare(Source(str(vit()), calibration=str(tmp_path / "a"), evaluation=str(tmp_path / "b"))).ready.rows
    assert found.held_out is not None
    assert len(found.held_out) == 16 - len(found.calibration)
    assert f"{len(found.calibration)} rows that should judge equal a calibration row and do not count" in caplog.text


def test_at_random_the_classifier_of_the_tests_is_not_one_sided() -> None:
    """Else the tests above would prove little."""
    assert len({row["label"] for row in judging()}) > 1
