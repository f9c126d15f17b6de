"""Images become what a network takes: channels first or last, of its size and type, scaled as is said, not guessed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from onnx import TensorProto
from PIL import Image

from optin_deploy.errors import BadInput
from optin_deploy.feeds.feeds import Drawing, Preparation, read_feeds
from optin_deploy.feeds.image_feeds import Pixels
from optin_deploy.feeds.rows import Feeds, rows_of
from optin_deploy.network.graph import Network
from support import tiny_checkpoint as tiny
from support import tiny_ports
from support.tiny_graphs import value
from support.tiny_ports import image

IMAGENET = Pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
ALL = Drawing(held_out=0)


def fed(network: Network, source: Any = None, **options: Any) -> Feeds:
    source = tiny.photos() if source is None else source
    return read_feeds(network, source, Preparation(**options), ALL).calibration


def values(feeds: Feeds) -> torch.Tensor:
    """Rows in the order of their sums, as calibration shuffles them."""
    found = torch.cat([batch["image"] for batch in feeds.batches])
    return found[found.double().flatten(1).sum(1).argsort()]


def by_hand(size: int, pixels: Pixels, mode: str = "RGB", width: int | None = None) -> torch.Tensor:
    rows, width = [], width or size
    for path in sorted(tiny.photos().rglob("*.png")):
        array = np.asarray(Image.open(path).convert(mode).resize((width, size), Image.Resampling.BILINEAR), np.float64)
        array = (array.reshape(size, width, -1) * pixels.scale - np.array(pixels.mean)) / np.array(pixels.std)
        rows.append(torch.from_numpy(array.astype(np.float32)).movedim(-1, 0))
    found = torch.stack(rows)
    return found[found.double().flatten(1).sum(1).argsort()]


def test_a_processor_prepares_as_it_does_for_its_model() -> None:
    processor = transformers.AutoImageProcessor.from_pretrained(tiny.vit())
    images = [Image.open(path).convert("RGB") for path in sorted(tiny.photos().rglob("*.png"))]
    wanted = processor(images, return_tensors="pt")["pixel_values"]
    wanted = wanted[wanted.double().flatten(1).sum(1).argsort()]
    assert torch.allclose(values(fed(image("b", 3, 32, 32), preprocessor=str(tiny.vit()))), wanted, atol=1e-6)
    last = values(fed(image("b", 32, 32, 3), preprocessor=str(tiny.vit() / "preprocessor_config.json")))
    assert torch.allclose(last.movedim(-1, 1), wanted, atol=1e-6)


@pytest.mark.parametrize("shape", [("b", 3, 24, 24), ("b", 3, "h", "w")])
def test_size_mean_and_deviation_do_as_well(shape: tuple[int | str, ...]) -> None:
    options = {} if shape[2] == 24 else {"image_size": (24, 24)}
    found = values(fed(image(*shape), pixels=IMAGENET, **options))
    assert torch.allclose(found, by_hand(24, IMAGENET), atol=1e-5)


def test_channels_last_grey_and_other_types() -> None:
    last = values(fed(image("b", 24, 24, 3), pixels=IMAGENET))
    assert torch.allclose(last.movedim(-1, 1), by_hand(24, IMAGENET), atol=1e-5)
    grey = values(fed(image("b", 1, 24, 24), pixels=Pixels((0.5,), (0.5,))))
    assert torch.allclose(grey, by_hand(24, Pixels((0.5,), (0.5,)), "L"), atol=1e-5)
    half = values(fed(image("b", 3, 24, 24, dtype=TensorProto.FLOAT16), pixels=Pixels()))
    assert half.dtype == torch.float16
    bytes_ = values(fed(image("b", 24, 24, 3, dtype=TensorProto.UINT8)))
    assert bytes_.dtype == torch.uint8
    assert torch.equal(bytes_.movedim(-1, 1).float(), by_hand(24, Pixels(scale=1.0)))


def test_height_comes_before_width() -> None:
    fixed = values(fed(image("b", 3, 16, 40), pixels=IMAGENET))
    assert torch.allclose(fixed, by_hand(16, IMAGENET, width=40), atol=1e-5)
    free = values(fed(image("b", "h", "w", 3), pixels=IMAGENET, image_size=(16, 40)))
    assert torch.equal(free.movedim(-1, 1), fixed)


def test_blue_first_turns_the_channels_round() -> None:
    red, blue = (fed(image("b", 3, 24, 24), pixels=Pixels(bgr=bgr)).batches[0]["image"] for bgr in (False, True))
    assert torch.equal(red, blue.flip(1))
    assert not torch.equal(red, blue)


def test_a_fixed_batch_of_one_is_kept() -> None:
    assert {rows_of(batch) for batch in fed(image(1, 3, 24, 24), pixels=Pixels()).batches} == {1}


def test_classes_are_those_of_the_folders() -> None:
    found = fed(image("b", 3, 24, 24), pixels=Pixels())
    assert {found.labels.count(name) for name in tiny.CLASSES} == {10}


def test_the_processor_beside_the_network_is_found(tmp_path: Path) -> None:
    network = tiny_ports.saved(tmp_path, value("image", "b", 3, 32, 32))
    with pytest.raises(BadInput, match=r"how are its pixels scaled\? Give --preprocessor"):
        fed(network)
    shutil.copy(tiny.vit() / "preprocessor_config.json", tmp_path)
    named = fed(image("b", 3, 32, 32), preprocessor=str(tiny.vit()))
    assert fed(network).fingerprint == named.fingerprint


def test_bundled_images_do_where_there_are_none() -> None:
    found = read_feeds(image("b", 3, 24, 24), None, Preparation(pixels=Pixels()), ALL).calibration
    assert len(found) == 64
    assert found.origin == "the bundled samples"


@pytest.mark.parametrize(
    ("shape", "options", "told"),
    [
        (("b", 3, 48, 48), {"preprocessor": str(tiny.vit())}, r"32 x 32 pixels, and .* takes image float \(b, 3, 48"),
        (("b", 3, "h", "w"), {"pixels": Pixels()}, "--image-size 224"),
        (("b", 3, 24, 24), {"pixels": Pixels(), "image_size": (32, 32)}, "images are 24 x 24. Leave --image-size out"),
        (("b", 3, "h", "w"), {"pixels": Pixels(), "image_size": (5000, 5000)}, "1 to 4096"),
        (("b", 3, 24, 24), {"pixels": Pixels((0.5, 0.5))}, "--mean 0.5 0.5: 2 numbers for 3 channels"),
        (("b", 24, 24, 4), {"pixels": Pixels()}, "which axis of image float .* holds the channels is not known"),
        (("b", "c", "h", "w"), {"pixels": Pixels()}, "holds the channels is not known"),
        (("b", 3, 24), {"pixels": Pixels()}, "images fill one input of four axes, and it takes image float"),
        (("b", 3, 24, 24), {"preprocessor": "/nowhere"}, "--preprocessor /nowhere: there is no such"),
        (("b", 3, 24, 24), {"preprocessor": str(tiny.bert())}, "holds no preprocessor_config.json"),
        (("b", 3, 24, 24), {"preprocessor": str(tiny.bert() / "config.json")}, "only a file called preproc"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told(shape: tuple[int | str, ...], options: dict[str, Any], told: str) -> None:
    with pytest.raises(BadInput, match=told):
        fed(image(*shape), **options)


def test_normalised_pixels_do_not_go_into_whole_numbers() -> None:
    with pytest.raises(BadInput, match="whole numbers, but the prepared pixels lie between"):
        fed(image("b", 24, 24, 3, dtype=TensorProto.UINT8), pixels=IMAGENET)


@pytest.mark.parametrize(
    "numbers", [{"mean": (float("nan"),)}, {"std": (0.0,)}, {"std": (-1.0,)}, {"scale": 0.0}, {"mean": (1e9,)}]
)
def test_numbers_that_cannot_be_are_refused(numbers: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"Pixels become \(pixel \* scale - mean\) / std"):
        Pixels(**numbers)


def test_one_way_of_preparing_is_enough() -> None:
    with pytest.raises(BadInput, match="Give one of them"):
        Preparation(preprocessor="x", pixels=Pixels())


@pytest.mark.parametrize(
    "entries",
    [
        {"image_processor_type": "Evil", "auto_map": {"AutoImageProcessor": "evil.Evil"}},
        {"size": {"height": 10**9, "width": 10**9}},
        {"size": "large"},
        {"image_mean": [0.5, 0.5]},
    ],
)
def test_damaged_processors_are_refused_and_run_nothing(tmp_path: Path, entries: dict[str, Any]) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    usual = json.loads((tiny.vit() / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(usual | entries))
    with pytest.raises(BadInput):
        fed(image("b", 3, 32, 32), preprocessor=str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_texts_are_no_images() -> None:
    with pytest.raises(BadInput, match="a text does not fill image float"):
        fed(image("b", 3, 24, 24), tiny.lines(), pixels=Pixels())
    with pytest.raises(BadInput, match="images fill one input of four axes, and it takes input_ids"):
        fed(tiny_ports.text())
