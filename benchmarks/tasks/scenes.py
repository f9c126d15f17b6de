"""Segmentation: shapes cut out of photographs, before others out of focus; and small models that learn their places.

All show pieces of CIFAR-10's photographs, as the ground does. Shapes are tinted, and two share a tint: these two are
told apart by their outlines alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.tasks.images import photographs
from benchmarks.tasks.training import Training, kept, shuffled, train
from optin_deploy.common.progress import Progress, silent
from optin_deploy.files.storage import atomic_folder, sha256_json

SIDE = 128
SHAPES: Mapping[str, str] = {
    "disc": "crimson", "ring": "crimson", "square": "seagreen", "cross": "seagreen",
    "triangle": "royalblue", "star": "royalblue",
}  # fmt: skip
"""Colours by outline."""
TINT = 0.5
"""How much of its colour a shape has; the rest is the photograph's."""
NAMES = ("ground", *SHAPES)
"""Classes, in the order of their numbers."""
IGNORED = 255
SPAN = (40, 84)
"""Pixels across a shape."""
BLUR = 5
"""Pixels over which the ground is blurred."""
DRAWN = (dict(SHAPES), SIDE, SPAN, BLUR, TINT)
"""What scenes look like; part of the names of folders."""
PARTS: Mapping[str, int] = {"training": 512, "validation": 256}
"""Scenes for calibration and for judging; models learn from others."""
SHEETS: Mapping[str, str] = {"learning": "data_batch_1", "training": "data_batch_5", "validation": "test_batch"}
"""Whose photographs a part shows."""


@dataclass(frozen=True, kw_only=True)
class Recipe(Training):
    """How a model is trained; part of the trained model's folder name."""

    model: str
    scenes: int = 4000
    """Drawn once, seen in every epoch."""
    epochs: int = 12
    learning_rate: float = 1e-3
    batch_size: int = 16


RECIPES: Mapping[str, Recipe] = {
    "segformer": Recipe(model="segformer"),
    "mask2former": Recipe(model="mask2former", learning_rate=4e-4, epochs=14, batch_size=8),
}


def scenes(part: str, count: int, cache: Path) -> Iterator[tuple[Any, np.ndarray]]:
    """Pictures, each with the class of every pixel, (SIDE, SIDE); seeded by the name of the part."""
    from PIL import Image, ImageFilter, ImageOps

    draw = random.Random(part)
    photos: list[Any] = [sample.image for sample in photographs(cache, [SHEETS[part]])]
    for _ in range(count):
        ground = draw.choice(photos).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        scene = ground.filter(ImageFilter.GaussianBlur(BLUR))
        classes = np.zeros((SIDE, SIDE), np.uint8)
        for _ in range(draw.randint(2, 4)):
            span, number = draw.randint(*SPAN), draw.randint(1, len(SHAPES))
            shape = NAMES[number]
            inside = outline(shape, span, draw.uniform(0, 2 * np.pi))
            left, top = (draw.randint(0, SIDE - span) for _ in range(2))
            piece = draw.choice(photos).resize((span, span), Image.Resampling.BICUBIC)
            piece = Image.blend(piece, ImageOps.colorize(piece.convert("L"), "black", "white", SHAPES[shape]), TINT)
            scene.paste(piece, (left, top), Image.fromarray(np.uint8(255 * inside)))
            classes[top : top + span, left : left + span][inside] = number
        yield scene, classes


def outline(shape: str, span: int, turn: float) -> np.ndarray:
    """Whether each pixel of a square lies inside of a shape, (span, span)."""
    y, x = (np.mgrid[:span, :span] + 0.5) / span * 2 - 1
    x, y = x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)
    far, angle = np.hypot(x, y), np.arctan2(y, x)
    inside = {
        "disc": far < 0.9,
        "square": np.maximum(abs(x), abs(y)) < 0.65,
        "triangle": (y > -0.45) & (y < 0.9 - 1.7 * abs(x)),
        "cross": (np.minimum(abs(x), abs(y)) < 0.25) & (np.maximum(abs(x), abs(y)) < 0.85),
        "ring": (far < 0.95) & (far > 0.55),
        "star": far < 0.6 + 0.33 * np.cos(5 * angle),
    }
    return np.asarray(inside[shape])


def scenes_folder(cache: Path) -> Path:
    """Scenes laid out as ADE20K: images/ and annotations/, each with training/ and validation/."""
    folder = cache / f"scenes-{sha256_json([*DRAWN, dict(PARTS)])[:8]}"
    if not folder.exists():
        with atomic_folder(folder) as temporary:
            for part, count in PARTS.items():
                for number, (scene, classes) in enumerate(scenes(part, count, cache)):
                    _saved(scene, temporary / "images" / part / f"{number:04}.png")
                    _saved(_image(classes), temporary / "annotations" / part / f"{number:04}.png")
    return folder


def trained(name: str, cache: Path) -> Path:
    """The folder of a model that knows the shapes; trained unless `cache` has it."""
    recipe = RECIPES[name]

    def make(progress: Progress) -> tuple[Any, Any]:
        torch.manual_seed(recipe.seed)
        model, processor = MODELS[recipe.model]()
        _learn(model, processor, list(scenes("learning", recipe.scenes, cache)), recipe, progress)
        return model, processor

    return kept(cache / f"scenes-{recipe.model}-{sha256_json([asdict(recipe), *DRAWN])[:8]}", name, make)


def segformer() -> tuple[Any, Any]:
    """SegFormer of half B0's width."""
    hf: Any = import_module("transformers")
    config = hf.SegformerConfig(
        hidden_sizes=[32, 48, 80, 128], depths=[2, 2, 2, 2], num_attention_heads=[1, 2, 5, 8], decoder_hidden_size=96,
        id2label=dict(enumerate(NAMES)), hidden_dropout_prob=0.0, classifier_dropout_prob=0.0,
    )  # fmt: skip
    size = {"height": SIDE, "width": SIDE}
    return hf.SegformerForSemanticSegmentation(config), hf.SegformerImageProcessor(size=size)


def mask2former() -> tuple[Any, Any]:
    """Mask2Former with a Swin backbone of a third of Swin-T's width."""
    hf: Any = import_module("transformers")
    backbone = hf.SwinConfig(
        image_size=SIDE, patch_size=4, embed_dim=32, depths=[2, 2, 2, 2], num_heads=[2, 4, 8, 16], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"], drop_path_rate=0.0,
    )  # fmt: skip
    config = hf.Mask2FormerConfig(
        backbone_config=backbone, feature_size=64, mask_feature_size=64, hidden_dim=64, encoder_feedforward_dim=256,
        encoder_layers=2, decoder_layers=4, num_attention_heads=4, dim_feedforward=256, num_queries=20, dropout=0.0,
        id2label=dict(enumerate(NAMES)), train_num_points=1024,
    )  # fmt: skip
    size = {"height": SIDE, "width": SIDE}
    return hf.Mask2FormerForUniversalSegmentation(config), hf.Mask2FormerImageProcessor(size=size)


MODELS: Mapping[str, Callable[[], tuple[Any, Any]]] = {"segformer": segformer, "mask2former": mask2former}


class _Losses(nn.Module):
    """A model that is called with pictures and the classes of their pixels, as `training.train` calls it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, classes: Tensor) -> Tensor:
        if hasattr(self.model.config, "num_queries"):
            found = [torch.unique(each) for each in classes]
            masks = [
                torch.stack([each == number for number in some]).float()
                for each, some in zip(classes, found, strict=True)
            ]
            loss: Tensor = self.model(pixel_values=pixel_values, mask_labels=masks, class_labels=found).loss
            return loss
        loss = self.model(pixel_values=pixel_values, labels=classes).loss
        return loss


def _learn(
    model: Any, processor: Any, some: Sequence[tuple[Any, np.ndarray]], recipe: Recipe, progress: Progress = silent
) -> None:
    """Scenes are mirrored by chance."""
    draw = random.Random(recipe.seed)
    images: Tensor = processor(images=[scene for scene, _ in some], return_tensors="pt")["pixel_values"]
    classes = torch.from_numpy(np.stack([each for _, each in some])).long()
    parts = shuffled(range(len(some)), recipe, draw)

    def drawn() -> Iterator[dict[str, Tensor]]:
        for part in parts:
            flips = [axis for axis in (-1, -2) if draw.random() < 0.5]
            yield {"pixel_values": images[part].flip(flips), "classes": classes[part].flip(flips)}

    train(_Losses(model), drawn(), len(parts), recipe, loss=lambda losses, batch: losses(**batch), progress=progress)
    model.eval()


def _image(classes: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(classes, "L")


def _saved(image: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
