"""What a report says: its fields as the contract names them, its arithmetic by hand, quality first."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from optin_deploy.common.formatting import BYTES, COUNTS, pair
from optin_deploy.quality.quality import Quality, correlation
from optin_deploy.reporting.report import Report, latency_rows, quality_lines, summary_rows, to_markdown
from optin_deploy.structure.kept import KeptGroup, kept_lines, kept_of, kept_rows
from support.made_timings import MEASURED, TIMING
from support.tiny_checkpoint import HEADS, LAYERS, finished_job

ENVIRONMENT = {
    "date": "today",
    "cpu_model": "a CPU",
    "cores_logical": 2,
    "platform": "Linux",
    "versions": {"torch": "2"},
}
GROUPS = [
    {"name": f"encoder.{layer}: {kind}", "kind": kind, "kept": kept, "units": units}
    for layer, *both in ((0, ("heads", 3, 3), ("neurons", 16, 32)), (1, ("heads", 0, 3), ("neurons", 32, 32)))
    for kind, kept, units in both
]
REPORT = Report(
    quality=Quality("cosine_to_dense", 1.0, 0.97, 12),
    params={"dense": 4_000_000, "pruned": 3_000_000},
    macs={"dense": 2e9, "pruned": 1e9, "kept": 0.5, "prunable_kept": 0.45},
    size_bytes={"pruned": 3 * 2**20, "dense": 4 * 2**20},
    parity={"masked_vs_rewritten": 1e-16, "torch_vs_engine": 2e-7},
    latency=[MEASURED],
    heads=[3, 0],
    neurons=[16, 32],
    groups=GROUPS,
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
    of_pooler = 48 + 3  # of each of its neurons, for one token: its row, and the classifier's column
    assert macs["dense"] == LAYERS * (HEADS * head + 96 * neuron) + 48 * of_pooler
    *in_layers, pooler = data["neurons"]
    assert macs["pruned"] == sum(data["heads"]) * head + sum(in_layers) * neuron + pooler * of_pooler
    assert macs["kept"] == macs["pruned"] / macs["dense"]
    assert macs["prunable_kept"] == macs["kept"], "every product lies on a group"


def test_parity_errors_are_small_numbers() -> None:
    parity = stored()["parity"]
    assert 0 <= parity["masked_vs_rewritten"] <= 1e-9
    assert all(0 <= error <= 1e-4 for error in parity.values())


def test_a_report_names_its_machine_and_its_artifacts_but_no_owner() -> None:
    data = stored()
    assert {"date", "cpu_model", "platform", "versions", "python"} <= set(data["environment"])
    assert {"plan", "network", "model.onnx", "dense.onnx"} <= set(data["hashes"])
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
    small = replace(REPORT, macs={**REPORT.macs, "dense": 16_781_824, "pruned": 990_000}, size_bytes={})
    assert summary_rows(small)[1] == ("MACs a sample", "16.78 M", "0.99 M", "5.9%")
    assert pair(40_900, 1_000, BYTES) == ("39.94 KiB", "0.98 KiB")
    assert pair(1_430_000_000, 99_000_000, COUNTS) == ("1430.00 M", "99.00 M")
    assert pair(3, 0, COUNTS) == ("3.00", "0.00")
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
        "There stay 3 of 6 heads, 48 of 64 neurons.",
        "Nothing was cut in 2 of 4 groups: 1 of heads, 1 of neurons.",
        "| encoder.0 | 16 of 32 neurons |",
        "| encoder.1 | 0 of 3 heads |",
        "45.0%",
        "masked_vs_rewritten 1.0e-16",
        "A note.",
        "a CPU",
        "2 threads",
    ):
        assert part in page
    assert page.index("A note.") < page.index("| parameters |")
    assert "Latency" not in to_markdown(replace(REPORT, latency=[]))


def kept(*groups: tuple[str, int, int]) -> list[KeptGroup]:
    """Groups by name, with kept and all units."""
    return [KeptGroup(name, name.partition(": ")[2], stay, units) for name, stay, units in groups]


def test_blocks_in_a_row_that_keep_the_same_share_a_line() -> None:
    names = [f"encoder.layer.{n}.{part}" for n in range(11) for part in ("attention: heads", "mlp: neurons")]
    found = kept(*((name, 2, 4) for name in names))
    assert kept_rows(found) == [("encoder.layer.0 to 10", "2 of 4 heads, 2 of 4 neurons")]
    found[8] = KeptGroup(names[8], "heads", 4, 4)  # of layer 4
    assert [where for where, _ in kept_rows(found)] == [f"encoder.layer.{n}" for n in ("0 to 3", "4", "5 to 10")]
    assert kept_rows(found)[1][1] == "2 of 4 neurons"


def test_two_groups_of_a_kind_in_a_block_are_told_apart() -> None:
    names = ("stages.0.blocks.0.conv1: channels", "stages.0.blocks.0.conv2: channels", "stages.0.blocks.0: channels")
    rows = kept_rows(kept(*((name, 1, 2) for name in names)))
    assert rows == [("stages.0.blocks.0", "conv1: 1 of 2 channels, conv2: 1 of 2 channels, 1 of 2 channels")]


def test_lines_say_all_units_of_each_kind_and_how_many_groups_are_whole() -> None:
    found = kept(("a.0: heads", 2, 4), ("a.1: heads", 4, 4), ("a.0: neurons", 1000, 3000), ("a.1: neurons", 500, 3000))
    assert kept_lines(found) == [
        "There stay 6 of 8 heads, 1,500 of 6,000 neurons.",
        "Nothing was cut in 1 of 4 groups: 1 of heads.",
    ]
    assert kept_lines(kept(("a: heads", 4, 4))) == ["Nothing was cut in 1 of 1 groups: 1 of heads."]
    assert kept_lines([]) == kept_rows([]) == []


def test_groups_of_a_plan_have_their_kinds_by_name_also_where_their_units_are_not_known() -> None:
    found = kept_of({"a.0: heads": [0, 2], "a: qk-width 2": [1], "mine": [3]}, {"a.1: neurons": 8})
    assert [(group.kind, group.kept, group.units) for group in found] == [
        ("neurons", 8, 8),
        *(("heads", 2, None), ("qk-width", 1, None), ("units", 1, None)),
    ]
    assert kept_lines(found)[0] == "There stay 2 heads, 1 qk-width, 1 units."


@pytest.mark.parametrize("values", [([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]), ([5.0, 5.0], [5.0, 5.0])])
def test_a_correlation_that_is_undefined_counts_as_none(values: tuple[list[float], list[float]]) -> None:
    assert correlation(*map(torch.tensor, values)) == 0.0
