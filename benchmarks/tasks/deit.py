"""CIFAR-10 for a ViT of DeiT-Tiny's size: it begins as a projection of the fine-tuned DINOv2 and learns from it.

Its hidden entries are the larger network's principal directions (as in SliceGPT, Ashkboos et al., ICLR 2024,
arXiv 2401.15024), its heads and neurons every second one (Xu et al., Initializing Models with Larger Ones, ICLR 2024,
arXiv 2311.18823). Its targets are the larger one's logits and, in those directions, its hidden states (TinyBERT,
Jiao et al., 2020, arXiv 1909.10351).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
from optin_deploy.files.storage import sha256_json

STEP = 2
"""The larger network is so many times as wide; one of so many heads and neurons is taken."""


@dataclass(frozen=True, kw_only=True)
class Distillation(Training):
    """How the network learns; part of its folder name."""

    train: tuple[str, ...] = TRAINING_SHEETS[:4]
    """Sheets that it learns from."""
    teacher: Recipe = field(default_factory=Recipe)
    """Recipe of the larger network."""
    blocks: tuple[int, ...] = (4, 8, 12)
    """The hidden states after these are targets."""
    looked: int = 512
    """Images whose hidden states give the principal directions."""
    epochs: int = 6
    learning_rate: float = 5e-4


def cifar10_deit(cache: Path) -> Task:
    """32 x 32 photographs of ten things: which? By 12 layers of 3 heads, 192 wide (DeiT-Tiny's size)."""
    recipe = Distillation()

    def make(progress: Progress) -> tuple[Any, Any]:
        teacher = cifar10(cache).model.requires_grad_(False)
        images = scaled(photographs(cache, recipe.train), recipe.teacher.image_size)
        onto = directions(teacher, images[: recipe.looked], recipe.seed)
        model = projected(teacher, onto)
        learn(model, teacher, onto, images, recipe, progress=progress)
        return model, processor_of(recipe.teacher.image_size)

    loaded = load_dense(str(kept(cache / f"cifar10-deit-{sha256_json(asdict(recipe))[:8]}", "cifar10-deit", make)))
    tokens = (recipe.teacher.image_size // 14) ** 2 + 2
    return Task("cifar10-deit", loaded.model, loaded.preprocessor, *unseen(cache, recipe.seed), tokens)


def directions(teacher: Any, images: Tensor, seed: int) -> Tensor:
    """The principal directions of its hidden states after all blocks, each block as important as another.

    They span a space of half its width; in a random basis of it, so that no entry stands out. Constant parts are left
    out, as layer normalisation takes no notice of them. Returns: (hidden, hidden / 2), orthonormal columns.
    """
    spread: Tensor | float = 0.0
    for state in _outputs(teacher, images, range(teacher.config.num_hidden_layers + 1))[0]:
        rows = (state - state.mean(-1, keepdim=True)).flatten(0, 1)
        spread += rows.T @ rows / rows.square().sum()
    principal: Tensor = torch.linalg.eigh(torch.as_tensor(spread))[1][:, -(teacher.config.hidden_size // STEP) :]
    drawn = torch.randn(principal.shape[1], principal.shape[1], generator=torch.Generator().manual_seed(seed))
    basis: Tensor = torch.linalg.qr(drawn)[0]
    return principal @ basis


def projected(teacher: Any, onto: Tensor) -> Any:
    """A DeiT that computes in these directions of a DINOv2, with every second head and neuron.

    Its distillation token is the class token. The layer normalisations' weights are put into the layers that read
    them, what DINOv2 multiplies a layer's output with into that layer. Args: onto: (hidden, narrower hidden).
    """
    from transformers import DeiTConfig, DeiTForImageClassification

    wide = teacher.config
    size = wide.hidden_size // wide.num_attention_heads
    heads = (torch.arange(0, wide.num_attention_heads, STEP)[:, None] * size + torch.arange(size)).flatten()
    neurons = torch.arange(0, wide.hidden_size * wide.mlp_ratio, STEP)
    config = DeiTConfig(
        hidden_size=onto.shape[1],
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
        _embeddings(model.deit.embeddings, teacher.dinov2.embeddings, onto)
        for mine, whole in zip(model.deit.layers, teacher.dinov2.encoder.layer, strict=True):
            for name in ("q_proj", "k_proj", "v_proj"):
                _reads(getattr(mine.attention, name), getattr(whole.attention, name), whole.norm1, onto, heads)
            _writes(mine.attention.o_proj, whole.attention.o_proj, whole.layer_scale1.lambda1, onto, heads)
            _reads(mine.mlp.fc1, whole.mlp.fc1, whole.norm2, onto, neurons)
            _writes(mine.mlp.fc2, whole.mlp.fc2, whole.layer_scale2.lambda1, onto, neurons)
        _reads(model.classifier, teacher.classifier, teacher.dinov2.layernorm, onto, torch.arange(len(CLASSES)))
    return model


def _embeddings(mine: Any, whole: Any, onto: Tensor) -> None:
    patches, wide = mine.patch_embeddings.projection, whole.patch_embeddings.projection
    patches.weight.copy_(torch.einsum("wn,w...->n...", onto, wide.weight))
    patches.bias.copy_(wide.bias @ onto)
    positions = whole.position_embeddings @ onto
    mine.position_embeddings.copy_(torch.cat((positions[:, :1], positions), 1))
    for token in (mine.cls_token, mine.distillation_token):
        token.copy_(whole.cls_token @ onto)


def _reads(mine: Any, whole: Any, norm: Any, onto: Tensor, rows: Tensor) -> None:
    """These rows of a layer that reads normalised entries; the classifier's further columns read other tokens."""
    weight = whole.weight[rows, : len(onto)]
    mine.weight.copy_((weight * norm.weight) @ onto / STEP**0.5)  # half the entries of the same length are larger
    mine.bias.copy_(whole.bias[rows] + weight @ norm.bias)


def _writes(mine: Any, whole: Any, strength: Tensor, onto: Tensor, columns: Tensor) -> None:
    """These columns of a layer that adds to the hidden entries."""
    mine.weight.copy_(onto.T @ (strength[:, None] * whole.weight)[:, columns])
    mine.bias.copy_((strength * whole.bias) @ onto)


def learn(
    model: Any, teacher: Any, onto: Tensor, images: Tensor, recipe: Distillation, *, progress: Progress = silent
) -> None:
    """Train all weights towards the teacher's logits and hidden states. Args: images: as bytes."""
    narrow = []
    logits = []
    for some in torch.split(images, 128):
        states, answers = _outputs(teacher, some, recipe.blocks)
        narrow.append((states @ onto).to(torch.bfloat16))
        logits.append(answers)
    targets = [*torch.cat(narrow, 1), torch.cat(logits)]
    parts = shuffled(range(len(images)), recipe, random.Random(recipe.seed))
    batches = ((images[part], [target[part].float() for target in targets]) for part in parts)

    def loss(model: Any, batch: tuple[Tensor, list[Tensor]]) -> Tensor:
        """Squared error of each target against its size, (); the distillation token has none."""
        found = _outputs(model, batch[0], recipe.blocks)
        ours = [*torch.cat((found[0][:, :, :1], found[0][:, :, 2:]), 2), found[1]]
        errors = zip(ours, batch[1], strict=True)
        return torch.stack([(mine - wanted).square().mean() / wanted.square().mean() for mine, wanted in errors]).sum()

    train(model, batches, len(parts), recipe, loss=loss, progress=progress)
    model.eval()


def _outputs(model: Any, images: Tensor, blocks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Hidden states after these blocks, (blocks, images, tokens, hidden), and logits, computed in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        found = model(pixel_values=coloured(images), output_hidden_states=True)
    return torch.stack([found.hidden_states[block] for block in blocks]).float(), found.logits.float()
