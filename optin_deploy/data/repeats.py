"""Which samples equal others: the same text, or the same bytes of an image or a recording."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path

from optin_deploy.data.samples import Sample
from optin_deploy.data.targets import Grade
from optin_deploy.errors import BadInput


def distinct(samples: Sequence[Sample]) -> tuple[Sample, ...]:
    """The first of each group of equal samples, in their order.

    Raises: BadInput: a file that cannot be read.
    """
    first: dict[Hashable, Sample] = {}
    for content, sample in zip(contents(samples), samples, strict=True):
        first.setdefault(content, sample)
    return tuple(first.values())


def contents(samples: Sequence[Sample]) -> list[Hashable]:
    """A value for each sample; two are equal where a model would be given the same.

    Texts that differ only in white space count as equal. Files of images and recordings are read only where two have
    the same size.
    Raises: BadInput: a file that cannot be read.
    """
    try:
        sizes = [None if sample.file is None else sample.file.stat().st_size for sample in samples]
        shared = {size for size, times in Counter(sizes).items() if times > 1}
        return [_content(sample, size, size in shared) for sample, size in zip(samples, sizes, strict=True)]
    except OSError as err:
        raise BadInput(
            f"{err.filename}: cannot be read: {err.strerror or err}. Check the file and its permissions."
        ) from err


def _content(sample: Sample, size: int | None, shared: bool) -> Hashable:
    image, path = sample.image, sample.file
    if path is not None:
        if not shared:
            return size
        with path.open("rb") as file:
            return size, hashlib.file_digest(file, "sha256").digest()
    if image is None:
        words = [None if text is None else text.split() for text in (sample.text, sample.text_pair)]
        query = sample.label.query if isinstance(sample.label, Grade) else None
        digest = hashlib.sha256(repr(words).encode()).digest()  # as long texts would take their place a second time
        return query, digest
    assert not isinstance(image, Path)
    return image.mode, image.size, hashlib.sha256(image.tobytes()).digest()
