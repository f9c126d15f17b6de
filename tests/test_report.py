"""What a report says: its fields as the contract names them, its arithmetic by hand, quality first."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_checkpoint import HEADS, LAYERS, finished_job
from torch import nn

from optin_deploy.bench.report import Measurement, Report, latency_rows, quality_lines, summary_rows, to_markdown
from optin_deploy.bench.timing import PairTiming
from optin_deploy.data.calibration import Batches, Sample
from optin_deploy.data.labels import check_labels
from optin_deploy.errors import BadInput
from optin_deploy.quality import Judge, Quality

TIMING = PairTiming(
    dense_ms=((6.0, 6.0, 8.0), (6.0,)),
    pruned_ms=((4.0, 4.0, 4.0), (4.0,)),
    again_ms=((6.0, 6.0, 6.0), (6.0,)),
    seed=0,
    load_ms={"dense": 30.0, "pruned": 20.0},
)
"""Medians 6 and 4 ms in both blocks: exactly 1.5x."""
MEASURED = Measurement(engine="onnx", batch=3, seq_len=16, threads=2, ideal=2.0, timing=TIMING)
ENVIRONMENT = {
    "date": "today",
    "cpu_model": "a CPU",
    "cores_logical": 2,
    "platform": "Linux",
    "versions": {"torch": "2"},
}
REPORT = Report(
    quality=Quality("cosine_to_dense", 1.0, 0.97, 12),
    params={"dense": 4_000_000, "pruned": 3_000_000},
    macs={"dense": 2e9, "pruned": 1e9, "kept": 0.5, "prunable_kept": 0.45},
    size_bytes={"pruned": 3 * 2**20, "dense": 4 * 2**20},
    parity={"masked_vs_rewritten": 1e-16, "torch_vs_engine": 2e-7},
    latency=[MEASURED],
    heads=[3, 0],
    neurons=[16, 32],
    environment=ENVIRONMENT,
    hashes={"plan": "0123456789abcdef"},
    seconds={"score": 1.0},
    settings={"flops": 0.5},
)


def stored() -> dict[str, Any]:
    """report.json of a finished job."""
    data: dict[str, Any] = json.loads((finished_job() / "report.json").read_text())
    return data


# report.json


def test_the_fields_are_those_of_the_contract() -> None:
    data = stored()
    contract = {"schema_version", "quality", "params", "macs", "size_bytes", "parity", "latency", "heads", "neurons"}
    contract |= {"environment", "hashes", "seconds"}
    assert contract <= set(data)
    assert set(data) - contract == {"settings", "notes", "memory", "groups"}  # every output file says what made it
    assert set(data["quality"]) == {"metric", "dense", "pruned", "samples"}
    assert set(data["params"]) == {"dense", "pruned"}
    assert set(data["macs"]) == {"dense", "pruned", "kept", "prunable_kept"}
    assert {"masked_vs_rewritten", "torch_vs_engine"} <= set(data["parity"])


def test_a_latency_row_has_the_fields_of_the_contract() -> None:
    (row,) = stored()["latency"]
    contract = {"engine", "precision", "batch", "seq_len", "threads", "dense", "pruned", "speedup", "ci95"}
    contract |= {"ideal", "realised", "same_ci95", "unstable", "dense_engine", "dense_precision"}
    assert set(row) == contract | {"samples_ms", "machine"}  # raw samples are kept
    assert len(row["machine"]) == 1 + 2
    assert all(state["load_average"] >= 0 for state in row["machine"])
    assert "While measuring: load_average " in (finished_job() / "report.md").read_text()
    assert (
        set(row["dense"]) == set(row["pruned"]) == {*("p50_ms", "p90_ms", "p95_ms", "p99_ms", "throughput", "load_ms")}
    )
    assert (row["engine"], row["precision"], row["batch"], row["seq_len"], row["threads"]) == ("onnx", "fp32", 1, 16, 1)
    assert [len(row["samples_ms"][name]) for name in ("dense", "pruned", "again")] == [2, 2, 2]  # blocks
    assert 0 < row["pruned"]["p50_ms"] <= row["pruned"]["p90_ms"] <= row["pruned"]["p99_ms"]
    assert row["pruned"]["load_ms"] > 0
    low, high = row["ci95"]
    assert low <= row["speedup"] <= high


def test_the_figures_of_a_stored_row_follow_from_its_raw_samples() -> None:
    data = stored()
    (row,) = data["latency"]
    for name in ("dense", "pruned"):
        every = [ms for block in row["samples_ms"][name] for ms in block]
        assert row[name]["p50_ms"] == pytest.approx(torch.tensor(every, dtype=torch.float64).quantile(0.5).item())
        assert row[name]["throughput"] == pytest.approx(1000 * row["batch"] / row[name]["p50_ms"])
    assert row["ideal"] == pytest.approx(1 / data["macs"]["kept"])  # measured at the length of the MACs
    assert row["realised"] == pytest.approx((1 - 1 / row["speedup"]) / (1 - 1 / row["ideal"]))


def test_the_macs_of_a_stored_report_by_hand() -> None:
    macs, data = stored()["macs"], stored()
    head = 4 * 16 * 48 * 8 + 2 * 16 * 16 * 8  # 4 n d h + 2 n^2 h
    neuron = 2 * 16 * 48  # 2 n d
    fixed = 48 * 48 + 48 * 3  # pooler and classifier, one token
    assert macs["dense"] == fixed + LAYERS * (HEADS * head + 96 * neuron)
    kept = sum(data["heads"]) * head + sum(data["neurons"]) * neuron
    assert macs["pruned"] == fixed + kept
    assert macs["kept"] == macs["pruned"] / macs["dense"]
    assert macs["prunable_kept"] == pytest.approx(kept / (macs["dense"] - fixed))


def test_parity_errors_are_small_numbers() -> None:
    parity = stored()["parity"]
    assert 0 <= parity["masked_vs_rewritten"] <= 1e-9
    assert all(0 <= error <= 1e-4 for error in parity.values())


def test_a_report_names_its_machine_and_its_artifacts_but_no_owner() -> None:
    data = stored()
    assert {"date", "cpu_model", "platform", "versions", "python"} <= set(data["environment"])
    assert {"plan", "layout", "dense_weights", "model.onnx", "dense.onnx"} <= set(data["hashes"])
    assert all(len(value) == 64 for value in data["hashes"].values())
    assert {"load", "score", "plan", "rewrite", "export", "check"} <= set(data["seconds"])
    assert data["memory"].keys() == data["seconds"].keys()
    assert all(2**20 < held < 2**40 for held in data["memory"].values())
    assert "MiB held at most, by stage: load " in (finished_job() / "report.md").read_text()


def test_json_of_a_report_by_hand() -> None:
    data = json.loads(json.dumps(REPORT.to_json(), allow_nan=False))
    assert data["schema_version"] == 2
    assert data["quality"] == {"metric": "cosine_to_dense", "dense": 1.0, "pruned": 0.97, "samples": 12}
    (row,) = data["latency"]
    assert row["speedup"] == pytest.approx(1.5)
    assert row["dense"]["p50_ms"] == 6.0
    assert row["dense"]["throughput"] == pytest.approx(3 / 0.006)
    assert row["pruned"]["throughput"] == pytest.approx(3 / 0.004)
    assert row["samples_ms"] == {
        "dense": [[6.0, 6.0, 8.0], [6.0]],
        "pruned": [[4.0, 4.0, 4.0], [4.0]],
        "again": [[6.0, 6.0, 6.0], [6.0]],
        "seed": 0,
    }
    assert (row["same_ci95"], row["unstable"]) == ([1.0, 1.0], False)
    assert (row["dense"]["load_ms"], row["pruned"]["load_ms"]) == (30.0, 20.0)


# ideal and realised


@pytest.mark.parametrize(
    ("dense", "pruned", "ideal", "realised"),
    [
        (6.0, 4.0, 2.0, 2 / 3),  # a third of the time saved, where a half was possible
        (8.0, 4.0, 2.0, 1.0),
        (4.0, 4.0, 2.0, 0.0),
        (4.0, 5.0, 2.0, -0.5),  # slower: a quarter lost
        (5.0, 3.0, 5 / 3, 1.0),
        (4.0, 4.0, 1.0, 1.0),  # nothing was cut
    ],
)
def test_realised_is_the_share_of_the_time_that_could_be_saved(
    dense: float, pruned: float, ideal: float, realised: float
) -> None:
    timing = replace(TIMING, dense_ms=((dense,),) * 2, pruned_ms=((pruned,),) * 2, again_ms=((dense,),) * 2)
    assert replace(MEASURED, timing=timing, ideal=ideal).realised == pytest.approx(realised)


def test_a_machine_that_differs_from_itself_is_told() -> None:
    shaky = replace(MEASURED, timing=replace(TIMING, again_ms=((4.8, 4.8, 4.8), (5.0,))))
    assert shaky.timing.unstable
    page = to_markdown(replace(REPORT, latency=[MEASURED, shaky]))
    assert page.count("Unstable") == 1
    assert "Unstable at 3 x 16: two sessions of the dense model differ by a factor of [1.20, 1.25]" in page


# report.md


def test_the_page_opens_with_quality() -> None:
    blocks = to_markdown(REPORT).split("\n\n")
    assert blocks[0].startswith("# ")
    assert blocks[1] == "Mean cosine to the dense embeddings: 0.970 (12 held-out rows, no labels)."
    assert to_markdown(REPORT).endswith("\n")


@pytest.mark.parametrize("metric", ["cosine_to_dense", "same_prediction"])
@pytest.mark.parametrize(("agreement", "warned"), [(0.949, True), (0.95, False), (1.0, False), (-0.3, True)])
def test_low_agreement_is_warned_of_at_the_top(metric: str, agreement: float, warned: bool) -> None:
    page = to_markdown(replace(REPORT, quality=Quality(metric, 1.0, agreement, 12)))
    opening = page.split("\n\n")[1]
    assert ("loss of accuracy" in opening) == warned
    assert ("labelled data" in opening) == warned
    assert f"{agreement:.3f}" in opening


def test_accuracy_is_reported_for_both_with_the_change_in_points() -> None:
    (line,) = quality_lines(replace(REPORT, quality=Quality("accuracy", 0.9, 0.875, 40)))
    assert line == "Accuracy 90.0% dense, 87.5% pruned (-2.5 points, 40 held-out rows)."


def test_the_tables_by_hand() -> None:
    assert summary_rows(REPORT) == [
        ("parameters", "4.00 M", "3.00 M", "75.0%"),
        ("MACs a sample", "2.00 G", "1.00 G", "50.0%"),
        ("file", "4.00 MiB", "3.00 MiB", "75.0%"),
    ]
    ((point, *figures),) = latency_rows([MEASURED])
    assert re.findall(r"\d+", point) == ["3", "16"]
    assert figures == ["6.00 / 7.70", "4.00 / 4.00", "500 -> 750", "1.50x [1.50, 1.50]", "67% of 2.00x"]
    assert [row[0] for row in summary_rows(replace(REPORT, size_bytes={"pruned": 1}))] == [
        "parameters",
        "MACs a sample",
    ]


def test_the_page_holds_every_part() -> None:
    page = to_markdown(replace(REPORT, notes=("A note.",)))
    for part in (
        "| 0 | 3 | 16 |",
        "| 1 | 0 | 32 |",
        "45.0%",
        "masked_vs_rewritten 1.0e-16",
        "A note.",
        "a CPU",
        "2 threads",
    ):
        assert part in page
    assert page.index("A note.") < page.index("| parameters |")
    assert "Latency" not in to_markdown(replace(REPORT, latency=[]))


# quality of outputs


class ToyForSequenceClassification(nn.Module):
    """Logits are the inputs themselves."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.config = SimpleNamespace(**config)

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.scale * pixel_values}


class Toy(nn.Module):
    """Hidden states are the inputs times a diagonal."""

    def __init__(self, *diagonal: float) -> None:
        super().__init__()
        self.diagonal = nn.Parameter(torch.tensor(diagonal))

    def forward(self, states: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"last_hidden_state": states * self.diagonal}


LOGITS = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.0], [0.0, 1.0, 5.0], [1.0, 0.0, 0.5]])  # predicts 0, 1, 2, 0
NAMES = {"arts": 0, "business": 1, "sport": 2}


def rows(labels: tuple[str | int | None, ...]) -> Batches:
    return Batches(({"pixel_values": LOGITS[:3]}, {"pixel_values": LOGITS[3:]}), labels)


def judged(dense: nn.Module, pruned: nn.Module, rows: Batches) -> Quality:
    return Judge(dense, rows).of(pruned)


def dense_and_pruned(names: dict[str, int] = NAMES, **config: Any) -> tuple[nn.Module, nn.Module]:
    """The pruned one predicts 2, 0, 0, 1: the smallest logit."""
    known = {"num_labels": 3, "label2id": names, "id2label": {index: name for name, index in names.items()}}
    both = [ToyForSequenceClassification(**{**known, **config}) for _ in range(2)]
    with torch.no_grad():
        both[1].scale.fill_(-1)
    return both[0], both[1]


@pytest.mark.parametrize(
    ("labels", "dense", "pruned"),
    [
        (("arts", "business", "sport", "arts"), 1.0, 0.0),
        ((0, 1, 2, 0), 1.0, 0.0),
        (("arts", 1, "arts", 1), 0.5, 0.5),
        (("sport", "arts", "arts", "business"), 0.0, 1.0),
    ],
)
def test_accuracy_takes_names_and_numbers(labels: tuple[str | int, ...], dense: float, pruned: float) -> None:
    assert judged(*dense_and_pruned(), rows(labels)) == Quality("accuracy", dense, pruned, 4)


def test_one_output_number_is_compared_by_correlation() -> None:
    """argmax over one column would call every cut perfect."""
    dense, pruned = dense_and_pruned(num_labels=3, problem_type="regression")
    found = judged(dense, pruned, rows((1, 2, None, 4)))
    assert (found.metric, found.dense) == ("correlation_with_dense", 1.0)
    assert found.pruned == pytest.approx(-1.0)  # the pruned one gives the negative
    check_labels([Sample(label=label) for label in (3, "7.5", "7,5", None, 4)], dense)


def test_a_multi_label_classifier_is_refused() -> None:
    dense, _ = dense_and_pruned(problem_type="multi_label_classification")
    with pytest.raises(BadInput, match="multi-label"):
        check_labels([], dense)


def test_names_that_are_numbers_are_names() -> None:
    # Star ratings 1 to 3 in the data are read as integers; here class 1 is index 0.
    models = dense_and_pruned({"1": 0, "2": 1, "3": 2})
    assert judged(*models, rows((1, 2, 3, 1))).dense == 1.0


def test_a_config_with_names_in_one_direction_only() -> None:
    # transformers leaves label2id None if config.json has only id2label.
    models = dense_and_pruned(label2id=None)
    assert judged(*models, rows(("arts", "business", "sport", "arts"))).dense == 1.0
    assert judged(*models, rows((0, 1, 2, 0))).dense == 1.0


@pytest.mark.parametrize("label", ["politics", 3, -1, "Arts"])
def test_an_unknown_label_is_refused_with_the_known_ones(label: str | int) -> None:
    with pytest.raises(BadInput, match=r"arts, business, sport; or 0 to 2") as refused:
        judged(*dense_and_pruned(), rows(("arts", 1, label, 0)))
    assert repr(label) in str(refused.value)


def test_one_missing_label_makes_agreement_the_metric() -> None:
    dense, pruned = dense_and_pruned()
    assert judged(dense, pruned, rows(("arts", None, "sport", "arts"))) == Quality("same_prediction", 1.0, 0.0, 4)
    assert judged(dense, dense, rows((None,) * 4)).pruned == 1.0


def test_labels_of_a_feature_extractor_do_not_matter_and_padding_does_not_count() -> None:
    states = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 1.0], [9.0, -9.0]]])  # (2, tokens, hidden)
    mask = torch.tensor([[1, 1], [1, 0]])
    batches = Batches(({"states": states, "attention_mask": mask},), ("arts", 1))
    found = judged(Toy(1.0, 1.0), Toy(1.0, 0.0), batches)
    assert (found.metric, found.dense, found.samples) == ("cosine_to_dense", 1.0, 2)
    assert found.pruned == pytest.approx((1 + 1 / math.sqrt(2)) / 2)


def test_a_correlation_that_is_undefined_counts_as_none() -> None:
    batches = Batches(({"states": torch.ones(3, 1)},), (None,) * 3)
    config = SimpleNamespace(num_labels=1, problem_type="regression")
    numbers = iter((torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[2.0], [2.0], [2.0]])))

    class NumbersClassification(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config, self.values = config, next(numbers)

        def forward(self, states: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": self.values}

    dense = NumbersClassification()
    assert judged(dense, dense, batches).pruned == pytest.approx(1.0)
    assert judged(dense, NumbersClassification(), batches).pruned == 0.0
