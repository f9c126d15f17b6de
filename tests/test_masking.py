"""Hooks mask, record and stop, and are gone afterwards; a run from block k gives what the full run gives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from tiny_scoring import (
    BERT,
    DINOV2,
    HEADS,
    LAYERS,
    NEURONS,
    VIT,
    Batch,
    Family,
    bert,
    dinov2,
    image_batch,
    one_thread,
    state_of,
    text_batch,
    vit,
)
from torch import Tensor, nn

from optin_deploy.arch.resolve import resolve
from optin_deploy.errors import NonFiniteActivation
from optin_deploy.masking import branch_masks, check_finite, inference, masked, recorded, run_blocks
from optin_deploy.plan import Masks

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)

Case = tuple[nn.Module, Family, Batch]
CASES: dict[str, Callable[[], Case]] = {
    "bert": lambda: (bert(layers=LAYERS), BERT, text_batch((3, 7, 5))),
    "vit": lambda: (vit(), VIT, image_batch(3)),
    "dinov2": lambda: (dinov2(), DINOV2, image_batch(3)),
}


@pytest.fixture(params=CASES, name="case")
def _case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def main(output: dict[str, Tensor]) -> Tensor:
    return output["logits"] if "logits" in output else output["last_hidden_state"]


# --- masks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_a_mask_of_zero_equals_zeroed_weight_columns(case: Case, kind: str) -> None:
    model, family, batch = case
    layout = resolve(model)
    branch = layout.layers[1].attention if kind == "heads" else layout.layers[1].ffn
    mask = torch.ones(1, 1, branch.units)
    mask[..., 2] = 0
    by_hand = copy.deepcopy(model)
    path, columns = family.columns(1, kind, 2)
    by_hand.get_submodule(path).weight[:, columns] = 0
    with masked(model, {branch: mask}):
        found = main(model(**batch))
    torch.testing.assert_close(found, main(by_hand(**batch)), rtol=0, atol=1e-12)
    assert float((found - main(model(**batch))).abs().max()) > 1e-3


def test_each_sample_can_have_its_own_mask_and_a_fraction_scales(case: Case) -> None:
    model, family, batch = case
    branch = resolve(model).layers[0].attention
    mask = torch.ones(3, 1, HEADS)
    mask[1, 0, 0] = 0.25
    dense = main(model(**batch))
    by_hand = copy.deepcopy(model)
    path, columns = family.columns(0, "heads", 0)
    by_hand.get_submodule(path).weight[:, columns] *= 0.25
    with masked(model, {branch: mask}):
        found = main(model(**batch))
    torch.testing.assert_close(found[[0, 2]], dense[[0, 2]], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[1], main(by_hand(**batch))[1], rtol=0, atol=1e-12)
    assert not torch.allclose(found[1], dense[1], atol=1e-4)


def test_keep_masks_become_one_mask_a_branch() -> None:
    layout = resolve(bert())
    masks = Masks(((True, False, True),) * LAYERS, ((False,) * (NEURONS - 1) + (True,),) * LAYERS, layout.hash)
    found = branch_masks(layout, masks)
    assert set(found) == {branch for layer in layout.layers for branch in (layer.attention, layer.ffn)}
    assert found[layout.layers[1].attention].tolist() == [[[1.0, 0.0, 1.0]]]
    assert found[layout.layers[0].ffn].tolist() == [[[0.0] * (NEURONS - 1) + [1.0]]]


def test_masks_that_keep_all_change_no_bit(case: Case) -> None:
    model, _, batch = case
    layout = resolve(model)
    dense = main(model(**batch))
    with masked(model, branch_masks(layout, Masks.all_kept(layout))):
        assert torch.equal(main(model(**batch)), dense)


# --- partial runs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", range(LAYERS))
def test_a_run_from_a_block_with_its_cached_input_equals_the_full_run_bit_by_bit(case: Case, start: int) -> None:
    model, family, batch = case
    layout = resolve(model)
    paths = [layer.path for layer in layout.layers]
    assert paths == [f"{family.blocks}.{i}" for i in range(LAYERS)]
    with recorded(model, outputs=paths) as dense:
        output = model(**batch)
    before = state_of(model)
    hidden = dense.outputs[paths[start - 1]] if start else None
    with recorded(model, outputs=paths) as again:
        found = run_blocks(model, layout, batch, start=start, hidden=hidden)
    assert torch.equal(main(found), main(output))
    assert all(torch.equal(again.outputs[path], dense.outputs[path]) for path in paths[start:])
    assert state_of(model) == before


def test_a_run_from_a_block_starts_at_the_hidden_state_given_and_skips_what_comes_before(case: Case) -> None:
    model, _, batch = case
    layout = resolve(model)
    with recorded(model, outputs=[layout.layers[0].path]) as dense:
        output = main(model(**batch))
    hidden = dense.outputs[layout.layers[0].path]
    assert not torch.allclose(main(run_blocks(model, layout, batch, start=1, hidden=2 * hidden + 1)), output, atol=1e-4)

    def unreachable(module: nn.Module, args: object) -> None:
        raise AssertionError("block 0 computed")

    handle = model.get_submodule(layout.layers[0].attention.output).register_forward_pre_hook(unreachable)
    run_blocks(model, layout, batch, start=1, hidden=hidden)
    handle.remove()


@pytest.mark.parametrize("start", [0, 1])
def test_a_run_up_to_a_module_returns_its_output_and_computes_nothing_after_it(case: Case, start: int) -> None:
    model, _, batch = case
    layout = resolve(model)
    stops = [layout.layers[1].attention.output, layout.layers[1].ffn.output, layout.layers[1].path]
    with recorded(model, outputs=[*stops, layout.layers[0].path]) as dense:
        model(**batch)
    before = state_of(model)
    hidden = dense.outputs[layout.layers[0].path] if start else None
    for i, stop in enumerate(stops):
        with recorded(model, outputs=stops) as seen:
            found = run_blocks(model, layout, batch, start=start, hidden=hidden, stop=stop)
        assert torch.equal(found, dense.outputs[stop])
        assert set(seen.outputs) == set(stops[: i + 1])
    assert state_of(model) == before


# --- recordings -----------------------------------------------------------------------------------------------


def test_a_recording_holds_first_arguments_and_outputs(case: Case) -> None:
    model, _, batch = case
    layer = resolve(model).layers[1]
    projection = layer.ffn.output
    with recorded(model, inputs=(projection, layer.path), outputs=(projection, resolve(model).layers[0].path)) as seen:
        model(**batch)
    linear = model.get_submodule(projection)
    assert torch.equal(linear(seen.inputs[projection]), seen.outputs[projection])
    assert torch.equal(seen.inputs[layer.path], seen.outputs[resolve(model).layers[0].path])


def test_a_recording_sees_arguments_given_by_name_and_the_first_of_a_tuple() -> None:
    class Named(nn.Module):
        def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
            return hidden_states + 1, None

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Named()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(hidden_states=x)[0]

    model = Outer()
    with recorded(model, inputs=["inner"], outputs=["inner"]) as seen:
        model(torch.zeros(2))
    assert seen.inputs["inner"].tolist() == [0, 0]
    assert seen.outputs["inner"].tolist() == [1, 1]


def test_a_recording_sees_the_masked_input_when_the_mask_is_on_first() -> None:
    model = bert()
    branch = resolve(model).layers[0].ffn
    mask = torch.ones(1, 1, branch.units)
    mask[..., 4] = 0
    with masked(model, {branch: mask}), recorded(model, inputs=[branch.output]) as seen:
        model(**text_batch((4,)))
    columns = seen.inputs[branch.output].abs().sum((0, 1))
    assert (columns == 0).nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_first_module_with_a_non_finite_output_is_named(value: float) -> None:
    model, batch = bert(), text_batch((3, 5))
    before = state_of(model)
    check_finite(model, batch, [torch.ones(2), torch.zeros(1, 1)])
    assert state_of(model) == before
    first = "bert.encoder.layer.1.attention.self.value"
    model.get_submodule(first).bias[0] = value
    before = state_of(model)
    with pytest.raises(NonFiniteActivation, match=rf"^{first} put out NaN or infinity"):
        check_finite(model, batch, [torch.ones(2), torch.tensor([1.0, value])])
    assert state_of(model) == before


# --- clean-up -------------------------------------------------------------------------------------------------


def test_masks_and_recorders_are_removed_after_an_error(case: Case) -> None:
    model, _, batch = case
    layout = resolve(model)
    before = state_of(model)
    paths = [layer.path for layer in layout.layers]
    masks = branch_masks(layout, Masks.all_kept(layout))
    with pytest.raises(KeyboardInterrupt), masked(model, masks), recorded(model, inputs=paths, outputs=paths):
        model(**batch)
        raise KeyboardInterrupt
    assert state_of(model) == before


def test_an_unknown_path_leaves_no_hook_of_the_known_ones_behind() -> None:
    model = bert()
    layout = resolve(model)
    before = state_of(model)
    with pytest.raises(AttributeError), recorded(model, inputs=[layout.layers[0].path], outputs=["no.such"]):
        pass
    with pytest.raises(AttributeError):
        run_blocks(model, layout, text_batch((3,)), start=1, hidden=torch.zeros(1, 3, 12).double(), stop="no.such")
    assert state_of(model) == before


@pytest.mark.parametrize("stop", [None, "layer.1"])
def test_a_failing_forward_leaves_no_bypass_and_no_hook(case: Case, stop: str | None) -> None:
    model, family, batch = case
    layout = resolve(model)

    def fail(module: nn.Module, args: object) -> None:
        raise RuntimeError("out of memory")

    handle = model.get_submodule(layout.layers[1].ffn.output).register_forward_pre_hook(fail)
    before = state_of(model)
    hidden = torch.zeros(3, 7 if family is BERT else 5, 12, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="out of memory"):
        run_blocks(model, layout, batch, start=1, hidden=hidden, stop=stop and layout.layers[1].path)
    assert state_of(model) == before
    handle.remove()


def test_inference_restores_mixed_modes_and_flags_also_after_an_error() -> None:
    model = bert()
    model.train()
    model.get_submodule("bert.encoder.layer.1").eval()
    model.get_submodule("classifier").bias.requires_grad_(False)
    before = state_of(model)
    with inference(model):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert state_of(model) == before
    with pytest.raises(KeyboardInterrupt), inference(model):
        raise KeyboardInterrupt
    assert state_of(model) == before
