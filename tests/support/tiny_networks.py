"""Tiny torch modules of our own, as no library has them: attention with LayerScale, and convolutions in stages."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from optin_deploy.network.graph import Network
from optin_deploy.network.read_torch import read_module

HIDDEN, HEADS, HEAD, NEURONS, LAYERS, CLASSES = 24, 6, 4, 48, 2, 5
VOCABULARY = 97


class Attention(nn.Module):
    """Six heads of four."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.query, self.key, self.value = (nn.Linear(HIDDEN, HEADS * HEAD) for _ in range(3))
        self.out = nn.Linear(HEADS * HEAD, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part(x).view(x.shape[0], -1, self.heads, HEAD).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        mixed = (q @ k.transpose(-1, -2) / HEAD**0.5).softmax(-1) @ v  # (batch, heads, tokens, head)
        return self.out(mixed.transpose(1, 2).reshape(x.shape[0], -1, self.heads * HEAD))


class Feedforward(nn.Module):
    """Neurons behind a GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, NEURONS), nn.Linear(NEURONS, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class Layer(nn.Module):
    """Pre-norm; what attention adds is scaled by a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(), Feedforward()
        self.before, self.between = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.scale = nn.Parameter(torch.rand(HIDDEN) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale * self.attention(self.before(x))
        return x + self.mlp(self.between(x))


class Text(nn.Module):
    """Reads ids, gives logits."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.pooler, self.classifier = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(self.pooler(x[:, 0]).tanh())


class Step(nn.Module):
    """A residual step of two convolutions; what they add passes through a BatchNorm."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(width, inner, 3, padding=1), nn.Conv2d(inner, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.norm(self.second(self.first(x).relu()))).relu()


class Image(nn.Module):
    """Two stages of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stages = nn.ModuleList(
            (
                nn.Sequential(Step(8, 12), Step(8, 16)),
                nn.Sequential(nn.Conv2d(8, 10, 3, stride=2, padding=1), Step(10, 14)),
            )
        )
        self.head = nn.Linear(10, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.stem(pixels)
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))


def made(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    """A module with random weights, vectors and statistics included."""
    torch.manual_seed(seed)
    module = kind().eval()
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point() and tensor.dim() == 1:
                tensor.copy_(
                    torch.rand_like(tensor) + 0.5 if "var" in name or "norm" in name else 0.3 * torch.randn_like(tensor)
                )
    return module


def inputs(module: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if isinstance(module, Text):
        return {"ids": torch.randint(VOCABULARY, (2, 7), generator=generator)}
    return {"pixels": torch.randn((2, 3, 12, 12), generator=generator)}


def axes(module: nn.Module) -> dict[str, dict[int, str]]:
    return {"ids": {0: "batch", 1: "length"}} if isinstance(module, Text) else {"pixels": {0: "batch"}}


def read(module: nn.Module, *, dynamo: bool = False) -> Network:
    """The graph of a module by one exporter, weights under the names of their parameters."""
    return read_module(module, inputs(module), axes=axes(module), dynamo=dynamo)


def export(module: nn.Module, path: Path) -> Path:
    """An ONNX file as TorchScript's exporter writes it: folded, with made-up names of weights."""
    feeds: Mapping[str, Tensor] = inputs(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            tuple(feeds.values()),
            path,
            dynamo=False,
            opset_version=17,
            input_names=list(feeds),
            output_names=["logits"],
            dynamic_axes={**axes(module), "logits": {0: "batch"}},
        )
    return path
