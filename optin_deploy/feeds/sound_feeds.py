"""Recordings as feeds: waves or spectra, as the model's own feature extractor makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from optin_deploy.data.samples import Sample
from optin_deploy.data.sounds import open_sound
from optin_deploy.errors import BadInput
from optin_deploy.feeds.ports import Takes, fitted, type_of
from optin_deploy.feeds.rows import Batching, Feeds, grouped
from optin_deploy.files.wall import wall


def sound_input(inputs: Takes) -> str:
    """Find the input that takes waves or spectra.

    Raises: BadInput: it takes more than one, or whole numbers.
    """
    ports = list(inputs.ports.values())
    if len(ports) != 1 or inputs.shared or not type_of(ports[0]).is_floating_point:
        raise BadInput(f"{inputs.source}: a recording fills one input, and it takes {inputs}. {inputs.as_arrays}")
    return ports[0].name


def sound_feeds(
    inputs: Takes, name: str, samples: Sequence[Sample], extractor: Any, *, batching: Batching, origin: str
) -> Feeds:
    """Open and prepare. Rows of one length share a batch: nothing is padded that the extractor does not pad itself.

    Args: name: of the input. extractor: of transformers.
    Raises: BadInput: a recording does not open, or the extractor does not fit.
    """
    rows = [fitted(inputs, {name: _heard(sample, extractor)}, sample.source) for sample in samples]
    return grouped(rows, [sample.label for sample in samples], origin, batching)


def _heard(sample: Sample, extractor: Any) -> Tensor:
    """What an extractor makes of a recording: (1, samples), or a spectrum."""
    if sample.sound is None:
        raise BadInput(f"{sample.source}: this is no recording, and others are. Keep one kind in a folder.")
    rate = extractor.sampling_rate
    wave = open_sound(sample.sound, rate)
    step = "Use the preprocessor_config.json saved with this network, and recordings that are long enough for it."
    with wall(f"{sample.source}: the feature extractor does not take it", step):
        values: Tensor = extractor(wave, sampling_rate=rate, return_tensors="pt")[extractor.model_input_names[0]]
    return values
