"""What people iterate over becomes feeds by the forward's names; what may be an input or a label is not guessed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from optin_deploy.errors import BadInput
from optin_deploy.feeds.feeds import Drawing, feeds_of
from optin_deploy.feeds.module_feeds import example_in
from optin_deploy.network.read_torch import read_module
from optin_deploy.network.run import Program
from support import tiny_checkpoint as tiny


class One(nn.Module):
    """Takes an image, as torchvision's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.conv(x).mean((2, 3))
        return found


class Two(One):
    """Needs two inputs."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(a) + b


class Optional(One):
    """Takes one, and maybe another."""

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class Starred(One):
    """Does not name what it takes."""

    def forward(self, *values: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(values[0])


X = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(40) % 7
B = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
ALL = Drawing(held_out=0)


def parts(*tensors: Tensor, size: int = 10) -> list[tuple[Tensor, ...]]:
    return list(zip(*(tensor.split(size) for tensor in tensors), strict=True))


FORMS: dict[str, Callable[[], Any]] = {
    "a DataLoader": lambda: DataLoader(TensorDataset(X, Y), batch_size=10),
    "a generator": lambda: (pair for pair in parts(X, Y)),
    "tuples": lambda: parts(X, Y),
    "dicts": lambda: [{"x": x, "labels": y} for x, y in parts(X, Y)],
    "dicts beside labels": lambda: [({"x": x}, y) for x, y in parts(X, Y)],
    "tuples beside labels": lambda: [((x,), y.tolist()) for x, y in parts(X, Y)],
    "arrays": lambda: [(x.numpy(), y.numpy()) for x, y in parts(X, Y)],
    "lists": lambda: [(x.tolist(), y.tolist()) for x, y in parts(X, Y)],
    "one dict": lambda: {"x": X, "label": Y},
    "doubles": lambda: [[x.double(), y.int()] for x, y in parts(X, Y)],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows_with_their_labels(form: str) -> None:
    found = feeds_of(One(), FORMS[form](), ALL).calibration
    rows = torch.cat([batch["x"] for batch in found.batches])
    order = [int((row == X).flatten(1).all(1).nonzero()) for row in rows]
    assert sorted(order) == list(range(40))
    assert list(found.labels) == [int(Y[i]) for i in order]
    assert rows.dtype == torch.float32


def test_two_needed_inputs_are_no_labels() -> None:
    found = feeds_of(Two(), parts(X, B), ALL).calibration
    assert list(found.batches[0]) == ["a", "b"]
    assert set(found.labels) == {None}
    labelled = feeds_of(Two(), parts(X, B, Y), ALL).calibration
    assert list(labelled.batches[0]) == ["a", "b"]
    assert None not in labelled.labels


def test_what_may_be_an_input_or_labels_is_not_guessed() -> None:
    with pytest.raises(BadInput, match="is the last of them 'scale', or the labels"):
        feeds_of(Optional(), parts(X, Y))
    assert list(feeds_of(Optional(), [{"x": X}]).calibration.batches[0]) == ["x"]
    assert list(feeds_of(Optional(), [X]).calibration.batches[0]) == ["x"]


def test_names_are_given_where_the_forward_has_none() -> None:
    with pytest.raises(BadInput, match="arguments without names: give dicts, or `names`"):
        feeds_of(Starred(), [X])
    assert list(feeds_of(Starred(), [X], names=["pixels"]).calibration.batches[0]) == ["pixels"]


def test_transformers_models_take_what_their_tokenizer_makes() -> None:
    model = transformers.BertForSequenceClassification.from_pretrained(tiny.classifier())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.classifier())
    encoded = tokenizer(list(tiny.texts()), padding=True, return_tensors="pt")
    found = feeds_of(model, [{**encoded, "labels": torch.ones(len(tiny.texts()))}], ALL).calibration
    assert set(found.batches[0]) == {"input_ids", "token_type_ids", "attention_mask"}
    assert set(found.labels) == {1.0}
    assert len(feeds_of(model, [encoded], ALL).calibration) == len(tiny.texts())


def test_an_iterator_is_read_once_and_no_further_than_needed() -> None:
    read = 0

    def many() -> Iterator[Tensor]:
        nonlocal read
        for _ in range(50):
            read += 1
            yield torch.randn(10, 3, 8, 8)

    found = feeds_of(One(), many(), Drawing(samples=30))
    assert found.held_out is not None
    assert (len(found.calibration), len(found.held_out)) == (30, 16)
    assert read == 5
    assert not set(found.calibration.keys) & set(found.held_out.keys)


def test_a_buffer_that_is_filled_again_is_copied() -> None:
    buffer = torch.empty(10, 3, 8, 8)

    def refilled() -> Iterator[Tensor]:
        for start in range(0, 40, 10):
            buffer.copy_(X[start : start + 10])
            yield buffer

    assert len(feeds_of(One(), refilled(), ALL).calibration) == 40
    assert len(feeds_of(One(), [X], ALL).calibration) == 40


def test_repeated_rows_count_once(caplog: pytest.LogCaptureFixture) -> None:
    assert len(feeds_of(One(), [X, X[:5]], ALL).calibration) == 40
    assert "5 of 45 samples repeat others" in caplog.text


def test_batches_of_other_sizes_stay_apart() -> None:
    found = feeds_of(One(), [X, torch.randn(9, 3, 16, 16)], ALL, batch_size=16).calibration
    assert sorted(len(batch["x"]) for batch in found.batches) == [8, 9, 16, 16]


def test_labels_that_are_boxes_are_not_used(caplog: pytest.LogCaptureFixture) -> None:
    found = feeds_of(One(), [(X, [{"boxes": X}] * 40)], ALL).calibration
    assert set(found.labels) == {None}
    assert "which are not used" in caplog.text


class Samples:
    """A map-style data set."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return X[index], int(Y[index])


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (5, "the calibration batches are an int, 5"),
        ("x.npz", "the calibration batches are a str"),
        ([], "gives no calibration batches"),
        (iter([]), "gives no calibration batches"),
        (Samples(), r"samples one by one. Give `torch.utils.data.DataLoader"),
        ((X, Y), "a tuple of 2 tensors: is it one batch, or"),
        ([{"y": X}], "batch 0: 'y' is none of its arguments. .* One takes x"),
        ([{}], "x is missing; it has nothing"),
        ([X, {"x": None}], "batch 1: x is missing"),
        ([(X, Y, Y)], "it is 3 values, and the forward does not take so many"),
        ([[X, Y[:5]]], r"labels has the shape \(5,\) for 40 samples"),
        ([{"x": X, "label": Y, "labels": Y}], "label and labels: which of them"),
        ([({"x": X, "labels": Y}, Y)], "labels among the inputs and beside them"),
        ([X[0, 0, 0, 0]], "it needs one row a sample"),
        ([X[:0]], "it has no rows"),
        ([torch.full((9, 3, 8, 8), torch.nan)], "NaN or infinity"),
        ([X.to_sparse()], "without plain values"),
        ([X.to("meta")], "without plain values"),
        ([X.to(torch.complex64)], "real or whole numbers"),
        (["text"], "it needs a tensor"),
        ([[[1, 2], [3]]], "no array: its rows must be of one length"),
        ([np.array(["a"] * 9)], "it needs numbers"),
        ([X[:3]], "3 calibration samples in all from a list, but 8 are the least"),
        ([X[:1].repeat(20, 1, 1, 1)], "1 different samples among 20 from a list"),
        ([(X, np.array([object()] * 40))], "possible are numbers and names of classes"),
    ],
)
def test_wrong_batches_say_what_a_batch_is(given: Any, told: str) -> None:
    with pytest.raises(BadInput, match=told):
        feeds_of(One(), given)


def test_unequal_inputs_are_told() -> None:
    with pytest.raises(BadInput, match="differ in rows: a 40, b 5"):
        feeds_of(Two(), [(X, B[:5])])
    with pytest.raises(BadInput, match="batch 1: it has x, batch 0 has x, scale"):
        feeds_of(Optional(), [{"x": X, "scale": X}, {"x": X}])


def test_an_example_frees_the_axes_whose_sizes_differ() -> None:
    class Padded(nn.Module):
        def forward(self, ids: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
            return (ids * mask).sum(1, keepdim=True) * weight.float()

    def batch(rows: int, length: int) -> dict[str, Tensor]:
        ids = torch.randint(1, 9, (rows, length))
        return {"ids": ids, "mask": torch.ones_like(ids), "weight": torch.randn(rows, 3)}

    found = feeds_of(Padded(), [batch(12, 1), batch(20, 7), batch(9, 5)], ALL).calibration
    example = example_in(found)
    assert example.axes == {"ids": {0: "batch", 1: "size_1"}, "mask": {0: "batch", 1: "size_1"}, "weight": {0: "batch"}}
    assert {name: tuple(value.shape) for name, value in example.inputs.items()} == {
        "ids": (2, 7),
        "mask": (2, 7),
        "weight": (2, 3),
    }
    network = read_module(Padded(), example.inputs, axes=example.axes)
    for each in found.batches:
        ran = next(iter(Program(network)(each).outputs.values()))
        assert torch.allclose(ran, Padded()(**each))
