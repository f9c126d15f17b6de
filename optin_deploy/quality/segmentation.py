"""What a cut did to the classes of pixels: mean IoU and pixel accuracy against maps, at the size of each map."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor

from optin_deploy.data.class_maps import ClassMap
from optin_deploy.errors import BadInput, NonFiniteActivation
from optin_deploy.feeds.rows import Feeds, rows_of
from optin_deploy.quality.quality import Quality
from optin_deploy.scoring.losses import Readout

VALUES = 2**26
"""Most values of a picture that are scaled to the size of its map at once: 256 MiB."""
log = logging.getLogger(__name__)


class SegmentationJudge:
    """Compares cut networks with the dense one on photographs whose classes are known pixel by pixel.

    What a network puts out is scaled to the size of the map before the largest class counts.
    """

    def __init__(self, dense: Iterable[Readout], rows: Feeds, *, strict: bool = False) -> None:
        """Read what the dense network gives.

        Args: dense: one a batch of `rows`. strict: refuse rows without a map beside others; else they do not count.
        Raises: BadInput: maps by which the network is no better than guessing, or that do not fit what it puts out.
        """
        self.rows = rows
        self._mapped = sum(isinstance(label, ClassMap) for label in rows.labels)
        if self._mapped < len(rows):
            left = f"{rows.origin}: {len(rows) - self._mapped} of the {len(rows)} rows that judge have no map"
            if strict:
                raise BadInput(f"{left}. Give maps of all, or of none.")
            log.warning("%s: quality is that of the others", left)
        self._dense = self._confusion(dense)
        pixels = self._dense.sum(1)
        if not int(pixels.sum()):
            raise BadInput(f"{rows.origin}: no pixel of its {self._mapped} maps has a class. Give maps that tell some.")
        guessed, there = torch.diag(torch.zeros_like(pixels)), pixels > 0
        guessed[:, int(pixels.argmax())] = pixels
        # Of the classes in the maps: a network that knows many may name a few more that are not there, and is no guess.
        found, least = (float(ious(each)[there].mean()) for each in (self._dense, guessed))
        if found <= least and found < 1:
            why = (
                "The numbers in the maps seem to mean other classes than the network's; if 0 is none of them, set "
                "do_reduce_labels in preprocessor_config.json."
            )
            if int((pixels > 0).sum()) == 1:
                why = "All pixels of the maps have the same class: give photographs with others too."
            raise BadInput(
                f"{rows.origin}: the dense network has a mean IoU of {found:.1%} on the classes of the maps, no more "
                f"than if it called all pixels the same ({least:.1%}): no loss can be measured there. {why}"
            )

    def compare(self, cut: Iterable[Readout]) -> Quality:
        """Return mean IoU of both networks, and beside it the share of the pixels that are right."""
        found = self._confusion(cut)
        right = {"pixel_accuracy": (accuracy(self._dense), accuracy(found))}
        return Quality("mean_iou", mean_iou(self._dense), mean_iou(found), self._mapped, right)

    def _confusion(self, readouts: Iterable[Readout]) -> Tensor:
        """Pixels of each true class that got each class, (classes, classes)."""
        total, start = torch.zeros(0, 0, dtype=torch.int64), 0
        for readout, batch in zip(readouts, self.rows.batches, strict=True):
            pictures = readout.pictures
            if pictures is None:
                raise BadInput(
                    f"{self.rows.origin} has maps of classes, and the output that is compared tells no classes of "
                    "places. Name one by --compare-output NAME:logits, or leave out the maps."
                )
            if not bool(pictures.isfinite().all()):
                raise NonFiniteActivation(
                    f"{self.rows.origin}: the network put out NaN or infinity. Check the weights and the data; a "
                    "network stored in half precision may overflow: export it in float32."
                )
            total = total if total.numel() else total.new_zeros(pictures.shape[1], pictures.shape[1])
            for picture, label in zip(pictures, self.rows.labels[start:], strict=False):
                if isinstance(label, ClassMap):
                    total += _counted(picture, label)
            start += rows_of(batch)
        return total


def mean_iou(confusion: Tensor) -> float:
    """Mean of intersection over union over the classes that a map has or the network names, as others define it.

    Source: mean_iou of Hugging Face evaluate, and of MMSegmentation: a class that is named in vain counts as 0.
    """
    return float(ious(confusion).nanmean())


def ious(confusion: Tensor) -> Tensor:
    """Intersection over union of each class, (classes,); nan: no map has it, and the network never names it."""
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    return confusion.diagonal().double() / union


def accuracy(confusion: Tensor) -> float:
    """Share of the pixels with a class that got theirs."""
    return float(confusion.diagonal().sum() / confusion.sum())


def _counted(picture: Tensor, label: ClassMap) -> Tensor:
    """Args: picture: (classes, height, width)."""
    wanted, classes = label.read(), len(picture)
    if int(wanted.max()) >= classes:
        raise BadInput(
            f"{label.path} has the class {int(wanted.max())}; the network knows 0 to {classes - 1}. If 0 is no"
            " class, set do_reduce_labels in preprocessor_config.json; else correct the map, or write 255 where no"
            " class counts."
        )
    found, known = largest(picture, wanted.shape[0], wanted.shape[1]).cpu(), wanted >= 0
    return torch.bincount(wanted[known] * classes + found[known], minlength=classes**2).view(classes, classes)


def largest(picture: Tensor, height: int, width: int) -> Tensor:
    """Return the class of the largest value at each pixel of a scaled picture, (height, width).

    A few classes at a time: of a photograph, all of them take gigabytes.
    Args: picture: (classes, height, width) of any size.
    """
    together = max(1, VALUES // (height * width))
    best = picture.new_full((height, width), -torch.inf, dtype=torch.float32)
    found = torch.zeros_like(best, dtype=torch.int64)
    for start in range(0, len(picture), together):
        part = picture[start : start + together].unsqueeze(0).float()
        values, classes = torch.nn.functional.interpolate(part, size=(height, width), mode="bilinear")[0].max(0)
        found = torch.where(values > best, classes + start, found)
        best = torch.maximum(best, values)
    return found
