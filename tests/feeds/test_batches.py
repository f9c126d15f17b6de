"""Whatever is passed to the library as calibration data becomes rows, or one error that says what a batch is."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor, nn

from optin_deploy.errors import BadInput
from optin_deploy.feeds.feeds import Drawing, feeds_of
from optin_deploy.feeds.module_feeds import module_feeds
from optin_deploy.feeds.rows import rows_of
from support.tiny_scoring import bare_bert, bert, one_thread, vit

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)

FUZZ = os.environ.get("OPTIN_FUZZ") == "1"
GENTLY = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
LONG = settings(max_examples=3000, deadline=None, suppress_health_check=[HealthCheck.too_slow])

NAMES = st.sampled_from(
    ["input_ids", "attention_mask", "token_type_ids", "position_ids", "labels", "pixel_values", "use_cache", "", "x"]
)
NUMBERS = st.one_of(st.integers(-2, 45), st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=3))
DTYPES = st.sampled_from([torch.int64, torch.int32, torch.uint8, torch.float32, torch.float16, torch.bool])


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    return torch.full(shape, draw(st.integers(0, 41))).to(draw(DTYPES))


VALUES = st.one_of(
    tensors(),
    arrays.arrays(
        st.sampled_from(["<i8", ">u2", "f4", "c8", "?", "U2", "O", "M8[s]"]), arrays.array_shapes(max_side=3)
    ),
    st.lists(st.lists(st.integers(0, 50), min_size=2, max_size=2), max_size=3),
    st.recursive(NUMBERS, lambda inner: st.lists(inner, max_size=3), max_leaves=8),
)
BATCH = st.one_of(st.dictionaries(NAMES, VALUES, max_size=4), st.tuples(VALUES, VALUES), VALUES)
ANYTHING = st.one_of(
    st.lists(BATCH, max_size=3),
    st.lists(BATCH, max_size=2).map(iter),
    st.recursive(
        BATCH, lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(NAMES, inner, max_size=2))
    ),
)
MODELS: list[nn.Module] = [bert(), bare_bert(), vit()]


def is_rows_or_bad_input(data: Any, model: nn.Module) -> None:
    refusal = ""
    try:
        found = module_feeds(model, data, most=100)
    except BadInput as err:
        refusal = str(err)
    if refusal:
        assert len(refusal) < 1500
        return
    for batch in found.batches:
        assert {len(value) for value in batch.values()} == {rows_of(batch)} != {0}
        assert all(bool(value.isfinite().all()) for value in batch.values())
        assert all(value.device.type == "cpu" for value in batch.values())
    assert len(found) == sum(map(rows_of, found.batches)) == len(found.keys)


@GENTLY
@given(data=ANYTHING, model=st.sampled_from(MODELS))
def test_anything_becomes_rows_or_is_refused(data: Any, model: nn.Module) -> None:
    is_rows_or_bad_input(data, model)


@pytest.mark.skipif(not FUZZ, reason="3,000 cases: set OPTIN_FUZZ=1")
@LONG
@given(data=ANYTHING, model=st.sampled_from(MODELS))
def test_anything_becomes_rows_or_is_refused_thousands_of_times(data: Any, model: nn.Module) -> None:
    is_rows_or_bad_input(data, model)


def test_tensors_made_in_inference_mode_can_be_learned_from() -> None:
    with torch.inference_mode():
        made = [torch.arange(5, 40).view(5, 7), torch.arange(5, 25).view(5, 4)]
    found = feeds_of(bert(), [{"input_ids": each} for each in made], Drawing(held_out=0.0))
    assert not any(value.is_inference() for batch in found.calibration.batches for value in batch.values())


def test_images_come_in_the_type_of_the_model() -> None:
    for model in (vit(), vit().float(), vit().bfloat16()):
        for given_ in (torch.rand(3, 3, 8, 8), torch.rand(3, 3, 8, 8).double().numpy()):
            (batch,) = module_feeds(model, [given_], most=9).batches
            assert batch["pixel_values"].dtype == next(model.parameters()).dtype
