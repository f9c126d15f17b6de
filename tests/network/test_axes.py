"""Axes as expressions: what stays of a product or a sum is what numpy keeps of the data that lies along it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optin_deploy.network.axes import Axis, freeze, kept, product, size, total, touched, unify

SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


def some(leaf: Axis, draw: st.DataObject) -> np.ndarray:
    units = draw.draw(st.sets(st.integers(0, leaf.size - 1), max_size=leaf.size))
    return np.array(sorted(units), dtype=np.int64)


@given(sizes=SIZES, draw=st.data())
def test_what_stays_of_a_product_is_what_stays_of_an_array(sizes: list[int], draw: st.DataObject) -> None:
    axes = [Axis(each) for each in sizes]
    whole = Axis(math.prod(sizes))
    unify(whole, product(axes))
    keep = {leaf: some(leaf, draw) for axis in axes for leaf in axis.leaves() if leaf.size > 1}
    array = np.arange(whole.size).reshape(sizes)
    stays = array[np.ix_(*(kept(axis, keep) for axis in axes))].ravel()
    assert kept(whole, keep).tolist() == stays.tolist()
    assert size(whole, {leaf: len(units) for leaf, units in keep.items()}) == len(stays)


@given(sizes=SIZES, draw=st.data())
def test_what_stays_of_a_sum_is_what_stays_of_its_parts(sizes: list[int], draw: st.DataObject) -> None:
    axes = [Axis(each) for each in sizes]
    whole = Axis(sum(sizes))
    unify(whole, total(axes))
    keep = {leaf: some(leaf, draw) for axis in axes for leaf in axis.leaves() if leaf.size > 1}
    parts = np.split(np.arange(whole.size), np.cumsum(sizes)[:-1])
    stays = np.concatenate([part[kept(axis, keep)] for part, axis in zip(parts, axes, strict=True)])
    assert kept(whole, keep).tolist() == stays.tolist()
    assert size(whole, {leaf: len(units) for leaf, units in keep.items()}) == len(stays)


@given(sizes=st.lists(st.sampled_from([2, 3, 5]), min_size=2, max_size=5), draw=st.data())
def test_two_ways_to_merge_the_same_axes_agree_on_every_unit(sizes: list[int], draw: st.DataObject) -> None:
    """A fine shape is merged in two ways; what one way cuts, the other must see at the same entries."""
    cuts = [draw.draw(st.lists(st.booleans(), min_size=len(sizes) - 1, max_size=len(sizes) - 1)) for _ in range(2)]
    whole = Axis(math.prod(sizes))
    views = []
    for cut in cuts:
        shape = [sizes[0]]
        for each, new in zip(sizes[1:], cut, strict=True):
            shape = [*shape, each] if new else [*shape[:-1], shape[-1] * each]
        axes = [Axis(each) for each in shape]
        unify(whole, product(axes))
        views.append((shape, axes))
    keep = {leaf: some(leaf, draw) for leaf in dict.fromkeys(whole.leaves())}
    for shape, axes in views:
        assert not any(leaf.frozen for axis in axes for leaf in axis.leaves())
        array = np.arange(whole.size).reshape(shape)
        stays = array[np.ix_(*(kept(axis, keep) for axis in axes))].ravel()
        assert kept(whole, keep).tolist() == stays.tolist()


def test_three_projections_in_one_matrix_are_a_sum_of_products_however_they_are_taken_apart() -> None:
    heads, width = 4, 6
    matrix = Axis(3 * heads * width)
    queries, keys, values = (Axis(heads * width) for _ in range(3))
    unify(matrix, total([queries, keys, values]))
    for part in (queries, keys, values):
        unify(part, product([Axis(heads), Axis(width)]))
    one, other = (next(part.leaves()) for part in (queries, keys))
    unify(one, other)
    keep = {next(queries.leaves()): np.array([1, 3])}
    expected = np.arange(matrix.size).reshape(3, heads, width)
    stays = np.concatenate([expected[0][[1, 3]].ravel(), expected[1][[1, 3]].ravel(), expected[2].ravel()])
    assert kept(matrix, keep).tolist() == stays.tolist()


def test_a_product_is_split_by_its_first_factor() -> None:
    heads, width = Axis(9), Axis(5)
    parts = [Axis(5 * 5), Axis(2 * 5), Axis(2 * 5)]
    unify(product([heads, width]), total(parts))
    leaves = list(heads.leaves())
    assert [leaf.size for leaf in leaves] == [5, 2, 2]
    keep = {leaves[1]: np.array([1])}
    assert kept(parts[1], keep).tolist() == [5, 6, 7, 8, 9]
    assert kept(heads, keep).tolist() == [0, 1, 2, 3, 4, 6, 7, 8]


def test_what_does_not_match_is_frozen_with_the_reason() -> None:
    one, other = product([Axis(4), Axis(6)]), product([Axis(6), Axis(4)])
    unify(one, other, "at Reshape x")
    reasons = {leaf.frozen for axis in (one, other) for leaf in axis.leaves()}
    assert reasons == {"its parts do not match: (4 x 6), (6 x 4) at Reshape x"}


def test_a_frozen_leaf_freezes_what_it_becomes_and_the_first_reason_stays() -> None:
    leaf, heads, width = Axis(12), Axis(3), Axis(4)
    freeze([leaf], "LayerNormalization")
    unify(leaf, product([heads, width]))
    freeze([heads], "output")
    assert heads.frozen == width.frozen == "LayerNormalization"


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (0, 0)])
def test_parts_without_entries_change_nothing(sizes: tuple[int, int]) -> None:
    axes = [Axis(each) for each in sizes]
    whole = total(axes)
    assert whole.size == sum(sizes)
    assert not touched(whole, {})
    assert kept(whole, {}).tolist() == list(range(sum(sizes)))


def test_axes_of_unlike_sizes_are_never_unified() -> None:
    with pytest.raises(AssertionError, match="have 3 and 4 entries"):
        unify(Axis(3), Axis(4))
