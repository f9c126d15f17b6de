"""Tiny models and data for the tests of scoring: every parameter random, seconds each."""

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

from optin_deploy.network.read_torch import read_module
from optin_deploy.pruning.networks import find_in
from optin_deploy.scoring.subject import Subject

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


def subject_of(model: Any) -> Subject:
    """The graph of one of these models, with what can be cut in it."""
    text = model.main_input_name == "input_ids"
    example = text_batch((7, 7)) if text else image_batch(2)
    axes = {name: {0: "batch", 1: "length"} if text else {0: "batch"} for name in example}
    return Subject.make(find_in(read_module(model, example, axes=axes, dynamo=False)).layout)


def state_of(model: nn.Module) -> list[object]:
    """Everything that scoring and compensation must leave as it was: hooks, flags, instance attributes, weights."""
    modules = [
        (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in model.modules()
    ]
    weights = [(p.requires_grad, p.grad is None, p.detach().clone().numpy().tobytes()) for p in model.parameters()]
    return [modules, weights]


def one_thread() -> Iterator[None]:
    """For an automatic fixture: threads only cost on tiny models (20 times, on a busy machine)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
