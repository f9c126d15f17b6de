"""Costs of plans are those of the networks that are really cut, by every count that is not ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx.helper import make_node as node
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.zoo.export import quiet
from optin_deploy.cutting.graph import cut
from optin_deploy.cutting.torch import cut_module
from optin_deploy.errors import BadInput
from optin_deploy.feeds.rows import Feeds
from optin_deploy.network.axes import Axis, product, size, total
from optin_deploy.network.graph import Network
from optin_deploy.network.probe import probes_of
from optin_deploy.planning.budget import Limits
from optin_deploy.planning.costs import CostLimit, costs_of, limits_within
from optin_deploy.planning.polynomial import Polynomial, terms_of
from optin_deploy.pruning.networks import find_in
from optin_deploy.pruning.ready import sizes_of
from optin_deploy.structure.find import find
from optin_deploy.structure.groups import Layout
from optin_deploy.structure.macs import macs, weight_entries
from support.one_cut import graph, tensors
from support.tiny_networks import Image, Text, inputs, made, read
from support.tiny_plans import layout_of

FAMILIES = ("bert", "llama", "resnet", "mobilenet-v2", "swin", "efficientnet")
"""Heads and neurons, K/V groups, channels over stages, depthwise, windows, squeeze-and-excite."""


def drawn(layout: Layout, rng: np.random.Generator) -> dict[str, list[int]]:
    return {
        group.name: sorted(rng.permutation(group.units)[: rng.integers(1, group.units + 1)].tolist())
        for group in layout.groups
    }


# polynomials


@given(st.lists(st.integers(2, 5), min_size=2, max_size=4), st.data())
def test_a_polynomial_is_the_size_of_its_axes(sizes: list[int], data: st.DataObject) -> None:
    leaves = {Axis(size): f"g{n}" for n, size in enumerate(sizes)}
    pick = st.sampled_from(list(leaves))
    inner = total([product([data.draw(pick), data.draw(pick)]), Axis(3), data.draw(pick)])
    some = [inner, product([data.draw(pick), inner]), Axis(7)]
    widths = {name: data.draw(st.integers(0, leaf.size)) for leaf, name in leaves.items()}
    left = {leaf: widths[name] for leaf, name in leaves.items()}
    found = Polynomial(terms_of(some, leaves))
    assert found.total(widths) == np.prod([size(axis, left) for axis in some])
    for leaf, name in leaves.items():
        powers = found.along(name, widths)
        values = [sum(many * count**power for power, many in enumerate(powers)) for count in range(leaf.size + 1)]
        for count, value in enumerate(values):
            assert value - values[0] == found.total({**widths, name: count}) - found.total({**widths, name: 0})


# the costs of cut networks


@pytest.mark.parametrize("family", FAMILIES)
def test_costs_are_those_of_the_cut_network(family: str) -> None:
    layout, rng = layout_of(family), np.random.default_rng(3)
    network, costs = layout.structure.network, costs_of(layout)
    probes = probes_of(network)
    for _ in range(4):
        keep = drawn(layout, rng)
        widths, smaller = costs.widths(keep), cut(layout, keep)
        assert costs.macs.total(widths) == macs(find(smaller, probes).structure)
        assert costs.params.dense - costs.params.total(widths) == reals(network) - reals(smaller)
        assert costs.size.dense - costs.size.total(widths) == 4 * (reals(network) - reals(smaller))


def reals(network: Network) -> int:
    """Entries of all weights that are no sizes."""
    return sum(weight.size for weight in network.weights.values() if weight.dtype == ir.DataType.FLOAT)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_width_changes_is_the_difference_of_two_plans(family: str) -> None:
    layout, rng = layout_of(family), np.random.default_rng(4)
    costs = costs_of(layout)
    widths = costs.widths(drawn(layout, rng))
    sizes = {group.leaf: widths[group.name] for group in layout.groups}
    assert costs.macs.total(widths) == macs(layout.structure, sizes)
    assert costs.params.total(widths) == weight_entries(layout.structure, sizes)
    for group in layout.groups:
        counts = sorted({0, 1, group.units // 2, group.units})
        for cost in (costs.macs, costs.params, costs.size):
            changed = cost.changes(group.name, counts, widths)
            assert changed.tolist() == [cost.total({**widths, group.name: n}) - cost.total(widths) for n in counts]


@pytest.mark.parametrize("kind", [Text, Image])
def test_multiply_accumulates_are_those_that_torch_counts_in_the_cut_module(kind: type[nn.Module]) -> None:
    module = made(kind)
    network, feeds = read(module), inputs(module)
    layout, rng = find(network, [feeds]), np.random.default_rng(5)
    costs = costs_of(layout)
    for _ in range(3):
        keep = drawn(layout, rng)
        smaller = cut_module(module, layout, keep, probes_of(network))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            smaller(*feeds.values())
        assert costs.macs.total(costs.widths(keep)) == counter.get_total_flops() // 2


# weights that are stored in other ways


def shared(dtype: type[np.generic] = np.float32) -> tuple[Network, list[dict[str, np.ndarray]]]:
    """Two chains of products whose biases are one stored vector."""
    rng = np.random.default_rng(0)
    names = [("u", 6, 8), ("v", 8, 6), ("w", 6, 8), ("x", 8, 6)]
    weights = {name: rng.standard_normal((n, m)).astype(dtype) for name, n, m in names}
    weights["b"] = rng.standard_normal(8).astype(dtype)
    nodes, value = [], "in"
    for first, second in (("u", "v"), ("w", "x")):
        nodes += [
            node("MatMul", [value, first], [f"{first}m"]),
            node("Add", [f"{first}m", "b"], [f"{first}b"]),
            node("Relu", [f"{first}b"], [f"{first}r"]),
            node("MatMul", [f"{first}r", second], ["out" if second == "x" else f"{second}m"]),
        ]
        value = f"{second}m"
    probes = [{"in": rng.standard_normal((length, 6)).astype(dtype)} for length in (3, 5)]
    return Network(ir.from_proto(graph(nodes, weights, probes[0])), "a test"), probes


def test_a_vector_that_two_groups_cut_differently_is_stored_twice() -> None:
    network, probes = shared()
    layout = find(network, [tensors(feeds) for feeds in probes])
    first, *_, last = [group.name for group in layout.groups if group.units == 8]
    costs = costs_of(layout)
    assert costs.params.dense == weight_entries(layout.structure) == reals(network)
    for keep in ({first: [0, 1]}, {first: [0, 1], last: [2, 3]}, {first: [0, 1, 2], last: [2, 3]}):
        smaller, widths = cut(layout, keep), costs.widths(keep)
        sizes = {layout.by_name[name].leaf: len(units) for name, units in keep.items()}
        assert costs.params.total(widths) == reals(smaller) == weight_entries(layout.structure, sizes)
        assert costs.size.total(widths) == 4 * reals(smaller)
        for name in (first, last):
            changed = costs.params.changes(name, range(9), widths).tolist()
            assert changed == [costs.params.total({**widths, name: n}) - costs.params.total(widths) for n in range(9)]


def test_bytes_are_those_of_the_stored_types() -> None:
    network, probes = shared(np.float16)
    costs = costs_of(find(network, [tensors(feeds) for feeds in probes]))
    assert costs.size.dense == 2 * costs.params.dense


@pytest.mark.parametrize(("family", "form"), [("bert", "fp16"), ("bert", "int8-qdq"), ("bert", "4-bit")])
def test_bytes_of_fewer_bits_are_those_that_are_left(family: str, form: str) -> None:
    from benchmarks.zoo.dialects import dialect
    from optin_deploy.network.read_onnx import read_file as read_onnx

    layout = find(read_onnx(dialect(family, form).path))
    costs, weights = costs_of(layout), layout.structure.network.weights
    assert costs.size.dense == sum(weights[name].nbytes for name in {use.weight for use in layout.structure.uses})
    keep = drawn(layout, np.random.default_rng(2))
    gone = costs.size.dense - costs.size.total(costs.widths(keep))
    smaller = cut(layout, keep)

    def held(network: Network) -> int:
        """Bytes of all weights but sizes and flags."""
        kinds = (ir.DataType.INT64, ir.DataType.BOOL)
        return sum(weight.nbytes for weight in network.weights.values() if weight.dtype not in kinds)

    assert 0 < gone == held(layout.structure.network) - held(smaller)


# limits


def test_limits_are_shares_as_they_were_typed_and_bytes() -> None:
    costs = costs_of(layout_of("bert"))
    flops, params, most = limits_within(costs, Limits(0.29, 0.5, 60_000))
    assert flops.most == costs.macs.dense * 29 // 100
    assert params.most == costs.params.dense // 2
    assert (most.most, most.resource) == (60_000, costs.size)
    assert flops.option_for(flops.most + 1).startswith("--flops 0.29")
    assert most.option_for(2**20 + 1) == "--size 1025KiB"
    assert CostLimit(costs.macs, 1, "--latency 1ms").option_for(1_500_000).endswith(" 1.5ms")


def test_a_network_of_impossible_size_is_refused() -> None:
    weights: Mapping[str, np.ndarray] = {
        "u": np.zeros((4, 6), np.float32),
        "v": np.zeros((6, 4), np.float32),
    }
    nodes = [node("MatMul", ["in", "u"], ["m"]), node("MatMul", ["m", "v"], ["out"])]
    probe = {"in": np.zeros((3, 4), np.float32)}
    layout = find(Network(ir.from_proto(graph(nodes, dict(weights), probe)), "a test"), [tensors(probe)])
    axis = layout.structure.products[0][1][0]
    layout.structure.products.append((0, (axis, Axis(2**40), Axis(2**40))))
    with pytest.raises(BadInput, match="more than can be planned for"):
        costs_of(layout)


def test_pictures_larger_than_the_probes_cost_what_they_compute_behind_strides_too(tmp_path: Path) -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2), nn.ReLU(), nn.Conv2d(6, 4, 1)
    )
    file = tmp_path / "free.onnx"
    free = {"x": {0: "rows", 2: "height", 3: "width"}}
    with quiet():
        torch.onnx.export(
            *(module, (torch.zeros(2, 3, 20, 24),), file),
            input_names=["x"],
            output_names=["y"],
            dynamic_axes=free,
            dynamo=False,
        )
    found = find_in(file)
    rows = Feeds(({"x": torch.zeros(5, 3, 41, 63)},), (None,) * 5, "zeros")
    assert costs_of(found.layout, sizes_of(found, rows)).macs.dense == (
        41 * 63 * 8 * 3 * 9 + 20 * 31 * 6 * 8 * 9 + 20 * 31 * 4 * 6
    )
