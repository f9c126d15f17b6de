"""The picture of the segmentation benchmark."""

from __future__ import annotations

from benchmarks.segmentation import titles


def test_each_budget_of_a_model_has_a_title_of_its_own() -> None:
    assert titles("mask2former-0.55-128") == ("mask2former, dense", "mask2former, 55% of the MACs")
    assert titles("segformer-0.5-128")[1] == "segformer, 50% of the MACs"
