"""Masks, plans, layouts and scores survive the disk, and what is wrong on it is refused with the next step."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tiny_scoring import toy_layout

from optin_deploy.errors import BadInput, PlanMismatch
from optin_deploy.layout import Branch, ModelLayout
from optin_deploy.plan import Masks, PruningPlan

LAYOUT = toy_layout((2, 3), (4, 5))
OTHER = toy_layout((2, 3), (4, 5), "other")
MASKS = Masks(
    ((True, False), (False, True, True)), ((True, True, False, False), (False, False, False, False, True)), LAYOUT.hash
)
PLAN = PruningPlan(((0,), (1, 2)), ((0, 1), (4,)), LAYOUT.hash, 200, 110, 20, 8)


def on_disk(data: dict[str, Any]) -> dict[str, Any]:
    """What comes back from a JSON file."""
    return dict(json.loads(json.dumps(data)))


# --- round trips ----------------------------------------------------------------------------------------------


def test_a_plan_survives_json() -> None:
    found = PruningPlan.from_json(on_disk(PLAN.to_json()))
    assert found == PLAN
    assert found.hash == PLAN.hash


def test_masks_survive_json_and_are_readable_in_it() -> None:
    data = on_disk(MASKS.to_json())
    assert data["heads"] == ["10", "011"]
    assert Masks.from_json(data) == MASKS


def test_the_masks_json_of_a_workspace_can_be_read_back() -> None:
    assert Masks.from_json({**on_disk(MASKS.to_json()), "settings": {"flops": 0.6}}) == MASKS


def test_a_layout_survives_json() -> None:
    found = ModelLayout.from_json(on_disk(LAYOUT.to_json()))
    assert found == LAYOUT
    assert found.hash == LAYOUT.hash
    assert OTHER.hash != LAYOUT.hash


def test_a_plan_is_the_masks_as_indices() -> None:
    assert PLAN.masks(LAYOUT) == MASKS


def test_a_plan_may_empty_a_layer() -> None:
    plan = PruningPlan(((), ()), ((), ()), LAYOUT.hash, 200, 20, 20, 8)
    plan.check(LAYOUT)
    assert PruningPlan.from_json(on_disk(plan.to_json())) == plan
    assert not any(any(keep) for keep in (*plan.masks(LAYOUT).heads, *plan.masks(LAYOUT).neurons))


def test_masks_that_keep_all_have_the_counts_of_the_layout() -> None:
    masks = Masks.all_kept(LAYOUT)
    assert [len(keep) for keep in (*masks.heads, *masks.neurons)] == [2, 3, 4, 5]
    assert all(all(keep) for keep in (*masks.heads, *masks.neurons))
    assert masks.layout_hash == LAYOUT.hash


def test_kept_is_of_all_macs_and_prunable_kept_of_those_that_can_be_cut() -> None:
    assert PLAN.kept == 110 / 200
    assert PLAN.prunable_kept == 90 / 180


@pytest.mark.parametrize(
    "change", [{"heads": ((1,), (1, 2))}, {"neurons": ((0, 2), (4,))}, {"macs_pruned": 111}, {"tokens": 9}]
)
def test_any_difference_changes_the_hash_of_a_plan(change: dict[str, Any]) -> None:
    assert PruningPlan.from_json({**PLAN.to_json(), **change}).hash != PLAN.hash


# --- plans from disk ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field", ["heads", "neurons", "layout_hash", "macs_dense", "macs_pruned", "macs_fixed", "tokens"]
)
def test_a_plan_without_a_field_is_refused_by_name(field: str) -> None:
    data = {name: value for name, value in PLAN.to_json().items() if name != field}
    with pytest.raises(BadInput, match=rf"{field}.*`optin plan`"):
        PruningPlan.from_json(data)


def test_a_plan_with_an_unknown_field_is_refused_by_name() -> None:
    with pytest.raises(BadInput, match="colour"):
        PruningPlan.from_json({**PLAN.to_json(), "colour": "red"})


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_a_plan_of_another_version_is_refused(version: object) -> None:
    with pytest.raises(BadInput, match="schema_version"):
        PruningPlan.from_json({**PLAN.to_json(), "schema_version": version})


@pytest.mark.parametrize("kept", [[1, 0], [0, 0], [-1, 0]], ids=["unsorted", "twice", "negative"])
@pytest.mark.parametrize("field", ["heads", "neurons"])
def test_indices_must_be_ascending_unique_and_not_negative(field: str, kept: list[int]) -> None:
    with pytest.raises(BadInput, match=f"{field} of layer 1 must be ascending, unique and not negative"):
        PruningPlan.from_json({**PLAN.to_json(), field: [[0], kept]})


@pytest.mark.parametrize(
    "change",
    [
        {"heads": None},
        {"heads": 3},
        {"heads": [1, 2]},
        {"heads": [["a"], [1]]},
        {"neurons": [[None], [1]]},
        {"neurons": [[[0]], [1]]},
    ],
    ids=str,
)
def test_indices_that_are_no_lists_of_numbers_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"not a plan\.json"):
        PruningPlan.from_json({**PLAN.to_json(), **change})


@pytest.mark.parametrize(
    "change",
    [
        {"heads": [["0"], ["1", "2"]]},
        {"heads": ["0", "12"]},
        {"heads": [[0.9], [1, 2.5]]},
        {"heads": [[float("inf")], [1]]},
        {"heads": [[False], [True]]},
        {"macs_dense": "200"},
        {"macs_dense": 0},
        {"macs_dense": -200},
        {"macs_pruned": 201},
        {"macs_pruned": 1.5},
        {"macs_fixed": 111},
        {"layout_hash": 5},
        {"layout_hash": None},
    ],
    ids=str,
)
def test_values_of_the_wrong_type_or_size_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        PruningPlan.from_json({**PLAN.to_json(), **change})


@pytest.mark.parametrize("tokens", [0, -8])
def test_a_plan_needs_a_positive_number_of_tokens(tokens: int) -> None:
    with pytest.raises(BadInput):
        PruningPlan.from_json({**PLAN.to_json(), "tokens": tokens})


def test_a_refused_version_is_told_apart_from_a_damaged_file() -> None:
    with pytest.raises(BadInput, match="schema_version 2; this version of optin-deploy reads 1"):
        PruningPlan.from_json({**PLAN.to_json(), "schema_version": 2})


# --- plans against a layout -----------------------------------------------------------------------------------


def test_a_plan_of_another_layout_is_refused_with_both_hashes() -> None:
    with pytest.raises(PlanMismatch, match=f"{LAYOUT.hash[:12]}.*{OTHER.hash[:12]}.*`optin plan`"):
        PLAN.check(OTHER)
    with pytest.raises(PlanMismatch):
        PLAN.masks(OTHER)


@pytest.mark.parametrize(("field", "top"), [("heads", 2), ("neurons", 4)])
def test_an_index_that_the_layer_does_not_have_is_refused(field: str, top: int) -> None:
    last = [[0], [top]]
    PruningPlan.from_json({**PLAN.to_json(), field: last}).check(LAYOUT)
    beyond = PruningPlan.from_json({**PLAN.to_json(), field: [[0], [top + 1]]})
    with pytest.raises(PlanMismatch, match=rf"layer 1 keeps {field} {top + 1}, but has only 0\.\.{top}"):
        beyond.check(LAYOUT)


@pytest.mark.parametrize("field", ["heads", "neurons"])
def test_another_number_of_layers_is_refused(field: str) -> None:
    with pytest.raises(BadInput, match=r"heads of . layers, but neurons of"):
        PruningPlan.from_json({**PLAN.to_json(), field: [[0]]})
    with pytest.raises(PlanMismatch, match="1 layers; the model has 2"):
        PruningPlan.from_json({**PLAN.to_json(), "heads": [[0]], "neurons": [[0]]}).check(LAYOUT)


# --- masks and layouts from disk ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [{"heads": ["12", "011"]}, {"heads": [[0, 1], [1]]}, {"neurons": None}, {"colour": 1}, {"schema_version": 2}],
    ids=str,
)
def test_masks_that_are_not_ours_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="masks"):
        Masks.from_json({**MASKS.to_json(), **change})


@pytest.mark.parametrize("field", ["heads", "neurons", "layout_hash"])
def test_masks_without_a_field_are_refused(field: str) -> None:
    with pytest.raises(BadInput, match=field):
        Masks.from_json({name: value for name, value in MASKS.to_json().items() if name != field})


@pytest.mark.parametrize("field", ["arch", "model_class", "layers"])
def test_a_layout_without_a_field_is_refused(field: str) -> None:
    with pytest.raises(BadInput, match=rf"{field}.*`optin score`"):
        ModelLayout.from_json({name: value for name, value in LAYOUT.to_json().items() if name != field})


@pytest.mark.parametrize(
    "change", [{"layers": []}, {"layers": 3}, {"layers": [3]}, {"schema_version": 1}, {"x": 1}], ids=str
)
def test_a_layout_that_is_not_ours_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="layout"):
        ModelLayout.from_json({**LAYOUT.to_json(), **change})


def bent_layer(change: dict[str, Any], branch: dict[str, Any]) -> dict[str, Any]:
    data = on_disk(LAYOUT.to_json())
    data["layers"][1] |= change
    data["layers"][1]["ffn"] |= branch
    return data


@pytest.mark.parametrize(
    "branch", [{"units": 0}, {"units": "4"}, {"unit_width": -1}, {"inputs": []}, {"output": ""}, {"x": 1}]
)
def test_a_layout_with_a_bad_branch_is_refused(branch: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="layout"):
        ModelLayout.from_json(bent_layer({}, branch))


@pytest.mark.parametrize(
    "bent", [bent_layer({"hidden": "4"}, {}), bent_layer({}, {"units": 4.5}), bent_layer({}, {"output": 4})]
)
def test_a_layout_with_values_of_the_wrong_type_is_refused(bent: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        ModelLayout.from_json(bent)


def test_a_branch_needs_units_and_inputs() -> None:
    with pytest.raises(BadInput, match="'down' has 0 units"):
        Branch(("up",), "down", "norm", None, 0, 1)


def test_plans_and_masks_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        PLAN.heads = ()  # type: ignore[misc]
    with pytest.raises(AttributeError):
        MASKS.heads = ()  # type: ignore[misc]
    assert torch.tensor(MASKS.heads[1]).tolist() == [False, True, True]
