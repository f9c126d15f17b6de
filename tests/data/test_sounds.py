"""Recordings: their samples as one channel at the rate that a network hears, or a reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from optin_deploy.data.samples import read_samples
from optin_deploy.data.sounds import open_sound
from optin_deploy.errors import BadInput
from support.tiny_files import save_image, save_recording, write

RATE = 16_000


def tone(rate: int, seconds: float = 0.5, hertz: float = 440.0) -> np.ndarray:
    """A sine (samples,) of half the loudness that there is."""
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)


def save_pcm(path: Path, channels: np.ndarray, rate: int) -> None:
    """Write (channels, samples) between -1 and 1."""
    save_recording(path, np.rint(channels.T * 2**15), rate)


def test_channels_are_one(tmp_path: Path) -> None:
    left, right = tone(RATE), tone(RATE, hertz=700)
    save_pcm(tmp_path / "a.wav", np.stack((left, right)), RATE)
    found = open_sound(tmp_path / "a.wav", RATE)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, (left + right) / 2, atol=2**-15)


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
def test_another_rate_is_made_the_one_that_is_heard(tmp_path: Path, rate: int) -> None:
    save_pcm(tmp_path / "a.wav", tone(rate)[None], rate)
    found, expected = open_sound(tmp_path / "a.wav", RATE), tone(RATE)
    assert abs(len(found) - len(expected)) <= 1
    middle = slice(500, 7500)
    np.testing.assert_allclose(found[middle], expected[middle], atol=1e-3)


@pytest.mark.parametrize(("name", "error"), [("a.flac", 1e-4), ("a.ogg", 0.1), ("a.mp3", 0.1), ("a.aiff", 1e-4)])
def test_other_formats_are_read(tmp_path: Path, name: str, error: float) -> None:
    soundfile.write(tmp_path / name, tone(RATE), RATE)
    found = open_sound(tmp_path / name, RATE)[2000:6000]
    assert np.abs(found - tone(RATE)[2000:6000]).max() < error


def test_the_beginning_of_a_long_recording_is_heard(tmp_path: Path) -> None:
    save_pcm(tmp_path / "a.wav", tone(4_000, seconds=31)[None], 4_000)
    assert len(open_sound(tmp_path / "a.wav", 4_000)) == 30 * 4_000


def test_what_is_no_recording_is_refused(tmp_path: Path) -> None:
    save_pcm(tmp_path / "whole.wav", tone(RATE)[None], RATE)
    whole = (tmp_path / "whole.wav").read_bytes()
    save_pcm(tmp_path / "empty.wav", np.zeros((1, 0)), RATE)
    save_pcm(tmp_path / "fast.wav", tone(RATE)[None], 400_000)
    soundfile.write(tmp_path / "other.wav", tone(RATE), RATE, format="AU")
    soundfile.write(tmp_path / "odd.wav", np.full(400, np.nan), RATE, subtype="FLOAT")
    save_pcm(tmp_path / "short.wav", np.ones((1, 1)) / 2, 3 * RATE)
    write(tmp_path / "text.wav", "not a sound")
    write(tmp_path / "header.wav", whole[:30])
    write(tmp_path / "lfs.wav", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    whys = {
        "empty": "it holds 0 samples in 1 channels",
        "fast": "WAV of 400000 samples a second",
        "other": "it is AU of 16000 samples",
        "odd": "values that are not finite",
        "short": "too short: its 1 samples at 48000 a second are none at 16000, .* Give a longer one",
        "text": "this recording does not open: Format not recognised",
        "header": "this recording does not open",
        "lfs": "pointer",
    }
    for name, why in whys.items():
        with pytest.raises(BadInput, match=f"{name}.wav.*{why}"):
            open_sound(tmp_path / f"{name}.wav", RATE)
    with pytest.raises(BadInput, match=r"away.wav: this recording does not open: .*No such file"):
        open_sound(tmp_path / "away.wav", RATE)


def test_a_folder_names_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("cat/b.WAV", "cat/a.flac", "dog/c.ogg", "dog/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, "x")
    found = read_samples(tmp_path)
    assert [(Path(each.source).name, each.label) for each in found] == [
        ("a.flac", "cat"),
        ("b.WAV", "cat"),
        ("c.ogg", "dog"),
    ]
    assert all(each.sound is not None and each.image is None for each in found)
    assert "1 files are not used (1 x .txt)" in caplog.text
    save_image(tmp_path / "cat" / "z.png")
    assert [each.sound is None for each in read_samples(tmp_path)] == [False, False, True, False]
