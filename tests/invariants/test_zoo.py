"""Small random networks of many families: what must be found in them is found, and what is cut of them is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from benchmarks.zoo import check as checks
from benchmarks.zoo import table as models
from benchmarks.zoo.cases import of_dialect, of_family
from benchmarks.zoo.check import Outcome, check
from benchmarks.zoo.export import OPSETS
from benchmarks.zoo.families import FAMILIES

DYNAMO = ("bert", "llama", "swin", "resnet")
DIALECTS = (
    ("bert", "int8-qdq"), ("bert", "4-bit"), ("bert", "fused"), ("llama", "ort-2"), ("swin", "onnxslim"),
    ("resnet", "fp16"), ("resnet", "int8-qdq"),
)  # fmt: skip
"""Made from the exports by dynamo. All others, and groups without units: `python -m benchmarks.zoo --all`."""
FEWER_BITS = {"fp16": 1e-3, "int8-qdq": 5e-2}
"""Tolerances where two sums that differ by a rounding of float32 may be rounded to neighbours on a coarser grid."""
LEFT = ("mask2former", "mobilenet-v2", "rt-detr", "swin")
"""Not by TorchScript: too large for tests, or here by dynamo."""
NETWORKS = (
    *((name, "torchscript") for name in FAMILIES if name not in LEFT),
    *((name, "dynamo") for name in DYNAMO),
    *DIALECTS,
)


@pytest.fixture(scope="module", params=NETWORKS, ids="-".join)
def outcome(request: pytest.FixtureRequest) -> Outcome:
    name, form = request.param
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return check(of_family(name, form) if form in OPSETS else of_dialect(name, form), emptied=False)
    finally:
        torch.set_num_threads(before)


def test_the_groups_of_the_table_are_found(outcome: Outcome) -> None:
    assert (outcome.missing, outcome.extra) == ({}, {})
    assert outcome.groups == outcome.expected != 0


def test_nothing_goes_wrong(outcome: Outcome) -> None:
    assert outcome.faults == []


def test_read_and_written_again_it_gives_the_same_bits(outcome: Outcome) -> None:
    assert outcome.identity is True


def test_cut_is_masked_in_float64(outcome: Outcome) -> None:
    assert outcome.some is not None
    assert outcome.some < 1e-9


def test_one_unit_of_every_group_is_masked_too(outcome: Outcome) -> None:
    assert outcome.one is not None
    assert outcome.one < 1e-9


def test_the_written_file_is_masked_in_float32(outcome: Outcome) -> None:
    assert outcome.float32 is not None
    assert outcome.float32 < FEWER_BITS.get(outcome.form, 1e-5)


def test_what_is_cut_had_an_effect(outcome: Outcome) -> None:
    assert outcome.dense is not None
    assert outcome.dense > 1e-2


def test_macs_are_those_that_torch_counts(outcome: Outcome) -> None:
    assert outcome.macs == outcome.torch_macs


def test_macs_of_the_cut_network_were_foretold(outcome: Outcome) -> None:
    assert outcome.recounted is True


def test_other_units_than_those_masked_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    right: Callable[..., object] = checks.cut

    def wrong(layout: checks.Layout, keep: checks.Keep) -> object:
        def shifted(name: str, units: Sequence[int]) -> list[int]:
            return sorted((unit + 1) % layout.by_name[name].units for unit in units)

        return right(layout, {name: shifted(name, units) for name, units in keep.items()})

    monkeypatch.setattr(checks, "cut", wrong)
    found = check(of_family("resnet", "torchscript"), emptied=False)
    assert [fault.split(":")[0] for fault in found.faults] == ["some", "one"]
    assert found.float32 is not None
    assert found.float32 > 1e-2


def test_the_tables_of_models_are_those_of_the_recorded_results() -> None:
    found = models.pages()
    assert models.table() in found["README.md"]
    assert models.real_models() in found["docs/networks.md"]
    assert found == {name: (models.ROOT / name).read_text(encoding="utf-8") for name in found}
