"""Sizes of images that transformers models are exported for: their processor's, those asked for, or any."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers

import optin_deploy
from optin_deploy.errors import BadInput
from optin_deploy.jobs.checked import checked_job
from optin_deploy.jobs.job import Job
from optin_deploy.network.read import read
from optin_deploy.network.run import Program
from optin_deploy.planning.budget import Limits
from optin_deploy.pruning.dense import DenseSource, dense_of
from optin_deploy.pruning.served_images import check_any_size, serve_images
from optin_deploy.pruning.source import Source
from support.tiny_checkpoint import bert, photos, run, vit

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}


def saved(folder: Path, family: str, channels: int = 3, **settings: Any) -> str:
    """A random classifier with a processor for squares of 32 pixels."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(num_labels=4, num_channels=channels, **settings)
    getattr(transformers, f"{family}ForImageClassification")(config).save_pretrained(folder)
    grey = {"image_mean": [0.5], "image_std": [0.5]} if channels == 1 else {}
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}, **grey).save_pretrained(folder)
    return str(folder)


def shape_of(dense: DenseSource) -> tuple[int | str, ...] | None:
    return dense.network.inputs[0].shape


def by_transformers(folder: str, images: torch.Tensor, **how: Any) -> torch.Tensor:
    model = transformers.AutoModelForImageClassification.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        found: torch.Tensor = model.eval()(pixel_values=images, **how).logits
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "channels", "settings", "how"),
    [
        ("ViT", 1, {**SIZES, "intermediate_size": 40}, {"interpolate_pos_encoding": True}),
        ("Dinov2", 3, {**SIZES, "mlp_ratio": 2}, {}),
        ("ResNet", 3, {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}, {}),
    ],
)
def test_height_and_width_stay_free(
    tmp_path: Path, family: str, channels: int, settings: dict[str, Any], how: dict[str, Any]
) -> None:
    folder = saved(tmp_path / "model", family, channels, **settings)
    dense = dense_of(Source(folder, any_size=True))
    assert shape_of(dense) == ("batch", channels, "height", "width")
    for height, width in ((32, 32), (40, 72), (96, 24)):
        images = torch.randn(3, channels, height, width)
        found = Program(dense.network)({"pixel_values": images}).outputs["logits"]
        torch.testing.assert_close(found, by_transformers(folder, images, **how), atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("by_torchscript")
def test_one_size_that_was_asked_for() -> None:
    dense = dense_of(Source(str(vit()), image_size=(48, 24)))
    assert shape_of(dense) == ("batch", 3, 48, 24)
    images = torch.randn(2, 3, 48, 24)
    found = Program(dense.network)({"pixel_values": images}).outputs["logits"]
    torch.testing.assert_close(found, by_transformers(str(vit()), images, interpolate_pos_encoding=True))
    assert dense.processor(images=[np.zeros((9, 9, 3), np.uint8)], return_tensors="pt")["pixel_values"].shape == (
        *(1, 3, 48, 24),
    )


@pytest.mark.parametrize(
    ("size", "says"),
    [
        ((99999, 32), "1 to 4096 pixels"),
        ((4096, 2048), r"take [\d,.]+ GiB or more inside"),
        ((4, 4), "does not take two samples"),
    ],
)
def test_sizes_that_cannot_be_are_refused(size: tuple[int, int], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        dense_of(Source(str(vit()), image_size=size))


@pytest.mark.parametrize(
    ("kind", "settings", "size", "made"),
    [
        ("BitImageProcessor", {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}, (48, 64), 72),
        ("CLIPImageProcessor", {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}, (48, 48), 48),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 448}}, (480, 480), 480),
        ("ViTImageProcessor", {"size": {"height": 32, "width": 32}}, (24, 40), None),
    ],
)
def test_processors_keep_the_way_they_prepare(
    kind: str, settings: dict[str, Any], size: tuple[int, int], made: int | None
) -> None:
    processor = getattr(transformers, kind)(**settings)
    before = dict(processor.size)
    model = SimpleNamespace(config=SimpleNamespace(image_size=32))
    loaded: Any = SimpleNamespace(model=model, preprocessor=processor)
    own = processor(images=[np.zeros((40, 60, 3), np.uint8)], return_tensors="pt")["pixel_values"].shape[2:]
    serve_images(loaded, (int(own[0]), int(own[1])), any_size=False)
    assert dict(processor.size) == before
    serve_images(loaded, size, any_size=False)
    assert processor.size.get("shortest_edge") == made
    for shape in ((90, 40, 3), (40, 90, 3)):
        images = processor(images=[np.zeros(shape, np.uint8)], return_tensors="pt")["pixel_values"]
        assert tuple(images.shape[2:]) == size
    assert model.config.inference_image_size == list(size)


def test_a_processor_that_cannot_be_set_is_refused() -> None:
    """It makes patches, of as many as there are."""

    class Stubborn:
        def __init__(self) -> None:
            self.size = {"height": 8, "width": 8}

        def __call__(self, images: Any, return_tensors: str) -> dict[str, torch.Tensor]:
            return {"pixel_values": torch.zeros(len(images), 3, 8, 8)}

    loaded: Any = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace()), preprocessor=Stubborn())
    with pytest.raises(BadInput, match=r"Stubborn cannot be set to it \(8 x 8 pixels all the same\)"):
        serve_images(loaded, (16, 16), any_size=False)


def test_sizes_of_an_inner_config_count() -> None:
    config = SimpleNamespace(backbone_config=SimpleNamespace(image_size=64))
    processor = transformers.ViTImageProcessor(size={"height": 224, "width": 224})
    loaded: Any = SimpleNamespace(model=SimpleNamespace(config=config), preprocessor=processor)
    serve_images(loaded, None, any_size=False)
    assert config.inference_image_size == [224, 224]  # type: ignore[attr-defined]  # it is noted there


@pytest.mark.slow
@pytest.mark.usefixtures("by_torchscript")
def test_sizes_are_part_of_the_key() -> None:
    sources = [Source(str(vit())), Source(str(vit()), any_size=True), Source(str(vit()), image_size=(48, 24))]
    assert len({dense_of(source).key for source in sources}) == 3


@pytest.mark.slow
def test_a_graph_that_holds_for_one_size_is_refused(tmp_path: Path) -> None:
    """BEiT's table of relative places is made for one size while it is traced."""
    sizes = {**SIZES, "intermediate_size": 40, "use_relative_position_bias": True}
    with pytest.raises(BadInput, match=r"--any-size: the graph of BeitFor.* holds for 32 x 64 pixels"):
        dense_of(Source(saved(tmp_path / "model", "Beit", **sizes), any_size=True))


@pytest.mark.usefixtures("by_torchscript")
@pytest.mark.parametrize("family", ["MobileNetV2", "Swin"])
def test_models_that_fill_up_odd_sizes_are_refused(tmp_path: Path, family: str) -> None:
    """What they add to an image is a number in the graph."""
    swin = {"patch_size": 4, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4}
    settings = swin if family == "Swin" else {"depth_multiplier": 0.35, "finegrained_output": False}
    folder = saved(tmp_path / "model", family, image_size=32, **settings)
    with pytest.raises(BadInput, match="not for images of 41 x 51"):
        dense_of(Source(folder, any_size=True))


@pytest.mark.slow
def test_a_graph_that_computes_something_else_is_refused() -> None:
    source = Source(str(vit()), any_size=True)
    dense = dense_of(source)
    other = dense_of(source).model
    check_any_size(dense.model, dense.network)
    with torch.no_grad():
        other.vit.embeddings.position_embeddings[0, 7, :9] += 1
    with pytest.raises(BadInput, match="--any-size"):
        check_any_size(dense.model, read(other))


def test_where_sizes_are_not_asked_for(tmp_path: Path) -> None:
    for how in ({"any_size": True}, {"image_size": (32, 32)}):
        with pytest.raises(BadInput, match="takes no images"):
            dense_of(Source(str(bert()), **how))
    path = tmp_path / "model.onnx"
    path.write_bytes(b"")
    with pytest.raises(BadInput, match=r"--any-size is for transformers models"):
        dense_of(Source(str(path), any_size=True))


def test_engines_with_profiles_refuse_free_heights_and_widths() -> None:
    source = Source(str(vit()), calibration=str(photos()), samples=8, any_size=True)
    with pytest.raises(BadInput, match=r"engine trt-rtx: its profiles name one free size .* with --image-size"):
        checked_job(Job(source, Limits(flops=0.9), engine="trt-rtx"))


@pytest.mark.slow
@pytest.mark.usefixtures("by_torchscript")
def test_engines_that_run_modules_scale_positions_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--calibration", photos(), "--samples", 8, "--flops", 0.7, "--image-size", "48x32", "--engine", "torch"]
    assert run("optin-export", vit(), *options, "--threads", 1, "--out", tmp_path / "x", monkeypatch=monkeypatch) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("by_torchscript")
def test_a_whole_job_leaves_sizes_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    options = ["--calibration", photos(), "--samples", 8, "--flops", 0.7, "--any-size", "--image-size", "48x32"]
    assert run("optin-export", vit(), *options, "--threads", 1, "--out", out, monkeypatch=monkeypatch) == 0
    assert (out / "model" / "config.json").is_file()
    assert json.loads((out / "preprocessor_config.json").read_text())["size"] == {"height": 48, "width": 32}
    loaded = optin_deploy.load(out)
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    for height, width in ((48, 32), (64, 88)):
        images = torch.randn(2, 3, height, width)
        with torch.no_grad():
            wanted = loaded(pixel_values=images).logits.numpy()
        found = session.run(["logits"], {"pixel_values": images.numpy()})[0]
        np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert run("optin", "build", out, "--engine", "trt-rtx", "--dry-run", monkeypatch=monkeypatch) == 2
