"""Photographs with a class for each pixel: folders laid out as Cityscapes, as ADE20K or in plain pairs, and their maps.

A map is a PNG whose pixels are numbers of classes; 255 says nothing of a pixel.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from optin_deploy.data.files import check_size
from optin_deploy.data.images import DECODER_ERRORS, IMAGE_EXTENSIONS, entries
from optin_deploy.errors import BadInput

UNKNOWN = -100
"""In place of the class of a pixel, or of a token, that does not count."""
IGNORED = 255
LEARNED, JUDGED = ("training", "train"), ("validation", "val")
"""Names of the folders with either part, where there are parts."""
PHOTO, MAP_ENDINGS = "_leftImg8bit", ("_gtFine_labelTrainIds", "_gtFine_labelIds")
"""How names end in Cityscapes."""
LAYOUTS: Mapping[str, tuple[str, ...]] = {"leftImg8bit": ("gtFine",), "images": ("annotations", "masks", "labels")}
"""Folder of the photographs -> possible folders of their maps, which lie at the same path in it."""
TRAIN_IDS = {
    **{7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13},
    **{27: 14, 28: 15, 31: 16, 32: 17, 33: 18},
}
"""Of Cityscapes: numbers in its files -> classes that networks learn."""
INDEXED = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")
"""Modes of images whose pixels are numbers."""


@dataclass(frozen=True)
class ClassMap:
    """The class of each pixel of a photograph; its file is opened when it is needed."""

    path: Path
    reduced: bool = False
    """Is 0 no class, and 1 the first, as image processors call it that reduce labels?"""

    def read(self) -> Tensor:
        """Return classes, (height, width), `UNKNOWN` where there is none.

        Raises: BadInput: it does not open, or holds colours.
        """
        numbers = _numbers(self.path)
        if self.path.stem.endswith("_labelIds"):
            table = np.full(max(256, int(numbers.max()) + 1), UNKNOWN)
            table[[*TRAIN_IDS]] = [*TRAIN_IDS.values()]
            return torch.from_numpy(table[numbers])
        ignored = numbers == IGNORED
        if self.reduced:
            ignored, numbers = ignored | (numbers == 0), numbers - 1
        return torch.from_numpy(np.where(ignored, UNKNOWN, numbers))


def mapped_photographs(root: Path, *, judging: bool) -> Iterator[tuple[Path, Path | None]]:
    """Return photographs in the order of their names, and the map of each; nothing if the folder is not laid out so.

    Args: judging: of the part that judges, not of the one that is learned from, where the folder has parts.
    Raises: BadInput: a link that leaves the folder, or maps that belong to no photograph alone. OSError.
    """
    found = _folders(root)
    if found is None:
        return
    photos, maps = found
    for name in JUDGED if judging else LEARNED:
        if (photos / name).is_dir():
            photos, maps = photos / name, maps / name
            break
    some = False
    for photo in _files(photos, root):
        place = photo.relative_to(photos).parent
        stem = photo.stem.removesuffix(PHOTO)
        names = [f"{stem}{ending}.png" for ending in MAP_ENDINGS] if stem != photo.stem else [f"{stem}.png"]
        there = next((path for name in names if (path := maps / place / name).is_file()), None)
        some |= there is not None
        yield photo, there
    if not some and maps.is_dir() and next(_files(maps, root), None) is not None:
        raise BadInput(
            f"{maps} has no map for any photograph in {photos}. A map has the name of its photograph and ends in .png;"
            f" in Cityscapes it ends in {MAP_ENDINGS[0]}.png or {MAP_ENDINGS[1]}.png instead of {PHOTO}.png."
        )


def _folders(root: Path) -> tuple[Path, Path] | None:
    there = {path.name for path in root.iterdir() if path.is_dir()}
    for photos, possible in LAYOUTS.items():
        for maps in possible:
            if {photos, maps} <= there:
                return root / photos, root / maps
    return None


def _files(folder: Path, root: Path) -> Iterator[Path]:
    """Image files of a folder and of those in it."""
    for entry in entries(folder, root):
        if entry.is_dir():
            yield from _files(entry, root)
        elif entry.suffix.lower() in IMAGE_EXTENSIONS:
            yield entry


def _numbers(path: Path) -> np.ndarray:
    from PIL import Image

    try:
        check_size(path)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=["PNG"]) as image:
                if image.mode not in INDEXED:
                    raise BadInput(
                        f"{path}: a map of mode {image.mode}: its pixels are colours. Give maps whose pixels are "
                        "numbers of classes (PNG of mode L, P or I;16)."
                    )
                return np.asarray(image).astype(np.int64)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as err:
        raise BadInput(f"{path}: too many pixels ({err}). Shrink it with its photograph, or delete both.") from err
    except BadInput:
        raise
    except DECODER_ERRORS as err:
        raise BadInput(f"{path}: this map does not open: {err or type(err).__name__}. Save it again as PNG.") from err
