"""Einsums of many tensors, as Einsums of two: the same numbers as NumPy's, and heads that three tensors share."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from optin_deploy.network.graph import Network
from optin_deploy.network.read_onnx import read_proto
from optin_deploy.structure.find import find
from support.one_cut import graph, holds, run, tensors

RNG = np.random.default_rng(0)
SIZES = {"b": 2, "i": 3, "j": 4, "h": 3, "d": 5, "o": 2}


def w(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    "equation",
    [
        *("bhij,bjhd,hdo->bio", "bi,bj,bd->b", "ij,ij,ij->ij", "ijj,j,jd,do->io", "bi,ij,jo"),
        *("...i,ij,jo->...o", "i...,...j,jo", "bi,...j,oj->b...o"),
    ],
)
def test_many_factors_are_multiplied_in_pairs(equation: str) -> None:
    terms = equation.partition("->")[0].split(",")
    shapes = [
        [SIZES[letter] for part in term.replace("...", "b") for letter in part if part in SIZES] for term in terms
    ]
    values = {f"x{place}": w(*shape) for place, shape in enumerate(shapes)}
    nodes = [helper.make_node("Einsum", list(values), ["out"], equation=equation)]
    network = read_proto(graph(nodes, {}, values))
    assert [len(node.inputs) for node in network.nodes] == [2] * (len(terms) - 1)
    (found,) = run(network, values)
    np.testing.assert_allclose(found, np.einsum(equation, *values.values()), atol=1e-4)


def attention() -> onnx.ModelProto:
    """Values are mixed and projected by one Einsum."""
    nodes = [
        *(helper.make_node("Einsum", ["x", name], [name[1:]], equation="bic,chd->bihd") for name in ("wq", "wk", "wv")),
        helper.make_node("Einsum", ["q", "k"], ["scores"], equation="bihd,bjhd->bhij"),
        helper.make_node("Softmax", ["scores"], ["mixes"]),
        helper.make_node("Einsum", ["mixes", "v", "wo"], ["out"], equation="bhij,bjhd,hdo->bio"),
    ]
    weights = {"wq": w(6, 3, 4), "wk": w(6, 3, 4), "wv": w(6, 3, 4), "wo": w(3, 4, 6)}
    return graph(nodes, weights, {"x": w(2, 5, 6)})


def test_heads_that_three_tensors_share_are_units() -> None:
    model = ir.to_proto(read_proto(attention()).model)
    holds(model, [{"x": w(2, 5, 6)}, {"x": w(3, 7, 6)}], {(3, "heads"): 1, (4, "qk-width"): 1, (4, "v-width"): 1})


def test_what_an_einsum_of_three_keeps_whole_is_told() -> None:
    layout = find(
        Network(ir.from_proto(attention()), "as it is"), [tensors({"x": w(*s)}) for s in ((2, 5, 6), (3, 7, 6))]
    )
    assert [(each.units, each.why) for each in layout.frozen if "Einsum" in each.why] == [
        (3, "Einsum bhij,bjhd,hdo->bio")
    ]
