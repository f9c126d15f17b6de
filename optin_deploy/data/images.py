"""Image files: their pixels as 8-bit RGB, scaled right or refused."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from optin_deploy.common.extras import require
from optin_deploy.errors import BadInput
from optin_deploy.files.opening import check_size

if TYPE_CHECKING:
    from PIL import Image

IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
"""What PIL may open: a closed list, so that a renamed .eps never starts an outside program."""
IMAGE_EXTENSIONS = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".webp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBX", "RGBA", "CMYK", "YCbCr", "HSV")
"""Modes that PIL itself turns into RGB without loss of scale; what lies under transparency is shown, as transformers'
own loader does."""
ORIENTATION, SIDEWAYS = 274, (5, 6, 7, 8)
"""Tag of EXIF, and its values of images that stand on their side."""
DECODER_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, AttributeError, ArithmeticError),
    *(RuntimeError, AssertionError, MemoryError, struct.error, zlib.error),
)
"""What PIL's decoders raise on damaged files."""


def open_image(path: Path) -> tuple[Image.Image, int]:
    """Open a file, turned upright, as 8-bit RGB (of an animation the first picture); also how many pictures it holds.

    Raises: BadInput: it does not open, is too large, or its pixels have no known scale.
    """
    require("PIL")
    from PIL import Image, ImageOps

    try:
        check_size(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged notes beside the picture, such as where it was taken
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                image.load()
                # As transformers' own load_image: turned upright, three channels.
                upright = eight_bit(ImageOps.exif_transpose(image), path, _white(image))
                # Of a photo in several sizes (MPO) the first is the photo.
                return upright, 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as err:
        raise BadInput(f"{path}: too many pixels ({err}). Shrink it to a few megapixels, or delete it.") from err
    except BadInput:
        raise
    except DECODER_ERRORS as err:
        from optin_deploy.files.weights import refuse_pointer

        refuse_pointer(path)
        raise BadInput(
            f"{path}: this image does not open: {err or type(err).__name__}. Possible: intact png, jpg, jpeg, bmp,"
            " webp, gif, tif or ppm files. Save it again, or delete it."
        ) from err


def upright_size(path: Path) -> tuple[int, int]:
    """Width and height of an image that was turned upright.

    Raises: BadInput: it does not open.
    """
    require("PIL")
    from PIL import Image

    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            turned = image.getexif().get(ORIENTATION, 1) in SIDEWAYS
            return image.size[::-1] if turned else image.size
    except (*DECODER_ERRORS, Image.DecompressionBombError) as err:
        raise BadInput(f"{path}: this image does not open: {err or type(err).__name__}. Save it again.") from err


def eight_bit(image: Image.Image, name: str | Path, white: int | None = None) -> Image.Image:
    """An image as RGB: 16-bit grey is scaled, where PIL's own conversion calls all above 255 white.

    Args: white: the value that is white, of images deeper than 8 bits; None = 65535 of mode I;16, unknown of others.
    Raises: BadInput: a mode whose values have no known range.
    """
    import numpy as np
    from PIL import Image

    if image.mode in EIGHT_BIT:
        return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
    if white is None and image.mode.startswith("I;16"):
        white = 65535
    if white is None:
        raise BadInput(
            f"{name}: an image of mode {image.mode}, whose values have no known range. Possible are 8 bits a channel"
            " and 16-bit grey: save it so."
        )
    grey = np.asarray(image).astype(np.float64) * (255 / white)  # (height, width)
    return Image.fromarray(np.rint(grey.clip(0, 255)).astype(np.uint8)).convert("RGB")


def _white(image: Image.Image) -> int | None:
    """The value that the file calls white, where its mode alone does not say so."""
    if image.format in ("PNG", "PPM") and image.mode == "I":  # 16-bit in both
        return 65535
    if image.format == "TIFF" and image.mode.startswith("I;16"):
        tags = image.tag_v2  # type: ignore[attr-defined]
        if tags.get(262) == 0:
            raise ValueError("16-bit grey in which 0 is white")  # PIL does not turn it round
        return int(2 ** tags.get(258, (16,))[0] - 1)
    return None
