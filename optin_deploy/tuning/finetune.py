"""Fine-tune a cut network on rows of one's own: towards its labels, and towards what the dense network gives.

transformers' Trainer does the work. What is trained is the graph itself, so that whatever was cut, merged or repaired
stays as it is; tables that are looked up, such as embeddings, are left alone.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from optin_deploy.common.progress import Progress, silent
from optin_deploy.cutting.proof import NotProven
from optin_deploy.errors import BadInput, MissingDependency
from optin_deploy.feeds.rows import MASK, READ, Feeds
from optin_deploy.feeds.text_feeds import ROLES
from optin_deploy.network.graph import Network
from optin_deploy.network.heads import with_classifier
from optin_deploy.network.run import Program
from optin_deploy.pruning.ready import Ready
from optin_deploy.quality.outputs import NetworkJudge, readouts
from optin_deploy.quality.quality import Quality
from optin_deploy.scoring.reading import Reading
from optin_deploy.tuning.classifier import classes_of, fitted, names_of
from optin_deploy.tuning.settings import Tuning
from optin_deploy.tuning.student import Student, check_trainable
from optin_deploy.tuning.trainer import train

log = logging.getLogger(__name__)
ALIKE = 1e-3
"""Most that what is written may differ from what was trained, as a part of the largest output."""


@dataclass(frozen=True, eq=False)
class Tuned:
    """A trained network, and what it is worth on rows that nothing learned from."""

    network: Network
    before: Quality
    """Quality of the cut network before; where classifiers were fitted, with one of its own, as the dense one has."""
    after: Quality
    dense: Network
    """The dense network, with its classifier where one was fitted."""
    names: tuple[str, ...] | None = None
    """Classes of a new classifier, in the order of its outputs; None: the network had its own."""


@dataclass(frozen=True, eq=False)
class Classes:
    """Classes that rows teach."""

    numbers: Tensor | None = None
    """Number of each row's class, (rows,); None: the rows have none, or the network puts out none."""
    names: tuple[str, ...] | None = None
    """Names of a new classifier's classes, in the order of its outputs; None: no new one is fitted."""


def check(ready: Ready, smaller: Network, tuning: Tuning) -> Classes:
    """Make sure, before the long work, that a network can learn from these rows.

    Returns: what `finetune` takes.
    Raises: BadInput: it cannot; says why. MissingDependency: accelerate is not installed.
    """
    rows, reading, source = ready.rows.calibration, ready.subject.reading, smaller.source
    if tuning.epochs and find_spec("accelerate") is None:
        raise MissingDependency("fine-tuning needs accelerate: pip install 'optin-deploy[finetune]'.")
    check_trainable(ready, smaller)
    _check_sizes(rows, source)
    labelled = any(label is not None for label in rows.labels)
    if not tuning.epochs and not (reading.kind == "embedding" and labelled):
        raise BadInput("--epochs 0 fits a classifier alone, to an embedder and labelled rows. Give --epochs 1.")
    if tuning.distill == 0 and not labelled:
        raise BadInput(f"--distill 0 learns from labels alone, and {rows.origin} has none. Leave --distill out.")
    if not labelled:
        return Classes()
    return _new_classes(ready) if reading.kind == "embedding" else Classes(_known_classes(ready, tuning))


def _check_sizes(rows: Feeds, source: str) -> None:
    """Make sure that rows can share a step: those with fewer tokens are padded, which a mask must tell.

    Raises: BadInput: an input has unequal sizes otherwise.
    """
    for name in rows.batches[0]:
        shapes = {batch[name].shape[1:] for batch in rows.batches}
        if len(shapes) == 1:
            continue
        if not all(MASK in batch for batch in rows.batches):
            raise BadInput(
                f"{source} takes no mask of padding, so that rows of unequal sizes cannot share a step: {name} has "
                f"{_listed(shapes)}. Give rows of one size."
            )
        tokens = all(batch[name].dim() == 2 or batch[name].shape[:2] == batch[MASK].shape for batch in rows.batches)
        if not tokens or len({shape[1:] for shape in shapes}) > 1:
            raise BadInput(
                f"{source} takes {name} of unequal sizes beside the tokens, so that rows cannot share a step: "
                f"{_listed(shapes)}. Give rows of one size."
            )


def _listed(shapes: set[torch.Size]) -> str:
    """A few of the shapes of a row."""
    found = [" x ".join(map(str, shape)) for shape in sorted(shapes)]
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def _new_classes(ready: Ready) -> Classes:
    """Classes of a classifier behind an embedder.

    Raises: BadInput: none can be put there, or the rows cannot teach it.
    """
    rows, held_out = ready.rows.calibration, ready.rows.held_out
    assert held_out is not None, "rows that judge were asked for"
    try:
        names = names_of([*rows.labels, *held_out.labels])
    except BadInput as err:
        raise BadInput(f"{rows.origin}: {err}") from err
    numbers = classes_of(rows, names, len(names))
    behind = [batch for batch in rows.batches if READ in batch]
    if any(bool(((batch[READ] == 0) & (batch.get(MASK, batch[READ] + 1) != 0)).any()) for batch in behind):
        raise BadInput(
            f"{rows.origin}: its labels ask for a classifier, and this embedding is of the tokens behind a prompt "
            "(include_prompt is false): a graph does not know where that ends. Give texts without labels, to learn "
            "from the dense outputs alone."
        )
    return Classes(numbers, names)


def finetune(
    ready: Ready,
    smaller: Network,
    tuning: Tuning,
    *,
    classes: Classes | None = None,
    scratch: Path | None = None,
    progress: Progress = silent,
) -> Tuned:
    """Train a cut network.

    Args:
        ready: the dense network with the rows that teach, and those that judge.
        smaller: the cut one.
        classes: what `check` found; None: it is asked here.
        scratch: folder in which the state of the training is kept, and gone on from; None: it is not kept.

    Raises: BadInput: see `check`. NonFiniteActivation, NotProven.
    """
    classes = check(ready, smaller, tuning) if classes is None else classes
    if classes.names is not None:
        return _with_classifier(ready, smaller, tuning, classes, scratch, progress)
    before = ready.quality_of(smaller)
    distill = 1.0 if classes.numbers is None else tuning.distill
    student = Student(smaller, ready.subject.program, ready.subject.reading, distill)
    train(student, ready, classes.numbers, tuning, scratch, progress)
    network = student.trained()
    return Tuned(network, before, ready.quality_of(network), ready.network)


def _with_classifier(
    ready: Ready, smaller: Network, tuning: Tuning, taught: Classes, scratch: Path | None, progress: Progress
) -> Tuned:
    """Train a cut embedder with a classifier of the classes that the labels name."""
    rows, held_out, reading = ready.rows.calibration, ready.rows.held_out, ready.subject.reading
    assert held_out is not None, "rows that judge were asked for"
    names, classes = taught.names, taught.numbers
    assert names is not None, "the rows name classes"
    assert classes is not None, "and each has one"
    mask = next((port.name for port in smaller.inputs if ROLES.get(port.name.partition(":")[0]) == MASK), None)

    def classifier(network: Network, head: tuple[Tensor, Tensor]) -> Network:
        return with_classifier(network, reading.output, reading.pooling, mask, head)

    dense = classifier(ready.network, fitted(ready.subject.program, reading, rows, classes, len(names)))
    logits = Reading(dense.outputs[0].name, "logits")
    judge = NetworkJudge(readouts(Program(dense), logits, held_out), held_out, names=names, strict=ready.strict)

    def worth(network: Network) -> Quality:
        return judge.compare(readouts(Program(network), Reading(network.outputs[0].name, "logits"), held_out))

    head = fitted(Program(smaller), reading, rows, classes, len(names))
    student = Student(smaller, ready.subject.program, reading, tuning.distill)
    student.head = nn.Linear(head[0].shape[1], len(names))
    with torch.no_grad():
        student.head.weight.copy_(head[0])
        student.head.bias.copy_(head[1])
    probed = classifier(smaller, head)
    _check_alike(probed, student, rows)
    before = worth(probed)
    if not tuning.epochs:
        return Tuned(probed, before, before, dense, names)
    train(student, ready, classes, tuning, scratch, progress)
    network = classifier(student.trained(), (student.head.weight.detach(), student.head.bias.detach()))
    _check_alike(network, student, rows)
    return Tuned(network, before, worth(network), dense, names)


def _check_alike(network: Network, student: Student, rows: Feeds) -> None:
    """Raises: NotProven: the graph with its classifier gives something else than what is trained."""
    for batch in (rows.batches[0], rows.batches[-1]):
        with torch.no_grad():
            wanted = student(**batch)["logits"]
            outputs = Program(network)({port.name: batch[port.name] for port in network.inputs}).outputs
        found = outputs[network.outputs[0].name]
        apart = float((wanted - found).abs().max() / wanted.abs().max().clamp(min=1))
        if not apart <= ALIKE:
            raise NotProven(f"{network.source}: the classifier's logits differ by {apart:.1e} from the trained ones.")


def _known_classes(ready: Ready, tuning: Tuning) -> Tensor | None:
    """Classes of the rows, (rows,); None, with a warning: the network puts out no class of a row.

    Raises: BadInput: a row has no class that the network knows, or it puts out none and nothing else teaches.
    """
    rows, reading = ready.rows.calibration, ready.subject.reading
    shape = ready.subject.structure.shapes.shape(reading.output)
    if reading.kind not in ("logits", "probabilities") or shape is None or len(shape) != 2:
        if tuning.distill == 0:
            raise BadInput(
                f"{rows.origin}: the network puts out no class of a row, and --distill 0. Leave --distill out."
            )
        log.warning("%s: the network puts out no class of a row: it learns from the dense outputs alone", rows.origin)
        return None
    return classes_of(rows, ready.names, int(shape[1]))
