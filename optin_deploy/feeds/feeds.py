"""Calibration data of any network: texts, images, recordings, arrays or Python become rows that learn or judge."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from optin_deploy.data.arrays import ENDINGS
from optin_deploy.data.bundled import bundled_samples
from optin_deploy.data.folders import ROW_EXTENSIONS
from optin_deploy.data.halves import MIN_SAMPLES, halves, most_held_out, split, too_few
from optin_deploy.data.pairs import PAIR_COLUMN
from optin_deploy.data.repeats import distinct
from optin_deploy.data.samples import TEXT_EXTENSIONS, Sample, read_samples
from optin_deploy.data.sounds import SOUND_EXTENSIONS
from optin_deploy.errors import BadInput
from optin_deploy.feeds.array_feeds import array_feeds, array_files
from optin_deploy.feeds.beside_graph import load_extractor, load_processor, load_tokenizer
from optin_deploy.feeds.image_feeds import Pixels, image_feeds, image_input
from optin_deploy.feeds.inputs import SOUND
from optin_deploy.feeds.module_feeds import module_feeds
from optin_deploy.feeds.ports import Takes, takes
from optin_deploy.feeds.rows import Batching, Feeds, grouped, rows_of
from optin_deploy.feeds.sentence_modules import NONE, Prompts
from optin_deploy.feeds.sound_feeds import sound_feeds, sound_input
from optin_deploy.feeds.targets import prompted
from optin_deploy.feeds.text_feeds import text_feeds, text_inputs
from optin_deploy.network.graph import Network
from optin_deploy.network.run import Program

log = logging.getLogger(__name__)

Source = str | PathLike[str] | Sequence[Sample] | None
"""A file or folder, samples in memory, or None: the bundled set."""


@dataclass(frozen=True)
class Preparation:
    """How what users have becomes what a network takes."""

    tokenizer: Any = None
    """Folder, tokenizer.json or hub id, or a loaded one; None: what lies beside the network."""
    preprocessor: Any = None
    """Folder, preprocessor_config.json or hub id, or a loaded one; None: what lies beside the network."""
    pixels: Pixels | None = None
    """How pixels are scaled, in place of a preprocessor."""
    image_size: tuple[int, int] | None = None
    """Height and width, where the network leaves them free."""
    seq_len: int | None = None
    """Most tokens of a text; None: what the network fixes, or 128."""
    batch_size: int = 32
    text_column: str = "text"
    label_column: str = "label"
    pair_column: str = PAIR_COLUMN
    prompts: Prompts = NONE
    """What is put before texts."""
    masks: bool = False
    """Some tokens of each text are masked: a model of masked words is asked for them."""

    def __post_init__(self) -> None:
        if self.seq_len is not None and self.seq_len < 1:
            raise BadInput(f"--seq-len {self.seq_len}: give 1 or more tokens.")
        if self.preprocessor is not None and (self.pixels is not None or self.image_size is not None):
            raise BadInput(
                f"--preprocessor {self.preprocessor} beside --mean, --std or --image-size: either says how images are"
                " prepared. Give one of them."
            )


@dataclass(frozen=True)
class Drawing:
    """Which rows are taken."""

    samples: int = 512
    """The most for calibration."""
    held_out: float = 0.2
    """Share of the rows that judge, see `halves`; 0: none."""
    seed: int = 0
    others_judge: bool = False
    """Rows of another source judge: those held out are drawn, so that the others stay the same, and not made."""


@dataclass(frozen=True, eq=False)
class Halves:
    """Rows of one source, none in both."""

    calibration: Feeds
    held_out: Feeds | None
    """None: none was asked for."""
    pairs: bool = False
    """Whether there are pairs of texts among the rows."""


AS_USUAL, DRAWN = Preparation(), Drawing()


def read_feeds(
    network: Network, source: Source, preparation: Preparation = AS_USUAL, drawing: Drawing = DRAWN
) -> Halves:
    """Read calibration data for a network.

    Args:
        source: texts (.txt, .csv, .jsonl), a folder of images or of recordings, .npz or .safetensors with every
            input by its name, or a folder of such files.
    Raises: BadInput: it cannot be read, does not fit the network, or holds too few different samples.
    """
    inputs = takes(network)
    files = _array_files(source)
    if files is not None:
        return _drawn(array_feeds(inputs, files, str(source)), _batching(inputs, preparation), drawing)
    samples = _samples(inputs, source, preparation, judging=False)
    some, others = split(samples, samples_limit=drawing.samples, held_out=drawing.held_out, seed=drawing.seed)
    make = _maker(inputs, samples, preparation, _origin(source))
    calibration = make(some)
    pairs = any(sample.text_pair is not None for sample in samples)
    if not others or drawing.others_judge:
        return Halves(calibration, None, pairs)
    held_out = _regrouped(make(others).without(set(calibration.keys)), _batching(inputs, preparation))
    return Halves(calibration, held_out, pairs)


def read_judging(network: Network, source: Source, seen: Feeds, preparation: Preparation = AS_USUAL) -> Feeds:
    """Read rows that judge, such as those of `--eval`: all but those that equal one of `seen`.

    Raises: BadInput: as `read_feeds`, or all rows are calibration rows.
    """
    inputs = takes(network)
    files = _array_files(source)
    if files is not None:
        found = array_feeds(inputs, files, str(source)).distinct()
    else:
        samples = distinct(_samples(inputs, source, preparation, judging=True))
        found = _maker(inputs, samples, preparation, _origin(source))(samples)
    return unseen(network, found, seen, preparation)


def unseen(network: Network, judging: Feeds, seen: Feeds, preparation: Preparation = AS_USUAL) -> Feeds:
    """Return the rows that judge without those that equal one of `seen`.

    Raises: BadInput: none of them is left.
    """
    found = _regrouped(judging.without(set(seen.keys)), _batching(takes(network), preparation))
    if len(found) < MIN_SAMPLES:
        log.warning("%s: %d rows judge, so that one of them is %.0f points", found.origin, len(found), 100 / len(found))
    return found


def feeds_of(
    model: nn.Module,
    given: Any,
    drawing: Drawing = DRAWN,
    *,
    batch_size: int = 32,
    names: Sequence[str] | None = None,
) -> Halves:
    """Read the batches of a torch module: a DataLoader, a generator, a list of dicts, tuples or tensors.

    An iterator is read once, and only until there are enough rows: shuffle what is sorted by class.
    Args: names: of the inputs in their order, for a forward that takes `*args`.
    Raises: BadInput: a batch does not fit the forward, or there are too few different samples.
    """
    most = drawing.samples + (most_held_out(drawing.samples) if drawing.held_out else 0)
    return _drawn(module_feeds(model, given, most=most, names=names), Batching(batch_size), drawing)


def check_runs(program: Program, feeds: Feeds) -> None:
    """Run a row of the largest shapes and one of the smallest: what a network cannot take is known before the work.

    Raises: BadInput: with the network's own words, and its inputs.
    """
    network = program.network
    inputs = takes(network)
    rows = inputs.rows or 1
    tried = [feeds.widest]
    if feeds.narrowest is not feeds.widest:
        tried.append(feeds.narrowest)
    for batch in tried:
        try:
            program({name: batch[name] if name in feeds.shared else batch[name][:rows] for name in inputs.ports})
        except BadInput as err:
            shapes = ", ".join(f"{name} {tuple(batch[name].shape)}" for name in inputs.ports)
            raise BadInput(
                f"{feeds.origin}: {network.source} does not run with {shapes}: {err} It takes {inputs}. Texts may be"
                " too long (--seq-len), recordings too short, or images of a size that it does not take (--image-size)."
            ) from err


def _array_files(source: Source) -> list[Path] | None:
    if not isinstance(source, str | PathLike):
        return None
    try:
        return array_files(Path(source))
    except OSError as err:
        raise BadInput(f"{source}: cannot be read: {err.strerror or err}. Check the path and its permissions.") from err


def _origin(source: Source) -> str:
    if source is None:
        return "the bundled samples"
    return str(source) if isinstance(source, str | PathLike) else "samples in memory"


def _batching(inputs: Takes, preparation: Preparation) -> Batching:
    return Batching(inputs.rows or preparation.batch_size, exact=inputs.rows is not None)


def _samples(inputs: Takes, source: Source, preparation: Preparation, *, judging: bool) -> tuple[Sample, ...]:
    if isinstance(source, str | PathLike):
        path = Path(source)
        if path.is_file() and path.suffix.lower() not in (*TEXT_EXTENSIONS, *ROW_EXTENSIONS):
            raise BadInput(
                f"{path}: cannot read {path.suffix or 'it'}. Possible: texts ({', '.join(TEXT_EXTENSIONS)}), a"
                f" folder of images or recordings, or every input by its name ({', '.join(ENDINGS)})."
                f" {inputs.as_arrays}"
            )
        columns = {"text_column": preparation.text_column, "label_column": preparation.label_column}
        return read_samples(path, **columns, pair_column=preparation.pair_column, judging=judging)
    if source is not None:
        return tuple(source)
    if not set(inputs.ports).isdisjoint(SOUND):
        raise BadInput(
            f"{inputs.source} hears recordings, and none are bundled. Give --calibration with a folder of them "
            f"({', '.join(SOUND_EXTENSIONS)}). {inputs.as_arrays}"
        )
    images = any(port.shape is not None and len(port.shape) == 4 for port in inputs.ports.values())
    return bundled_samples("image" if images else "text")


def _maker(
    inputs: Takes, samples: Sequence[Sample], preparation: Preparation, origin: str
) -> Callable[[Sequence[Sample]], Feeds]:
    """What makes feeds of samples; their kind is that of the first."""
    batching = _batching(inputs, preparation)
    if any(sample.image is not None for sample in samples):
        image = image_input(inputs)
        explicit = preparation.pixels is not None or preparation.image_size is not None
        processor = None if explicit else _loaded(preparation.preprocessor, inputs.source, load_processor)
        return lambda some: image_feeds(
            image,
            some,
            processor,
            pixels=preparation.pixels,
            size=preparation.image_size,
            batching=batching,
            origin=origin,
        )
    if any(sample.sound is not None for sample in samples):
        name = sound_input(inputs)
        extractor = _loaded(preparation.preprocessor, inputs.source, load_extractor)
        return lambda some: sound_feeds(inputs, name, some, extractor, batching=batching, origin=origin)
    text = text_inputs(inputs)
    tokenizer = _loaded(preparation.tokenizer, inputs.source, load_tokenizer)
    return lambda some: text_feeds(
        text,
        prompted(some, preparation.prompts),
        tokenizer,
        seq_len=preparation.seq_len,
        batching=batching,
        origin=origin,
        masks=preparation.masks,
    )


def _loaded(given: Any, source: str, load: Callable[[str | None, str], Any]) -> Any:
    """What is loaded already, or what is named, or lies beside the network."""
    return load(given, source) if given is None or isinstance(given, str) else given


def _drawn(feeds: Feeds, batching: Batching, drawing: Drawing) -> Halves:
    """Draw rows that are in memory already."""
    total = len(feeds)
    feeds = feeds.distinct()
    if len(feeds) < MIN_SAMPLES:
        kind = f"different samples among {total}" if total > len(feeds) else "calibration samples in all"
        raise too_few(len(feeds), f"{kind} from {feeds.origin}")
    rows = feeds.rows()
    shared = {name: feeds.batches[0][name] for name in feeds.shared}
    some, others = halves(len(rows), limit=drawing.samples, held_out=drawing.held_out, seed=drawing.seed)

    def made(part: Sequence[int]) -> Feeds:
        return grouped([rows[i] for i in part], [feeds.labels[i] for i in part], feeds.origin, batching, shared)

    return Halves(made(some), made(others) if others and not drawing.others_judge else None)


def _regrouped(feeds: Feeds, batching: Batching) -> Feeds:
    """The same rows in batches that the network takes, after some were left out."""
    if not batching.exact or all(rows_of(batch) == batching.size for batch in feeds.batches):
        return feeds
    shared = {name: feeds.batches[0][name] for name in feeds.shared}
    return grouped(feeds.rows(), feeds.labels, feeds.origin, batching, shared)
