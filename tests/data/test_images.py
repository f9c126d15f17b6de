"""Image files: which are read, and pixels of every mode as 8-bit RGB."""

from __future__ import annotations

import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from optin_deploy.data.images import eight_bit, open_image
from optin_deploy.data.samples import read_samples
from optin_deploy.errors import BadInput
from support.tiny_files import processor, save_image, write
from support.tiny_ports import image_rows


def test_images_that_are_not_read_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [
        "a.png",
        "B.JPG",
        "c.jpeg",
        "d.JPEG",
        "e.Tif",
        "f.tiff",
        "g.gif",
        "h.webp",
        "i.BMP",
        "j.ppm",
        "k.pgm",
        "l.jfif",
    ]
    for name in names:
        save_image(tmp_path / "cat" / name, mode="L")
    for name in ("1.heic", "2.HEIC", "3.eps", "README", ".DS_Store"):
        write(tmp_path / "cat" / name, "x")
    found = read_samples(tmp_path)
    assert sorted(Path(sample.source).name for sample in found) == sorted(names)
    assert "4 files are not used (2 x .heic, 1 x .eps, 1 x no extension)" in caplog.text
    assert len(image_rows(found, processor())) == len(names)


GREY = np.array([[0, 200, 256], [5000, 32768, 65535]], np.uint16)
"""16-bit; 8 bits of it: value / 257."""


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_16_bit_grey_is_scaled(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.pgm":
        write(path, b"P5 3 2 65535\n" + GREY.astype(">u2").tobytes())
    else:
        Image.fromarray(GREY).save(path)
    found = np.asarray(open_image(path)[0])
    assert np.array_equal(found, np.rint(GREY / 257).astype(np.uint8)[..., None].repeat(3, 2))
    in_memory = Image.fromarray(GREY)
    assert np.array_equal(np.asarray(eight_bit(in_memory, "x")), found)


@pytest.mark.parametrize(
    ("order", "bits", "pixels"),
    [("<", 16, b"\x80\0\xff\xff"), (">", 16, b"\0\x80\xff\xff"), ("<", 12, b"\x08\x0f\xff")],
)
def test_a_tiff_says_what_is_white(tmp_path: Path, order: str, bits: int, pixels: bytes) -> None:
    """128 and the greatest value. Written by hand: PIL writes 16 bits in the order of this machine only."""
    short = {256: 2, 257: 1, 258: bits, 259: 1, 262: 1, 277: 1, 278: 1}  # size, depth, 0 is black
    entries = [(tag, 3, struct.pack(f"{order}Hxx", value)) for tag, value in short.items()]
    entries += [(tag, 4, struct.pack(f"{order}I", value)) for tag, value in ((273, 8), (279, len(pixels)))]
    tags = b"".join(struct.pack(f"{order}HHI", tag, kind, 1) + value for tag, kind, value in sorted(entries))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 16) + pixels.ljust(8, b"\0")
    path = write(tmp_path / "a.tif", head + struct.pack(f"{order}H", len(entries)) + tags + bytes(4))
    found = np.asarray(open_image(path)[0])[0, :, 0]
    assert found.tolist() == [round(128 * 255 / (2**bits - 1)), 255]
    turned = path.read_bytes().replace(
        tags, tags.replace(*(struct.pack(f"{order}HHIHxx", 262, 3, 1, v) for v in (1, 0)))
    )
    if bits == 16 and order == "<":
        with pytest.raises(BadInput, match=r"a\.tif: .*0 is white"):
            open_image(write(path, turned))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_no_known_range_are_refused(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.tif"
    Image.new(mode, (4, 4), 3).save(path)
    says = rf"mode {mode}, whose values have no known range.*16-bit grey"
    with pytest.raises(BadInput, match=says):
        open_image(path)
    with pytest.raises(BadInput, match=says):
        eight_bit(Image.new(mode, (4, 4), 3), "in memory")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_other_modes_look_as_they_are(tmp_path: Path, mode: str) -> None:
    """Half red (or grey) and half white, whatever the mode; transparency shows what lies under it."""
    image = Image.new("RGB", (8, 8), (254, 0, 0) if mode not in ("1", "L", "LA") else (0, 0, 0))
    image.paste((255, 255, 255), (4, 0, 8, 8))
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image.convert(mode).save(path, **({"transparency": 0} if mode in ("P", "L", "RGB") and mode == "P" else {}))
    found = np.asarray(open_image(path)[0]).astype(int)
    assert abs(found - np.asarray(image)).max() <= 3


def test_animations_give_their_first_picture_and_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pictures = [Image.new("RGB", (16, 16), colour) for colour in ("white", "black", "black")]
    for name in ("a.gif", "b.png", "c.webp", "d.tif"):
        pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:])
    (batch,) = image_rows(read_samples(tmp_path), processor()).batches
    assert batch["image"].min() == 1  # white
    assert "4 images hold several pictures" in caplog.text


@pytest.mark.parametrize("size", [(1, 1), (40, 1), (1, 40), (40, 3), (3, 3)])
def test_tiny_images_are_prepared_as_others(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, (255, 0, 0)).save(tmp_path / "a.png")
    (batch,) = image_rows(read_samples(tmp_path), processor()).batches
    assert batch["image"].shape == (1, 3, 16, 16)
    assert [float(value) for value in batch["image"].mean((0, 2, 3))] == pytest.approx([1, -1, -1])


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.tif", "a.webp", "a.bmp", "a.ppm"])
def test_damaged_images_are_bad_input(tmp_path: Path, name: str) -> None:
    """Bytes changed or cut at random: an image, or one sentence; never another error."""
    rng = np.random.default_rng(0)
    Image.effect_noise((24, 24), 50).convert("RGB").save(tmp_path / name)
    intact = (tmp_path / name).read_bytes()
    for _ in range(60):
        damaged = bytearray(intact)
        for place in rng.integers(0, min(len(intact), 400), 4):
            damaged[place] = rng.integers(256)
        path = write(tmp_path / name, bytes(damaged[: rng.integers(len(intact) // 2, len(intact) + 1)]))
        with suppress(BadInput):
            assert open_image(path)[0].mode == "RGB"


def test_an_image_that_git_lfs_left_out_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(BadInput, match=r"a\.jpg is a pointer of Git LFS.*git lfs pull"):
        open_image(tmp_path / "a.jpg")
