"""Whatever is passed as calibration data becomes batches, or one error that says what a batch is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tiny_scoring import VOCABULARY, bare_bert, bert, image_batch, one_thread, text_batch, vit
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BatchEncoding

from optin_deploy.data.batches import Batches, make_batches
from optin_deploy.errors import BadInput

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)

TEXT = [text_batch((3, 7, 5)), text_batch((4, 2), seed=1)]
FUZZ = os.environ.get("OPTIN_FUZZ") == "1"
GENTLY = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
LONG = settings(max_examples=3000, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def only_once() -> Iterator[Any]:
    yield from TEXT


def refilled() -> Iterator[Any]:
    """A loader that hands out one buffer again and again."""
    buffer = {name: torch.zeros(3, 7, dtype=torch.long) for name in TEXT[0]}
    for seed in range(3):
        for name, value in text_batch((7, 7, 7), seed=seed).items():
            buffer[name].copy_(value)
        yield buffer


def with_(**more: Any) -> list[dict[str, Any]]:
    return [{**batch, **more} for batch in TEXT]


FORMS: dict[str, Callable[[], Any]] = {
    "a list": lambda: TEXT,
    "a tuple": lambda: tuple(TEXT),
    "a generator": only_once,
    "a DataLoader": lambda: DataLoader(TEXT, batch_size=None),  # type: ignore[arg-type]
    "a DataLoader with workers": lambda: DataLoader(TEXT, batch_size=None, num_workers=1),  # type: ignore[arg-type]
    "lists": lambda: [{name: value.tolist() for name, value in batch.items()} for batch in TEXT],
    "arrays": lambda: [{name: value.numpy() for name, value in batch.items()} for batch in TEXT],
    "arrays of int32, read-only": lambda: [
        {name: np.broadcast_to(value.numpy().astype(">i4"), value.shape) for name, value in batch.items()}
        for batch in TEXT
    ],
    "lists of tensors": lambda: [{name: list(value) for name, value in batch.items()} for batch in TEXT],
    "tuples": lambda: [tuple(batch.values()) for batch in TEXT],
    "lists of inputs, as collated": lambda: [list(batch.values()) for batch in TEXT],
    "encodings": lambda: [BatchEncoding(batch) for batch in TEXT],
    "labels": lambda: with_(labels=torch.zeros(9), label=["a"]),
    "tuples with labels": lambda: [(*batch.values(), torch.zeros_like(batch["input_ids"])) for batch in TEXT],
    "masks of bool": lambda: [batch | {"attention_mask": batch["attention_mask"].bool()} for batch in TEXT],
    "masks of float": lambda: [batch | {"attention_mask": batch["attention_mask"].double()} for batch in TEXT],
    "None": lambda: with_(position_ids=None),
    "another order": lambda: [dict(reversed(batch.items())) for batch in TEXT],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_batches(form: str) -> None:
    found = make_batches(bert(), FORMS[form]())
    assert len(found) == len(TEXT)
    for batch, expected in zip(found, TEXT, strict=True):
        some = {name: value for name, value in batch.items() if name != "token_type_ids"}
        assert some.keys() == expected.keys()
        assert all(
            torch.equal(some[name], value) and some[name].dtype == torch.int64 for name, value in expected.items()
        )


@pytest.mark.parametrize("form", [lambda: TEXT[0], lambda: TEXT[0]["input_ids"], lambda: TEXT[0]["input_ids"].numpy()])
def test_one_batch_alone_is_one_batch(form: Callable[[], Any]) -> None:
    (batch,) = make_batches(bert(), form())
    assert torch.equal(batch["input_ids"], TEXT[0]["input_ids"])


def test_a_dataset_that_knows_its_length_ends_there() -> None:
    class Endless:
        def __len__(self) -> int:
            return len(TEXT)

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return TEXT[index % len(TEXT)]

    assert len(make_batches(bert(), Endless())) == len(TEXT)


def test_batches_that_never_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optin_deploy.data.batches.MOST_ROWS", 50)
    with pytest.raises(BadInput, match="more than 50 calibration samples: does the cycle ever end"):
        make_batches(bert(), cycle(TEXT))


def test_images_come_in_the_type_of_the_model() -> None:
    wanted = image_batch(3)["pixel_values"]
    for given_ in (
        wanted,
        wanted.float(),
        (wanted, torch.zeros(3)),
        [wanted.numpy()],
        {"pixel_values": wanted.tolist()},
    ):
        for model in (vit(), vit().float(), vit().bfloat16()):
            (batch,) = make_batches(model, [given_])
            assert batch["pixel_values"].dtype == next(model.parameters()).dtype
            assert torch.allclose(batch["pixel_values"].double(), wanted, atol=0.02)


def test_a_buffer_that_is_filled_again_is_copied() -> None:
    found = make_batches(bert(), refilled())
    wanted = [text_batch((7, 7, 7), seed=seed)["input_ids"] for seed in range(3)]
    assert all(torch.equal(batch["input_ids"], ids) for batch, ids in zip(found, wanted, strict=True))


def test_tensors_made_in_inference_mode_can_be_learned_from() -> None:
    with torch.inference_mode():
        made = [{name: value.clone() for name, value in batch.items()} for batch in TEXT]
    assert not any(value.is_inference() for batch in make_batches(bert(), made) for value in batch.values())


def test_what_was_checked_for_a_model_is_checked_once_and_for_another_again() -> None:
    model, other = bert(), vit()
    found = make_batches(model, TEXT)
    assert make_batches(model, found) is found
    with pytest.raises(BadInput, match="pixel_values"):
        make_batches(other, found)


def ids(*rows: list[int]) -> Any:
    return {"input_ids": list(rows)}


def masked_by(value: Any) -> Any:
    return [TEXT[0] | {"attention_mask": value}]


WRONG: list[tuple[Any, str]] = [
    (None, "NoneType"),
    (3, "int"),
    ("texts", "str"),
    (dict, "type"),
    ([], "no calibration batches"),
    ([{}], "batch 0: input_ids is missing"),
    ([TEXT[0], {}], "batch 1: input_ids is missing"),
    ([None], "batch 0: it is a NoneType"),
    ([7], "batch 0: it is a int"),
    (["a text"], "batch 0: it is a str"),
    ([[]], "no rows"),
    ([{"input_ids": torch.zeros(0, 3, dtype=torch.long)}], "no rows"),
    ([{"input_ids": torch.zeros(3, 0, dtype=torch.long)}], "shape"),
    ([ids([1, 2], [3])], "one length"),
    ([ids([1, 2], [3, VOCABULARY])], f"hold {VOCABULARY}; possible are 0 to {VOCABULARY - 1}"),
    ([ids([1, -2])], "hold -2"),
    ([ids([1, 2**70])], "numbers"),
    ([{"input_ids": torch.rand(2, 3)}], "whole numbers"),
    ([{"input_ids": torch.ones(2, 3, dtype=torch.bool)}], "whole numbers"),
    ([{"input_ids": torch.ones(2, 3, dtype=torch.complex64)}], "complex64"),
    ([{"input_ids": torch.ones(2, 3, device="meta").long()}], "without plain values"),
    ([{"input_ids": torch.ones(2, 3).long().to_sparse()}], "without plain values"),
    ([{"input_ids": torch.tensor(5)}], "one row a sample"),
    ([{"input_ids": torch.ones(4).long()}], "rows, tokens"),
    ([{"input_ids": torch.ones(2, 3, 4).long()}], "rows, tokens"),
    ([{"input_ids": ["a", "b"]}], "numbers"),
    ([{"input_ids": {"a": 1}}], "numbers"),
    ([ids([1] * 25)], "25 tokens; the model's position table holds 24"),
    ([{"inputs": TEXT[0]["input_ids"]}], "'inputs' is no input of BertForSequenceClassification"),
    ([TEXT[0] | {3: 4}], "3 is no input"),
    ([TEXT[0] | {"return_dict": False}], "'return_dict' is no input"),
    ([TEXT[0] | {"pixel_values": torch.zeros(3, 3)}], "'pixel_values' is no input"),
    ([TEXT[0] | {"token_type_ids": torch.full((3, 7), 2)}], "hold 2; possible are 0 to 1"),
    ([TEXT[0] | {"position_ids": torch.full((3, 7), 24)}], "hold 24"),
    ([TEXT[0] | {"position_ids": torch.zeros(1, 7).long()}], "rows"),
    (masked_by(torch.ones(2, 7)), "input_ids 3, attention_mask 2"),
    (masked_by(torch.ones(3, 8)), "attention_mask is an array of shape"),
    (masked_by(torch.full((3, 7), 2)), "other values than 1"),
    (masked_by(torch.full((3, 7), float("nan"))), "other values than 1"),
    (masked_by(torch.tensor([[1] * 7, [0] * 7, [1] * 7])), "row 1 has no token"),
    ([TEXT[0], {"input_ids": TEXT[1]["input_ids"]}], "same inputs in all batches"),
    ([(TEXT[0]["input_ids"],) * 9], "tuple of 9"),
]


@pytest.mark.parametrize(("wrong", "says"), WRONG, ids=[says for _, says in WRONG])
def test_what_is_no_batch_is_refused_with_what_is_one(wrong: Any, says: str) -> None:
    with pytest.raises(BadInput) as caught:
        make_batches(bert(), wrong)
    assert says in str(caught.value)
    assert "A batch is a dict" in str(caught.value)


@pytest.mark.parametrize(
    ("pixels", "says"),
    [
        (torch.zeros(2, 8, 8, 3), "3, height, width"),
        (torch.zeros(2, 1, 8, 8), "3, height, width"),
        (torch.zeros(3, 8, 8), "3, height, width"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "give floats"),
        (torch.full((2, 3, 8, 8), float("inf")), "NaN or infinity"),
        (torch.zeros(2, 3, 12, 8), "does not take it"),  # in the model's own words
        (torch.zeros(2, 3, 2, 2), "does not take it"),
    ],
)
def test_images_that_the_model_cannot_take_are_refused(pixels: Tensor, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        make_batches(vit(), [{"pixel_values": pixels}])


def test_too_few_samples_are_told_with_the_least() -> None:
    with pytest.raises(BadInput, match="5 calibration samples are too few; give at least 6 samples"):
        make_batches(bert(), TEXT, least=6)


def test_checking_leaves_model_and_batches_as_they_were() -> None:
    model = bert().train()
    model.config.return_dict = False
    before = [{name: value.clone() for name, value in batch.items()} for batch in TEXT]
    make_batches(model, TEXT)
    assert model.training
    assert not model.config.return_dict
    assert all(torch.equal(a[name], b[name]) for a, b in zip(before, TEXT, strict=True) for name in a)


# --- any form at all ------------------------------------------------------------------------------------------

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


def is_batches_or_bad_input(data: Any, model: nn.Module) -> None:
    refusal = ""
    try:
        found = make_batches(model, data)
    except BadInput as err:
        refusal = str(err)
    if refusal:
        assert "A batch is" in refusal
        assert len(refusal) < 1500
        return
    assert isinstance(found, Batches)
    with torch.no_grad():
        for batch in found:
            model(**batch)


@GENTLY
@given(data=ANYTHING, model=st.sampled_from(MODELS))
def test_anything_becomes_batches_or_is_refused(data: Any, model: nn.Module) -> None:
    is_batches_or_bad_input(data, model)


@pytest.mark.skipif(not FUZZ, reason="3,000 cases: set OPTIN_FUZZ=1")
@LONG
@given(data=ANYTHING, model=st.sampled_from(MODELS))
def test_anything_becomes_batches_or_is_refused_thousands_of_times(data: Any, model: nn.Module) -> None:
    is_batches_or_bad_input(data, model)
