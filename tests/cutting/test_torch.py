"""Torch modules cut by their graph: they compute what the cut graph computes, and every attribute follows."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from optin_deploy.cutting.graph import cut
from optin_deploy.cutting.torch import cut_and_tell, cut_module
from optin_deploy.errors import BadInput
from optin_deploy.network.module import NetworkModule
from optin_deploy.network.read_torch import read_module
from optin_deploy.structure.find import find
from optin_deploy.structure.groups import Layout

pytestmark = pytest.mark.usefixtures("by_torchscript")

TEXT = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 80, "vocab_size": 97,
    "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = {**TEXT, "num_key_value_heads": 3, "use_cache": False, "pad_token_id": 0, "eos_token_id": 2}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 24, "depths": [2, 2], "num_heads": [3, 6], "window_size": 4}
GPT = {
    "vocab_size": 97,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 6,
    "n_inner": 80,
    "n_positions": 64,
    "use_cache": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def made(cls: Callable[[Any], nn.Module], config: Any, **sizes: Any) -> nn.Module:
    return cls(config(**sizes))


FAMILIES: Mapping[str, tuple[Callable[[], nn.Module], str]] = {
    "bert": (partial(made, hf.BertModel, hf.BertConfig, **TEXT), "text"),
    "gpt2": (partial(made, hf.GPT2Model, hf.GPT2Config, **GPT), "text"),
    "llama": (partial(made, hf.LlamaModel, hf.LlamaConfig, **GROUPED), "text"),
    "swin": (partial(made, hf.SwinModel, hf.SwinConfig, **SWIN), "image"),
    "mobilenet": (
        partial(made, hf.MobileNetV2Model, hf.MobileNetV2Config, depth_multiplier=0.25, image_size=32),
        "image",
    ),
}


def scattered(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw weights so that every unit matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + noise * (0.1 if parameter.dim() < 2 else parameter[0].numel() ** -0.5))
    return module.eval()


def probes(kind: str) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    if kind == "text":
        ids = [torch.randint(5, 97, size, generator=generator) for size in ((7, 13), (5, 17))]
        return [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in ids]
    return [{"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator)} for batch in (7, 5)]


def layout_of(module: nn.Module, feeds: list[dict[str, Tensor]]) -> Layout:
    axes = {
        name: dict(enumerate(("batch", "length") if value.dim() == 2 else ("batch",)))
        for name, value in feeds[0].items()
    }
    return find(read_module(module, feeds[0], axes=axes), feeds)


def some(layout: Layout, kinds: tuple[str, ...], *, least: int = 1, seed: int = 0) -> dict[str, list[int]]:
    """Keep another part of every group."""
    rng = np.random.default_rng(seed)
    return {
        group.name: sorted(rng.choice(group.units, rng.integers(least, group.units), replace=False).tolist())
        for group in layout.groups
        if group.kind in kinds and group.units > least
    }


def by_onnxruntime(layout: Layout, keep: Mapping[str, list[int]], feeds: Mapping[str, Tensor]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    model = ir.to_proto(cut(layout, keep).model).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {name: value.numpy() for name, value in feeds.items()}))


def outputs(module: nn.Module, feeds: Mapping[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        found = module(**feeds)
    return [value for value in found.values() if isinstance(value, Tensor)] if isinstance(found, Mapping) else [found]


def close(module: nn.Module, expected: list[np.ndarray], feeds: Mapping[str, Tensor]) -> None:
    for one, other in zip(outputs(module, feeds), expected, strict=True):
        torch.testing.assert_close(
            one, torch.from_numpy(other), rtol=0, atol=1e-5 * max(1.0, float(np.abs(other).max()))
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_class_computes_what_the_cut_graph_computes(family: str) -> None:
    build, kind = FAMILIES[family]
    module, feeds = scattered(build()), probes(kind)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    layout = layout_of(module, feeds)
    keep = some(layout, ("heads", "groups", "queries", "neurons", "channels"))
    assert keep
    smaller = cut_module(module, layout, keep, feeds)
    assert type(smaller) is type(module)
    close(smaller, by_onnxruntime(layout, keep, feeds[1]), feeds[1])
    dense = outputs(module, feeds[1])
    assert any((one - other).abs().max() > 1e-2 for one, other in zip(outputs(smaller, feeds[1]), dense, strict=True))
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in module.parameters())
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


class Attention(nn.Module):
    """Four heads; their number comes from a config that all layers share."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config = config
        self.fused, self.out = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.fused(x).view(batch, length, 3, self.config.heads, 6).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        return x + self.out(mixed.transpose(1, 2).reshape(batch, length, self.config.heads * 6))


class Stack(nn.Module):
    """Two layers, which may be the same."""

    def __init__(self, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layer(), layer()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return torch.tanh(x)


class Block(nn.Module):
    """A hidden layer whose width stands in the code: no attribute can change it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 24)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 40))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down((torch.relu(self.up(x)) * self.scale).view(*x.shape[:-1], 40))


REAL = [{"x": torch.randn(7, 13, 24, generator=torch.Generator().manual_seed(2))}, {"x": torch.randn(5, 17, 24)}]


def real_layout(module: nn.Module) -> Layout:
    return find(read_module(module, REAL[0], axes={"x": {0: "batch", 1: "length"}}), REAL)


def test_a_config_that_layers_share_is_copied_for_layers_with_other_numbers() -> None:
    config = SimpleNamespace(heads=4)
    module = scattered(Stack(lambda: Attention(config)))
    layout = real_layout(module)
    first, second = (group.name for group in layout.groups if group.kind == "heads")
    keep = {first: [0, 2, 3], second: [1]}
    found = cut_and_tell(module, layout, keep, REAL)
    assert isinstance(found.module, Stack)
    assert not found.why_graph
    assert [layer.config.heads for layer in found.module.layers] == [3, 1]
    assert found.attributes["layers.0", "config.heads"] == 3
    assert config.heads == 4
    close(found.module, by_onnxruntime(layout, keep, REAL[0]), REAL[0])


def test_what_no_class_holds_is_given_as_its_graph(caplog: pytest.LogCaptureFixture) -> None:
    module = scattered(Stack(Block))
    layout = real_layout(module)
    keep = some(layout, ("neurons",))
    with caplog.at_level(logging.WARNING):
        smaller = cut_module(module, layout, keep, REAL)
    assert isinstance(smaller, NetworkModule)
    assert "Block cannot hold what is kept of layers.0: neurons (RuntimeError: shape '[7, 13, 40]'" in caplog.text
    assert set(smaller.state_dict()) >= set(module.state_dict())
    kept = keep["layers.0: neurons"]
    assert torch.equal(smaller.state_dict()["layers.0.up.weight"], module.layers[0].up.weight[kept])
    assert {name for name, _ in smaller.named_parameters()} == {name for name, _ in module.named_parameters()}
    close(smaller, by_onnxruntime(layout, keep, REAL[0]), REAL[0])


def test_a_graph_is_a_module_like_others() -> None:
    module = scattered(Stack(Block))
    graph = NetworkModule(real_layout(module).structure.network)
    dense = module(**REAL[0])
    torch.testing.assert_close(graph(REAL[0]["x"])["output"], dense)
    graph(**REAL[0])["output"].sum().backward()
    dense.sum().backward()
    torch.testing.assert_close(graph.get_parameter("layers.0.up.weight").grad, module.layers[0].up.weight.grad)
    other = copy.deepcopy(graph).double()
    assert other(REAL[0]["x"].double())["output"].dtype is torch.float64
    with torch.no_grad():
        other.get_parameter("layers.0.up.weight").zero_()
    torch.testing.assert_close(graph(**REAL[0])["output"], dense)
    assert not torch.allclose(other(**REAL[0])["output"].float(), dense, atol=1e-3)
    with pytest.raises(BadInput, match="takes x; it was given y"):
        graph(y=REAL[0]["x"])


def test_a_hidden_layer_may_lose_all_its_neurons_and_layers_may_share_weights() -> None:
    layer = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 24))
    module = scattered(Stack(lambda: layer))
    layout = real_layout(module)
    (group,) = layout.groups
    smaller = cut_module(module, layout, {group.name: [3, 5]}, REAL)
    assert smaller.layers[0] is smaller.layers[1]
    assert len(list(smaller.parameters())) == 4
    assert (smaller.layers[0][0].out_features, smaller.layers[0][2].in_features) == (2, 2)
    assert smaller.layers[0][2].bias is module.layers[0][2].bias
    empty = cut_module(module, layout, {group.name: []}, REAL)
    torch.testing.assert_close(empty(**REAL[0])[0, 0], torch.tanh(layer[2].bias))


class BiasedAttention(nn.Module):
    """Four heads, to which a bias by distance is given."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.q, self.k, self.v, self.out = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (part(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = torch.softmax(q @ k.transpose(-1, -2) / 6**0.5 + bias, -1) @ v
        return torch.tanh(x + self.out(mixed.transpose(1, 2).flatten(2)))


class Biased(nn.Module):
    """Two layers with one table of biases."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.layers = nn.ModuleList([BiasedAttention(), BiasedAttention()])

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        bias = self.table((places - places[:, None]).clamp(-4, 4) + 4).permute(2, 0, 1)
        return self.layers[1](self.layers[0](x, bias), bias)


def test_a_table_that_layers_share_is_cut_where_all_of_them_keep_the_same_heads() -> None:
    module = scattered(Biased())
    layout = real_layout(module)
    names = [group.name for group in layout.groups if group.kind == "heads"]
    keep = {name: [0, 3] for name in names}
    smaller = cut_module(module, layout, keep, REAL)
    assert isinstance(smaller, Biased)
    assert torch.equal(smaller.table.weight, module.table.weight[:, [0, 3]])
    assert [layer.heads for layer in (*smaller.layers, *module.layers)] == [2, 2, 4, 4]
    assert smaller.table.embedding_dim == 2
    close(smaller, by_onnxruntime(layout, keep, REAL[0]), REAL[0])
    other = {**keep, names[0]: [1, 2]}
    graph = cut_module(module, layout, other, REAL)
    assert isinstance(graph, NetworkModule)
    close(graph, by_onnxruntime(layout, other, REAL[0]), REAL[0])


def test_a_layout_of_another_module_is_refused() -> None:
    layout = real_layout(scattered(Stack(Block)))
    with pytest.raises(BadInput, match="was not found in the graph of this Stack"):
        cut_module(scattered(Stack(Block), seed=1), layout, {}, REAL)
