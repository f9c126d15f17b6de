"""The small calibration set that ships with the package: English sentences, and drawn images."""

from __future__ import annotations

import math
from importlib import resources
from typing import TYPE_CHECKING, Literal

from optin_deploy.common.extras import require
from optin_deploy.data.samples import Sample
from optin_deploy.errors import BadInput
from optin_deploy.files.opening import short

if TYPE_CHECKING:
    from PIL import Image

BUNDLED_IMAGES = 64
_SIDE = 256  # pixels; above the 224 of the usual models, so that their resizing is exercised too


def bundled_samples(kind: Literal["text", "image"]) -> tuple[Sample, ...]:
    """The small set that ships with the package: 160 English texts, or 64 synthetic images (256 x 256, RGB).

    Enough to try the tool out; accuracy needs the user's own data. No labels. The same on every call.
    Raises: BadInput: another kind.
    """
    if kind == "text":
        lines = (
            resources.files("optin_deploy").joinpath("data/calibration.txt").read_text(encoding="utf-8").splitlines()
        )
        return tuple(Sample(text=line, source=f"bundled calibration.txt:{n}") for n, line in enumerate(lines, 1))
    if kind == "image":
        return tuple(Sample(image=_draw(i), source=f"bundled image {i}") for i in range(BUNDLED_IMAGES))
    raise BadInput(f"There are no bundled samples of kind {short(kind)}. Use 'text' or 'image'.")


def _draw(index: int) -> Image.Image:
    """One of four families (gradient, waves, discs, blocks of noise) at one of five scales, in two colours."""
    require("PIL")
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(index)
    y, x = np.mgrid[0:_SIDE, 0:_SIDE] / _SIDE  # each (S, S), in [0, 1)
    cells = 2 ** (2 + index // 4 % 5)  # 4 to 64 across the image
    turn = math.pi * rng.random()
    along = x * math.cos(turn) + y * math.sin(turn)
    field = along - along.min()
    if index % 4 == 1:
        field = 0.5 + 0.5 * np.sin(2 * math.pi * cells * along) * np.cos(math.pi * cells * (x - y))
    elif index % 4 == 2:
        for cx, cy, radius, grey in rng.random((cells, 4)):
            field[np.hypot(x - cx, y - cy) < radius / 5] = grey
    elif index % 4 == 3:
        field = np.kron(rng.random((cells, cells)), np.ones((_SIDE // cells, _SIDE // cells)))
    first, second = rng.random((2, 3))
    grain = 0.06 * rng.random((_SIDE, _SIDE, 3)) - 0.03
    pixels = first + (second - first) * field[..., None] + grain  # (S, S, 3)
    return Image.fromarray((255 * pixels.clip(0, 1)).astype(np.uint8))
