"""CIFAR-10 for a ViT of DeiT-Tiny's size: it begins with a part of the fine-tuned DINOv2's weights and learns from it.

Weights of every second hidden entry, head and neuron (Xu et al., Initializing Models with Larger Ones, ICLR 2024,
arXiv 2311.18823); then the logits of the larger one are its targets (Ba and Caruana, 2014, arXiv 1312.6184).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.tasks.images import (
    CLASSES,
    TRAINING_SHEETS,
    Recipe,
    cifar10,
    coloured,
    photographs,
    processor_of,
    scaled,
    unseen,
)
from benchmarks.tasks.task import Task
from benchmarks.tasks.training import Training, kept, shuffled, train
from optin_deploy.checkpoint.loading import load_dense
from optin_deploy.common.progress import Progress, silent
from optin_deploy.data.samples import Sample
from optin_deploy.files.storage import sha256_json

STEP = 2
"""One of so many hidden entries, heads and neurons of the larger network is taken."""


@dataclass(frozen=True, kw_only=True)
class Distillation(Training):
    """How the network learns; part of its folder name."""

    train: tuple[str, ...] = TRAINING_SHEETS[:4]
    """Sheets that it learns from."""
    teacher: Recipe = field(default_factory=Recipe)
    """Recipe of the larger network."""
    epochs: int = 4
    learning_rate: float = 1e-3
    batch_size: int = 64


def cifar10_deit(cache: Path) -> Task:
    """32 x 32 photographs of ten things: which? By 12 layers of 3 heads, 192 wide (DeiT-Tiny's size)."""
    recipe = Distillation()

    def make(progress: Progress) -> tuple[Any, Any]:
        teacher = cifar10(cache).model
        model = part_of(teacher)
        learn(model, teacher, photographs(cache, recipe.train), recipe, progress=progress)
        return model, processor_of(recipe.teacher.image_size)

    loaded = load_dense(str(kept(cache / f"cifar10-deit-{sha256_json(asdict(recipe))[:8]}", "cifar10-deit", make)))
    tokens = (recipe.teacher.image_size // 14) ** 2 + 2
    return Task("cifar10-deit", loaded.model, loaded.preprocessor, *unseen(cache, recipe.seed), tokens)


def part_of(teacher: Any) -> Any:
    """A DeiT with every second hidden entry, head and neuron of a DINOv2; its distillation token is the class token.

    What DINOv2 multiplies a layer's output with is put into that layer's weights.
    """
    from transformers import DeiTConfig, DeiTForImageClassification

    wide = teacher.config
    size = wide.hidden_size // wide.num_attention_heads
    entries = torch.arange(0, wide.hidden_size, STEP)
    heads = (torch.arange(0, wide.num_attention_heads, STEP)[:, None] * size + torch.arange(size)).flatten()
    neurons = torch.arange(0, wide.hidden_size * wide.mlp_ratio, STEP)
    config = DeiTConfig(
        hidden_size=len(entries),
        num_attention_heads=len(heads) // size,
        num_hidden_layers=wide.num_hidden_layers,
        intermediate_size=len(neurons),
        image_size=wide.image_size,
        patch_size=wide.patch_size,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=wide.layer_norm_eps,
        id2label=dict(enumerate(CLASSES)),
    )
    model: Any = DeiTForImageClassification(config)
    with torch.no_grad():
        _embeddings(model.deit.embeddings, teacher.dinov2.embeddings, entries)
        for mine, whole in zip(model.deit.layers, teacher.dinov2.encoder.layer, strict=True):
            _taken(mine.layernorm_before, whole.norm1, entries)
            _taken(mine.layernorm_after, whole.norm2, entries)
            for name in ("q_proj", "k_proj", "v_proj"):
                _taken(getattr(mine.attention, name), getattr(whole.attention, name), heads, entries)
            _taken(mine.attention.o_proj, whole.attention.o_proj, entries, heads, whole.layer_scale1.lambda1)
            _taken(mine.mlp.fc1, whole.mlp.fc1, neurons, entries)
            _taken(mine.mlp.fc2, whole.mlp.fc2, entries, neurons, whole.layer_scale2.lambda1)
        _taken(model.deit.layernorm, teacher.dinov2.layernorm, entries)
        _taken(model.classifier, teacher.classifier, torch.arange(len(CLASSES)), entries)  # of the class token
    return model


def _embeddings(mine: Any, whole: Any, entries: Tensor) -> None:
    projection = mine.patch_embeddings.projection
    _taken(projection, whole.patch_embeddings.projection, entries)
    positions = whole.position_embeddings[..., entries]
    mine.position_embeddings.copy_(torch.cat((positions[:, :1], positions), 1))
    for token in (mine.cls_token, mine.distillation_token):
        token.copy_(whole.cls_token[..., entries])


def _taken(mine: Any, whole: Any, rows: Tensor, columns: Tensor | None = None, strength: Tensor | None = None) -> None:
    """Copy these rows and columns of a weight, and the rows of its bias, multiplied by `strength`."""
    for name, value in whole.named_parameters():
        value = value[rows] if strength is None else torch.einsum("r...,r->r...", value, strength)[rows]
        getattr(mine, name).copy_(value if columns is None or value.dim() == 1 else value[:, columns])


def learn(
    model: Any, teacher: nn.Module, samples: Sequence[Sample], recipe: Distillation, *, progress: Progress = silent
) -> None:
    """Train all weights towards the teacher's logits; images are mirrored by chance."""
    images = scaled(samples, recipe.teacher.image_size)
    with torch.no_grad():
        batches = torch.split(images, recipe.batch_size)
        logits = torch.cat([teacher(pixel_values=coloured(batch))["logits"] for batch in batches])
    draw = random.Random(recipe.seed)
    parts = shuffled(range(len(samples)), recipe, draw)

    def drawn() -> Iterator[tuple[Tensor, Tensor]]:
        for part in parts:
            pixels = coloured(images[part])
            yield pixels.flip(-1) if draw.random() < 0.5 else pixels, logits[part]

    train(model, drawn(), len(parts), recipe, loss=_loss, progress=progress)
    model.eval()


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    pixels, wanted = batch
    return nn.functional.mse_loss(model(pixel_values=pixels).logits, wanted)
