"""Probing inputs: ids that the tables have, masks, and free sizes that nothing in the network can be taken for."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from optin_deploy.errors import BadInput
from optin_deploy.network.graph import Network
from optin_deploy.network.probe import Given, probes, probes_of
from optin_deploy.network.read import read
from support.tiny_graphs import FLOAT, FORMS, INT64, WIDTH, chain, model_of, outputs, text, value, weight


def probe_inputs(network: Network, which: int = 0, seed: int = 0, **more: Any) -> dict[str, torch.Tensor]:
    """The inputs that are tried first."""
    return next(probes(network, which, seed, **more))


def shapes(feeds: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(values.shape) for name, values in feeds.items()}


@pytest.mark.parametrize("form", FORMS)
def test_every_input_is_made_in_a_type_and_size_that_the_graph_takes(form: str) -> None:
    model = FORMS[form]()
    for feeds in probes_of(read(model)):
        assert list(feeds) == [port.name for port in model.graph.input]
        outputs(model, {name: values.numpy() for name, values in feeds.items()})


def test_free_sizes_are_primes_that_divide_nothing_and_differ_between_the_probes() -> None:
    model = text(rows=7 * 13)
    model.graph.initializer.append(numpy_helper.from_array(np.array([0, -1, 5, 22]), "sizes"))
    model.graph.node.append(helper.make_node("Identity", ["sizes"], ["unused"]))
    first, second = (shapes(feeds) for feeds in probes_of(read(model)))
    assert set(first.values()) == {(17, 19)}  # not 5, 7, 11, 13
    assert set(second.values()) == {(23, 29)}


def test_many_numbers_are_indices_and_no_sizes() -> None:
    model = text()
    model.graph.initializer.append(numpy_helper.from_array(np.arange(64), "positions"))
    assert set(shapes(probe_inputs(read(model))).values()) == {(5, 7)}


def test_indices_lie_in_their_table_and_masks_are_ones() -> None:
    feeds = probe_inputs(read(text(rows=3)))
    assert set(feeds["ids"].flatten().tolist()) == {0, 1, 2}
    assert set(feeds["types"].flatten().tolist()) == {0, 1}
    assert bool((feeds["mask"] == 1).all())


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("shape", [("n", "l"), ("n", 1, "l", "l")])
def test_some_of_each_row_of_a_mask_of_truths_is_true_and_some_is_not(shape: Any, padding: bool) -> None:
    """Some networks see what is true, others what is not: either sees something."""
    mask = helper.make_tensor_value_info("mask", TensorProto.BOOL, shape)
    result = helper.make_tensor_value_info("seen", TensorProto.BOOL, shape)
    graph = helper.make_graph([helper.make_node("Not", ["mask"], ["seen"])], "masks", [mask], [result])
    found = probe_inputs(read(helper.make_model(graph)), padding=padding)["mask"]
    assert bool(found.any(-1).all())
    assert not bool(found.all(-1).any())


def test_masks_end_in_zeros_where_asked() -> None:
    mask = probe_inputs(read(text()), padding=True)["mask"]
    assert bool(mask[0].all())
    assert bool((mask[:, 0] == 1).all())
    assert 0 < int((mask == 0).sum()) < mask.numel()
    assert bool((mask.diff(dim=1) <= 0).all())  # no gap


def test_a_table_of_few_bits_is_a_table_too() -> None:
    model = text(rows=50)
    table = model.graph.initializer[0]
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((4, WIDTH), np.int8), "small"))
    model.graph.initializer.append(weight("scale"))
    model.graph.node.insert(0, helper.make_node("DequantizeLinear", ["small", "scale"], [table.name]))
    model.graph.initializer.remove(table)
    assert int(probe_inputs(read(model))["ids"].max()) == 3


def test_the_same_seed_gives_the_same_inputs_and_another_one_others() -> None:
    network = read(chain())
    first, again, other = probe_inputs(network), probe_inputs(network), probe_inputs(network, seed=1)
    assert torch.equal(first["x"], again["x"])
    assert not torch.equal(first["x"], other["x"])
    assert not torch.equal(probe_inputs(network, 1)["x"][0], first["x"][0])


def image(*shape: int | str, dtype: int = FLOAT, kernel: int = 3) -> onnx.ModelProto:
    """A Conv over an image."""
    nodes = [helper.make_node("Cast", ["x"], ["f"], to=FLOAT), helper.make_node("Conv", ["f", "w"], ["y"])]
    outs = [value("y", "b", 8, "h", "w")]
    return model_of(nodes, [value("x", *shape, dtype=dtype)], outs, [weight("w", 8, 3, kernel, kernel)])


@pytest.mark.parametrize(
    ("shape", "first"),
    [
        (("b", 3, "h", "w"), (5, 3, 96, 160)),
        (("b", "h", "w", 3), (5, 96, 160, 3)),
        (("b", 3, 48, "w"), (5, 3, 48, 160)),
        (("b", 3, 32, 32), (5, 3, 32, 32)),
        ((1, 3, -1, -1), (1, 3, 96, 160)),
    ],
)
def test_images_of_free_size_get_usual_ones(shape: tuple[int | str, ...], first: tuple[int, ...]) -> None:
    assert shapes(probe_inputs(read(image(*shape)))) == {"x": first}


def test_sizes_that_a_graph_refuses_are_followed_by_others() -> None:
    network = read(image("b", 3, "h", "w", kernel=100))
    assert [shapes(feeds)["x"][2:] for feeds in probes(network)] == [(96, 160), (48, 320), (224, 224), (640, 640)]
    assert [shapes(feeds)["x"][2:] for feeds in probes_of(network)] == [(224, 224), (128, 192)]


def test_images_of_bytes_are_not_all_ones() -> None:
    pixels = probe_inputs(read(image("b", 3, "h", "w", dtype=TensorProto.UINT8)))["x"]
    assert pixels.dtype == torch.uint8
    assert len(pixels.unique()) > 100


def test_axes_that_have_names_of_their_own_are_tried_as_one() -> None:
    inputs = [value("x", "x_0", WIDTH), value("z", "z_0", WIDTH)]
    model = model_of([helper.make_node("Add", ["x", "z"], ["y"])], inputs, [value("y", "b", WIDTH)])
    assert [len({shape[0] for shape in shapes(feeds).values()}) for feeds in probes(read(model))] == [2, 1]
    assert [feeds["x"].shape[0] == feeds["z"].shape[0] for feeds in probes_of(read(model))] == [True, True]


def test_what_the_caller_gives_is_taken_and_its_sizes_hold_for_the_others() -> None:
    network = read(text())
    assert set(shapes(probe_inputs(network, given=Given(sizes={"length": 9}))).values()) == {(5, 9)}
    mask = torch.zeros(3, 4, dtype=torch.int64)
    feeds = probe_inputs(network, given=Given(tensors={"mask": mask}))
    assert feeds["mask"] is mask
    assert shapes(feeds)["ids"] == (3, 4)
    for given in (Given(sizes={"other": 2}), Given(tensors={"other": mask})):
        with pytest.raises(BadInput, match="has no input and no free size 'other'; it has ids, types, mask, batch"):
            probe_inputs(network, given=given)
    with pytest.raises(BadInput, match="Size length = 0"):
        probe_inputs(network, given=Given(sizes={"length": 0}))


def test_what_cannot_be_made_is_asked_for() -> None:
    unranked = chain()
    unranked.graph.input[0].type.tensor_type.ClearField("shape")
    texts = model_of(
        [helper.make_node("Identity", ["x"], ["y"])],
        [value("x", 2, dtype=TensorProto.STRING)],
        [value("y", 2, dtype=TensorProto.STRING)],
    )
    huge = chain()
    huge.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2**30
    sequence = model_of(
        [helper.make_node("SequenceLength", ["x"], ["y"])],
        [helper.make_tensor_sequence_value_info("x", FLOAT, None)],
        [value("y", dtype=INT64)],
    )
    for model, words in (
        (unranked, r"input 'x' has no shape. Give it as `Given\(tensors={'x': ...}\)`"),
        (texts, "input 'x' is of type STRING. Give it"),
        (huge, "is too large to be made here"),
        (sequence, "input 'x' is no tensor. Give it"),
    ):
        with pytest.raises(BadInput, match=words):
            probe_inputs(read(model))
