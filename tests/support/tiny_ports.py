"""Networks with any inputs: each is looked up in a table or handed on, and put out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from optin_deploy.data.samples import Sample
from optin_deploy.feeds.image_feeds import image_feeds, image_input
from optin_deploy.feeds.ports import takes
from optin_deploy.feeds.rows import Batching, Feeds
from optin_deploy.feeds.text_feeds import text_feeds, text_inputs
from optin_deploy.network.graph import Network
from optin_deploy.network.read import read
from support.tiny_graphs import INT64, model_of, value, weight

LENGTH = "length"
TEXT = ("input_ids", "attention_mask", "token_type_ids")
ROWS = 160
"""Of the table of words."""


def model(*inputs: onnx.ValueInfoProto) -> onnx.ModelProto:
    nodes, outputs = [], []
    for port in inputs:
        if port.name.startswith("input_ids"):
            nodes += [
                helper.make_node("Cast", [port.name], [f"{port.name}_long"], to=INT64),
                helper.make_node("Gather", ["words", f"{port.name}_long"], [f"{port.name}_out"]),
            ]
        else:
            nodes.append(helper.make_node("Cast", [port.name], [f"{port.name}_out"], to=TensorProto.FLOAT))
        outputs.append(helper.make_empty_tensor_value_info(f"{port.name}_out"))
        outputs[-1].type.tensor_type.elem_type = TensorProto.FLOAT
    return model_of(nodes, inputs, outputs, [weight("words", ROWS, 4)])


def network(*inputs: onnx.ValueInfoProto) -> Network:
    return read(model(*inputs))


def text(*names: str, shape: Sequence[int | str] = ("batch", LENGTH), dtype: int = INT64) -> Network:
    return network(*(value(name, *shape, dtype=dtype) for name in names or TEXT))


def image(*shape: int | str, dtype: int = TensorProto.FLOAT) -> Network:
    return network(value("image", *shape, dtype=dtype))


def text_rows(samples: Sequence[Sample], tokenizer: Any, *names: str, seq_len: int = 16, batch_size: int = 32) -> Feeds:
    """Texts as a network with these inputs takes them."""
    how: dict[str, Any] = {"seq_len": seq_len, "batching": Batching(batch_size), "origin": "the tests"}
    return text_feeds(text_inputs(takes(text(*names))), samples, tokenizer, **how)


def image_rows(samples: Sequence[Sample], processor: Any, *, channels: int = 3, batch_size: int = 32) -> Feeds:
    """Images as a network of so many channels takes them, of any size."""
    how: dict[str, Any] = {"pixels": None, "size": None, "batching": Batching(batch_size), "origin": "the tests"}
    return image_feeds(image_input(takes(image("batch", channels, "h", "w"))), samples, processor, **how)


def saved(folder: Path, *inputs: onnx.ValueInfoProto) -> Network:
    """A network in a file of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model(*inputs), folder / "model.onnx")
    return read(folder / "model.onnx")
