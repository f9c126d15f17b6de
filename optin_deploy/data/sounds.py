"""Recordings: their samples as one channel at the rate that a network hears, resampled or refused."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from optin_deploy.common.extras import require
from optin_deploy.errors import BadInput
from optin_deploy.files.opening import check_size

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SOUND_FORMATS = ("WAV", "WAVEX", "FLAC", "OGG", "MP3", "AIFF")
"""What libsndfile may open."""
SOUND_EXTENSIONS = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff")
LONGEST_SECONDS = 30
"""What is heard of a recording: its beginning, as long as Whisper hears at once."""
HIGHEST_RATE = 384_000
"""Samples a second of the best converters."""
MOST_NUMBERS = 2**27
"""Samples in all channels together, as 512 MiB of numbers."""


def open_sound(path: Path, rate: int) -> NDArray[np.float32]:
    """The mean of all channels at `rate` samples a second, float32 (samples,), at most the first 30 seconds.

    Raises: BadInput: it does not open, is empty or too large, or holds values that are no numbers.
    """
    require("soundfile")
    require("soxr")
    import numpy as np
    import soundfile
    import soxr

    try:
        check_size(path)
        with soundfile.SoundFile(path) as file:
            if file.format not in SOUND_FORMATS or not 0 < file.samplerate <= HIGHEST_RATE:
                raise ValueError(f"it is {file.format} of {file.samplerate} samples a second")
            frames = min(file.frames, LONGEST_SECONDS * file.samplerate)
            if not 0 < frames * file.channels <= MOST_NUMBERS:
                raise ValueError(f"it holds {file.frames} samples in {file.channels} channels")
            wave: NDArray[np.float32] = file.read(frames, dtype="float32", always_2d=True).mean(axis=1)
            own = file.samplerate
    except (soundfile.SoundFileError, OSError, ValueError, TypeError, MemoryError) as err:
        from optin_deploy.files.weights import refuse_pointer

        refuse_pointer(path)
        why = getattr(err, "error_string", "") or str(err) or type(err).__name__
        raise BadInput(
            f"{path}: this recording does not open: {why} Possible: intact wav, flac, ogg, mp3 or aiff files of up to "
            f"{HIGHEST_RATE:,} samples a second. Save it again, or delete it."
        ) from err
    if not np.isfinite(wave).all():
        raise BadInput(f"{path}: this recording holds values that are not finite. Save it again, or delete it.")
    heard: NDArray[np.float32] = wave if own == rate else soxr.resample(wave, own, rate)
    if not len(heard):
        raise BadInput(
            f"{path}: this recording is too short: its {len(wave)} samples at {own} a second are none at {rate}, which "
            "the network hears. Give a longer one, or delete it."
        )
    return heard
