"""Tiny models and data for the tests of scoring, search and compensation: every parameter random, seconds each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
)

from optin_deploy.layout import Branch, LayerSpec, ModelLayout

LAYERS, HIDDEN, HEADS, NEURONS, VOCABULARY = 2, 12, 3, 6, 40
SIZES: dict[str, Any] = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
Batch = dict[str, Tensor]
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Family:
    """Where a family keeps its prunable projections, written down by hand: the tests do not ask the product."""

    blocks: str
    attention: str
    ffn: str

    def columns(self, layer: int, kind: str, unit: int, heads: int = HEADS) -> tuple[str, list[int]]:
        """Path of the output projection, and the columns of one unit."""
        if kind == "neurons":
            return f"{self.blocks}.{layer}.{self.ffn}", [unit]
        width = HIDDEN // heads
        return f"{self.blocks}.{layer}.{self.attention}", list(range(unit * width, (unit + 1) * width))


BERT = Family("bert.encoder.layer", "attention.output.dense", "output.dense")
BARE_BERT = Family("encoder.layer", "attention.output.dense", "output.dense")
VIT = Family("vit.layers", "attention.o_proj", "mlp.fc2")
DINOV2 = Family("encoder.layer", "attention.o_proj", "mlp.fc2")
SWIGLU = Family("encoder.layer", "attention.o_proj", "mlp.down_proj")


def bert(*, labels: int = 3, seed: int = 0, layers: int = LAYERS, **config: Any) -> BertForSequenceClassification:
    """A post-LN text classifier in float64."""
    return shaken(BertForSequenceClassification(_bert_config(layers=layers, num_labels=labels, **config)), seed)


def bare_bert(*, seed: int = 0) -> BertModel:
    """A text encoder without logits, in float64."""
    return shaken(BertModel(_bert_config(), add_pooling_layer=False), seed)


def masked_lm(*, seed: int = 0, words: int = VOCABULARY) -> BertForMaskedLM:
    """A language model, one distribution a token, in float64."""
    return shaken(BertForMaskedLM(_bert_config(vocab_size=words)), seed)


def vit(*, labels: int = 3, seed: int = 0) -> ViTForImageClassification:
    """A pre-LN image classifier in float64: 5 tokens."""
    config = ViTConfig(**SIZES, intermediate_size=NEURONS, image_size=8, patch_size=4, num_labels=labels)
    return shaken(ViTForImageClassification(config), seed)


def dinov2(
    *,
    seed: int = 0,
    size: int = 8,
    widening: int = 1,
    scales: tuple[float, float] = (0.2, 2.2),
    gated: bool = False,
) -> Dinov2Model:
    """A pre-LN image encoder with LayerScale in that range, in float64: 12 neurons (gated: 8), 5 tokens unless told."""
    config = Dinov2Config(**SIZES, mlp_ratio=widening, image_size=size, patch_size=4, use_swiglu_ffn=gated)
    model = shaken(Dinov2Model(config), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        if "lambda1" in name:
            share = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = scales[0] + (scales[1] - scales[0]) * share
    return model


def _bert_config(*, layers: int = LAYERS, **config: Any) -> BertConfig:
    sizes = {**SIZES, "num_hidden_layers": layers, "intermediate_size": NEURONS, "vocab_size": VOCABULARY, **config}
    return BertConfig(**sizes, max_position_embeddings=24, pad_token_id=0)


def shaken(model: Model, seed: int) -> Model:
    """Random weights of a size that makes every unit matter, biases and norms too; evaluation mode, float64."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = 0.35 * noise if parameter.dim() > 1 else parameter.data.double() + 0.2 * noise
    return model.double().eval()


def text_batch(lengths: tuple[int, ...], *, padding: int = 0, seed: int = 0) -> Batch:
    """Random sentences of these lengths, padded at the end to the longest (and by `padding` more)."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths) + padding
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(5, VOCABULARY, (length,), generator=generator)
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask}


def image_batch(samples: int, *, seed: int = 0, size: int = 8) -> Batch:
    """Random images, float64."""
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(samples, 3, size, size, generator=generator, dtype=torch.float64)}


def rows(batch: Batch, chosen: list[int]) -> Batch:
    """Some samples of a batch."""
    return {name: value[chosen] for name, value in batch.items()}


def padded(batch: Batch, more: int) -> Batch:
    """The same text with more padding."""
    return {name: nn.functional.pad(value, (0, more)) for name, value in batch.items()}


def state_of(model: nn.Module) -> list[object]:
    """Everything that scoring and compensation must leave as it was: hooks, flags, instance attributes, weights."""
    modules = [
        (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in model.modules()
    ]
    weights = [(p.requires_grad, p.grad is None, p.detach().clone().numpy().tobytes()) for p in model.parameters()]
    return [modules, weights]


def toy_layout(heads: tuple[int, ...], neurons: tuple[int, ...], name: str = "toy") -> ModelLayout:
    """A layout without a model; layers may differ."""
    layers = tuple(
        LayerSpec(
            path=f"layer.{i}",
            hidden=4,
            core=f"layer.{i}.core",
            attention=Branch((f"layer.{i}.q",), f"layer.{i}.o", f"layer.{i}", None, h, 2),
            ffn=Branch((f"layer.{i}.up",), f"layer.{i}.down", f"layer.{i}.norm", None, n, 1),
        )
        for i, (h, n) in enumerate(zip(heads, neurons, strict=True))
    )
    return ModelLayout(arch=name, model_class="Toy", layers=layers)


def one_thread() -> Iterator[None]:
    """For an automatic fixture: threads only cost on tiny models (20 times, on a busy machine)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
