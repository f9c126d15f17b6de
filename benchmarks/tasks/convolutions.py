"""CIFAR-10 for convolutional networks: a ResNet-18 that learns it from nothing, and an EfficientNet-Lite0 fine-tuned.

They learn from the first sheets of the training images; the fifth calibrates, the test batch judges.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.tasks.images import CLASSES, TRAINING_SHEETS, coloured, photographs, processor_of, scaled, unseen
from benchmarks.tasks.task import Task
from benchmarks.tasks.training import Training, train
from benchmarks.zoo.models import efficientnet_module
from optin_deploy.common.progress import Progress, silent
from optin_deploy.data.samples import Sample
from optin_deploy.files.storage import atomic_folder, sha256_json
from optin_deploy.reporting.terminal import stage_bar

WEIGHTS = "weights.safetensors"


@dataclass(frozen=True, kw_only=True)
class Recipe(Training):
    """How a network is trained; part of the trained network's folder name."""

    model: str
    image_size: int
    """Pixels that the 32 are scaled to."""
    train: tuple[str, ...] = TRAINING_SHEETS[:4]
    """Sheets that it learns from."""
    batch_size: int = 64
    shift: float = 1 / 8
    """Images are moved by chance by up to this part of their side, and mirrored."""
    momentum: float | None = None
    """Momentum of SGD with Nesterov's momentum; None means AdamW."""
    decay: float = 0.0
    """Weight decay of SGD; vectors have none."""


RECIPES: Mapping[str, Recipe] = {
    "resnet": Recipe(
        model="resnet",
        image_size=64,
        epochs=14,
        learning_rate=0.1,
        batch_size=128,
        momentum=0.9,
        decay=5e-4,
        warmup=0.2,
        clip=math.inf,
    ),
    "efficientnet": Recipe(
        model="efficientnet", image_size=96, epochs=1, learning_rate=5e-4, train=TRAINING_SHEETS[:2]
    ),
}


def cifar10_resnet(cache: Path) -> Task:
    """32 x 32 photographs of ten things: which? By a ResNet-18."""
    return _task("resnet", cache)


def cifar10_efficientnet(cache: Path) -> Task:
    """The same, by MobileNetV2's blocks: an EfficientNet-Lite0 with its weights of ImageNet to begin with."""
    return _task("efficientnet", cache)


def _task(name: str, cache: Path) -> Task:
    recipe = RECIPES[name]
    size = recipe.image_size
    model, processor = trained(recipe, cache), processor_of(size)
    inputs = {"pixel_values": torch.zeros(2, 3, size, size)}
    return Task(f"cifar10-{name}", model, processor, *unseen(cache, recipe.seed), 1, inputs)


def trained(recipe: Recipe, cache: Path) -> nn.Module:
    """The network in evaluation mode; trained unless `cache` has its weights."""
    from safetensors.torch import load_file, save_file

    folder = cache / f"cifar10-{recipe.model}-{sha256_json(asdict(recipe))[:8]}"
    torch.manual_seed(recipe.seed)
    model = MODELS[recipe.model]()
    if not folder.exists():
        with stage_bar(f"train {recipe.model}") as progress:
            learn(model, photographs(cache, recipe.train), recipe, progress=progress)
        with atomic_folder(folder) as temporary:
            save_file({name: value.contiguous() for name, value in model.state_dict().items()}, temporary / WEIGHTS)
    model.load_state_dict(load_file(folder / WEIGHTS))
    return model.eval()


def resnet() -> nn.Module:
    """ResNet-18 of transformers."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic",
        id2label=dict(enumerate(CLASSES)),
    )  # fmt: skip
    return ResNetForImageClassification(config)


class Classifier(nn.Module):
    """A network that puts out logits alone, called as those of transformers are."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Logits of images, (rows, classes)."""
        return {"logits": self.network(pixel_values)}


def efficientnet() -> nn.Module:
    """EfficientNet-Lite0 with a new last layer."""
    network: Any = efficientnet_module()
    network._fc = nn.Linear(network._fc.in_features, len(CLASSES))
    return Classifier(network)


MODELS: Mapping[str, Callable[[], nn.Module]] = {"resnet": resnet, "efficientnet": efficientnet}


def learn(model: nn.Module, samples: Sequence[Sample], recipe: Recipe, *, progress: Progress = silent) -> None:
    """Train all weights, in bfloat16 where that is safe; images are moved and mirrored by chance."""
    draw = random.Random(recipe.seed)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images, labels = scaled(samples, recipe.image_size), torch.tensor([sample.label for sample in samples])
    steps = len(samples) // recipe.batch_size
    span = round(recipe.shift * recipe.image_size)

    def drawn() -> Iterator[tuple[Mapping[str, Tensor], Tensor]]:
        for _ in range(recipe.epochs):
            order = draw.sample(range(len(samples)), len(samples))
            for step in range(steps):
                part = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
                moved = torch.stack([_moved(images[index], span, draw) for index in part])
                yield {"pixel_values": coloured(moved)}, labels[part]

    optimizer = None if recipe.momentum is None else _sgd(model, recipe, recipe.momentum)
    train(model, drawn(), recipe.epochs * steps, recipe, loss=_loss, optimizer=optimizer, progress=progress)


def _sgd(model: nn.Module, recipe: Recipe, momentum: float) -> torch.optim.Optimizer:
    weights = [value for value in model.parameters() if value.dim() > 1]
    vectors = [value for value in model.parameters() if value.dim() <= 1]
    groups = [{"params": weights, "weight_decay": recipe.decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=momentum, nesterov=True)


def _loss(model: nn.Module, batch: tuple[Mapping[str, Tensor], Tensor]) -> Tensor:
    inputs, labels = batch
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(pixel_values=inputs["pixel_values"].to(memory_format=torch.channels_last))["logits"]
    return nn.functional.cross_entropy(logits.float(), labels)


def _moved(image: Tensor, span: int, draw: random.Random) -> Tensor:
    """Moved by up to `span` pixels each way, what it shows at its edges repeated; mirrored or not."""
    size = image.shape[-1]
    down, right = draw.randint(0, 2 * span), draw.randint(0, 2 * span)
    padded = nn.functional.pad(image[None].float(), [span] * 4, mode="reflect")[0]
    part = padded[:, down : down + size, right : right + size]
    return part.flip(-1) if draw.random() < 0.5 else part
