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

from optin_deploy.common.extras import require
from optin_deploy.data.folders import entries
from optin_deploy.data.images import DECODER_ERRORS, IMAGE_EXTENSIONS, upright_size
from optin_deploy.errors import BadInput
from optin_deploy.files.opening import check_size, special_kind
from optin_deploy.files.storage import sha256_file, sha256_json

UNKNOWN = -100
"""Stands in place of the class of a pixel, or of a token, that does not count."""
IGNORED = 255
LEARNED, JUDGED = ("training", "train"), ("validation", "val")
"""Names of the folders with either part, where there are parts."""
PHOTO, MAP_ENDINGS = "_leftImg8bit", ("_gtFine_labelTrainIds", "_gtFine_labelIds")
"""Endings of names in Cityscapes, of photographs and of maps."""
LAYOUTS: Mapping[str, tuple[str, ...]] = {"leftImg8bit": ("gtFine",), "images": ("annotations", "masks", "labels")}
"""Folder of the photographs -> possible folders of their maps, which lie at the same path in it."""
TRAIN_IDS = {
    **{7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13},
    **{27: 14, 28: 15, 31: 16, 32: 17, 33: 18},
}
"""Numbers in files of Cityscapes -> classes that networks learn."""
DEPTH = 3
"""Largest depth of folders below a part."""
INDEXED = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")
"""Modes of images whose pixels are numbers."""


@dataclass(frozen=True)
class ClassMap:
    """The class of each pixel of a photograph; the file is opened when it is needed."""

    path: Path
    reduced: bool = False
    """Whether 0 is no class, and 1 the first, as of image processors that reduce labels."""
    photograph: Path | None = None
    """Must be as large; None: it is not known."""

    def read(self) -> Tensor:
        """Return classes, (height, width), `UNKNOWN` where there is none.

        Raises: BadInput: it does not open, holds colours, or is not as large as its photograph.
        """
        numbers = _numbers(self.path)
        wide = None if self.photograph is None else upright_size(self.photograph)
        if wide not in (None, numbers.shape[::-1]):
            raise BadInput(
                f"{self.path} is {numbers.shape[1]} x {numbers.shape[0]} pixels and its photograph {self.photograph} "
                f"{wide[0]} x {wide[1]}. Scale the map to it without mixing numbers (nearest neighbour)."
            )
        if self.path.stem.endswith("_labelIds"):
            table = np.full(max(256, int(numbers.max()) + 1), UNKNOWN)
            table[[*TRAIN_IDS]] = [*TRAIN_IDS.values()]
            return torch.from_numpy(table[numbers])
        ignored = numbers == IGNORED
        if self.reduced:
            ignored, numbers = ignored | (numbers == 0), numbers - 1
        return torch.from_numpy(np.where(ignored, UNKNOWN, numbers))

    @property
    def digest(self) -> str:
        """sha256 of what it tells."""
        return sha256_json([sha256_file(self.path), self.reduced, self.path.stem.endswith("_labelIds")])


def mapped_photographs(root: Path, *, judging: bool) -> Iterator[tuple[Path, Path | None]]:
    """Return photographs in the order of their names, and the map of each; nothing if the folder is not laid out so.

    Args: judging: of the part that judges, not of the one that is learned from, where the folder has parts.
    Raises: BadInput: a link that leaves the folder, a part that is not there, or maps that belong to no photograph.
        OSError.
    """
    found = _folders(root)
    if found is None:
        return
    photos, maps = (_part(folder, root, judging=judging) for folder in found)
    if photos is None or (judging and maps is None):
        missing = found[0] if photos is None else found[1]
        raise BadInput(
            f"{missing} has parts, but none that {'judges' if judging else 'is learned from'}: "
            f"{' or '.join(JUDGED if judging else LEARNED)}. Give a folder that has it."
        )
    listed = [] if maps is None else [(path, path.relative_to(maps)) for path in _files(maps, root)]
    known = {place.with_suffix(place.suffix.lower()): path for path, place in listed}
    some = False
    for photo in _files(photos, root):
        place = photo.relative_to(photos).parent
        stem = photo.stem.removesuffix(PHOTO)
        names = [f"{stem}{ending}.png" for ending in MAP_ENDINGS] if stem != photo.stem else [f"{stem}.png"]
        there = next((known[place / name] for name in names if place / name in known), None)
        some |= there is not None
        yield photo, there
    if known and not some:
        raise BadInput(
            f"{maps} has no map for any photograph in {photos}. A map has the name of its photograph and ends in .png;"
            f" in Cityscapes it ends in {MAP_ENDINGS[0]}.png or {MAP_ENDINGS[1]}.png instead of {PHOTO}.png."
        )


def _folders(root: Path) -> tuple[Path, Path] | None:
    there = {path.name for path in root.iterdir() if path.is_dir()}
    for photos, possible in LAYOUTS.items():
        for maps in possible:
            if {photos, maps} <= there:
                entries_of = {path.name: path for path in entries(root, root)}  # a link must not leave
                return entries_of[photos], entries_of[maps]
    return None


def _part(folder: Path, root: Path, *, judging: bool) -> Path | None:
    """The part of a folder that is asked for; the folder itself where it has no parts, None where it has others."""
    parts = {path.name: path for path in entries(folder, root) if path.is_dir() and path.name in (*LEARNED, *JUDGED)}
    wanted = JUDGED if judging else LEARNED
    return next((parts[name] for name in wanted if name in parts), None) if parts else folder


def _files(folder: Path, root: Path, depth: int = DEPTH) -> Iterator[Path]:
    """Image files of a folder and of those in it."""
    for entry in entries(folder, root):
        if entry.is_dir():
            if not depth:
                raise BadInput(f"{entry} lies more than {DEPTH} folders deep. Move the images up, or delete the link.")
            yield from _files(entry, root, depth - 1)
        elif entry.suffix.lower() in IMAGE_EXTENSIONS and special_kind(entry) is None:
            yield entry


def _numbers(path: Path) -> np.ndarray:
    require("PIL")
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
