"""Fine-tune a cut network on rows of one's own: towards its labels, and towards what the dense network gives.

transformers' Trainer does the work. What is trained is the graph itself, so that whatever was cut, merged or repaired
stays as it is; tables that are looked up, such as embeddings, are left alone.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optin_deploy.cutting.proof import NotProven
from optin_deploy.data.labels import class_index
from optin_deploy.data.ports import takes
from optin_deploy.data.rows import Batch, Feeds, Label
from optin_deploy.errors import BadInput, MissingDependency
from optin_deploy.jobs.pruning import Ready
from optin_deploy.judging import stacked
from optin_deploy.network.graph import Network
from optin_deploy.network.heads import LOGITS, with_classifier
from optin_deploy.network.learned import learned
from optin_deploy.network.module import NetworkModule
from optin_deploy.network.run import Program
from optin_deploy.network.weights import with_weights
from optin_deploy.network_quality import NetworkJudge, readouts
from optin_deploy.pooling import pooled_states
from optin_deploy.progress import Progress, silent
from optin_deploy.quality import Quality
from optin_deploy.scoring.losses import Readout, output_distance
from optin_deploy.scoring.reading import Reading
from optin_deploy.scoring.subject import valid_of
from optin_deploy.storage import sha256_json

log = logging.getLogger(__name__)

STEPS = 200
"""Training is saved so often, and goes on from there."""
PENALTY = 0.02
"""Of the squared weights of a classifier that is fitted to standardised features of all rows."""
ALIKE = 1e-3
"""Most that what is written may differ from what was trained, as a part of the largest output."""


@dataclass(frozen=True)
class Tuning:
    """How long and how fast, and what pulls."""

    epochs: float = 1.0
    """0: only a classifier is fitted, where the network has none."""
    learning_rate: float = 2e-5
    batch_size: int = 32
    distill: float = 0.5
    """Weight of the distance to the dense outputs; that of the labels is the rest. Without labels it is all."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.epochs <= 1000:
            raise BadInput(f"--epochs {self.epochs:g}: possible are 0 to 1000.")
        if not 0 < self.learning_rate < 1:
            raise BadInput(f"--learning-rate {self.learning_rate:g}: give a rate above 0 and below 1, such as 2e-5.")
        if self.batch_size < 1:
            raise BadInput(f"--batch-size {self.batch_size}: give 1 or more rows.")
        if not 0 <= self.distill <= 1:
            raise BadInput(f"--distill {self.distill:g}: possible are 0 (labels alone) to 1 (the dense outputs alone).")


@dataclass(frozen=True, eq=False)
class Tuned:
    """A trained network, and what it is worth on rows that nothing learned from."""

    network: Network
    before: Quality
    """Of the cut network; where a classifier was fitted, each has its own, also the dense one."""
    after: Quality
    names: tuple[str, ...] | None
    """Of the classes that the labels name; None: there are none."""


def finetune(
    ready: Ready, smaller: Network, tuning: Tuning, *, scratch: Path | None = None, progress: Progress = silent
) -> Tuned:
    """Train a cut network.

    Args:
        ready: the dense network with the rows that teach, and those that judge.
        smaller: the cut one.
        scratch: folder in which the state of the training is kept; None: it is not kept.

    Raises: BadInput: there is nothing to learn. MissingDependency: accelerate is not installed.
    """
    rows, held_out = ready.rows.calibration, ready.rows.held_out
    assert held_out is not None, "rows that judge were asked for"
    labelled = any(label is not None for label in rows.labels)
    if ready.subject.reading.kind == "embedding" and labelled:
        return _with_classifier(ready, smaller, tuning, scratch, progress)
    before = ready.quality_of(smaller)
    classes = _classes(rows.labels, ready.names) if labelled and _one_class(ready) else None
    if classes is None and (labelled or tuning.distill == 0):
        if tuning.distill == 0:
            raise BadInput(f"{rows.origin}: no class of a row to learn, and --distill 0. Leave out --distill.")
        log.warning("%s: the network puts out no class of a row: it learns from the dense outputs alone", rows.origin)
    distill = 1.0 if classes is None else tuning.distill
    student = Student(smaller, ready.subject.program, ready.subject.reading, distill)
    _train(student, rows, classes, tuning, scratch, progress)
    network = student.trained()
    return Tuned(network, before, ready.quality_of(network), ready.names)


class Student(nn.Module):
    """A network that learns, its teacher, and the loss of a batch, called as Trainer calls a model."""

    def __init__(self, network: Network, teacher: Program, reading: Reading, distill: float) -> None:
        """Args: teacher: the dense network. reading: what is compared. distill: see `Tuning`."""
        super().__init__()
        names = learned(network)
        if not names:
            raise BadInput(f"{network.source} has no weights of real numbers that could learn, such as quantised ones.")
        self.graph = NetworkModule(network, trained=names)
        self.head: nn.Linear | None = None
        self._reading, self._distill = reading, distill
        self._teacher = {teacher.device: teacher}
        self._inputs = [port.name for port in network.inputs]

    def forward(self, classes: Tensor | None = None, **batch: Tensor) -> dict[str, Tensor]:
        """Return the loss, and the logits where there are any.

        Args: classes: (rows,); None: no labels. batch: the network's inputs by name, and perhaps a mask.
        """
        valid = valid_of(batch)
        outputs = self.graph(**{name: batch[name] for name in self._inputs})
        found = self._reading.read(outputs, valid)
        loss = torch.zeros((), device=found.values.device)
        if self._distill:
            loss = loss + self._distill * self._distance(batch, valid, found)
        logits = found.values.flatten(1) if self.head is None else self.head(self.pooled(outputs, valid))
        if classes is not None and self._distill < 1:
            loss = loss + (1 - self._distill) * nn.functional.cross_entropy(logits, classes)
        return {"loss": loss, "logits": logits}

    def pooled(self, outputs: Mapping[str, Tensor], valid: Tensor | None) -> Tensor:
        """Return what a classifier reads, (rows, hidden)."""
        return features(outputs, self._reading, valid)

    def trained(self) -> Network:
        """Return the graph with the weights that it has now."""
        return with_weights(self.graph.network, self.graph.trained())

    def _distance(self, batch: Batch, valid: Tensor | None, found: Readout) -> Tensor:
        device = found.values.device
        if device not in self._teacher:
            self._teacher[device] = Program(next(iter(self._teacher.values())).network, device=device)
        with torch.no_grad():
            outputs = self._teacher[device]({name: batch[name] for name in self._inputs}).outputs
            wanted = self._reading.read(outputs, valid)
        return output_distance(wanted, found.values)[0].mean()


def features(outputs: Mapping[str, Tensor], reading: Reading, valid: Tensor | None) -> Tensor:
    """Return the states of an embedder as one vector a row, of whatever length, (rows, hidden)."""
    states = outputs[reading.output]
    if states.dim() == 2:
        return states
    if states.dim() != 3:
        raise BadInput(f"a classifier reads (batch, tokens, hidden); {reading.output} is {tuple(states.shape)}.")
    fits = valid is not None and valid.shape == states.shape[:2]
    real = valid.to(states) if fits and valid is not None else torch.ones(states.shape[:2]).to(states)
    return pooled_states(states, real, reading.pooling)


def _with_classifier(ready: Ready, smaller: Network, tuning: Tuning, scratch: Path | None, progress: Progress) -> Tuned:
    """The same of an embedder, which gets a classifier of the classes that the labels name."""
    rows, held_out, reading = ready.rows.calibration, ready.rows.held_out, ready.subject.reading
    assert held_out is not None, "rows that judge were asked for"
    names = _names(rows.labels)
    classes = _classes(rows.labels, names)
    dense_head = _fitted(ready.subject.program, reading, rows, classes, len(names))
    head = _fitted(Program(smaller), reading, rows, classes, len(names))
    dense = with_classifier(ready.network, reading.output, reading.pooling, *dense_head)
    probed = with_classifier(smaller, reading.output, reading.pooling, *head)
    logits = Reading(LOGITS, "logits")
    judge = NetworkJudge(readouts(Program(dense), logits, held_out), held_out, names=names, strict=True)
    before = judge.of(readouts(Program(probed), logits, held_out))
    if not tuning.epochs:
        return Tuned(probed, before, before, names)
    student = Student(smaller, ready.subject.program, reading, tuning.distill)
    student.head = nn.Linear(head[0].shape[1], len(names))
    with torch.no_grad():
        student.head.weight.copy_(head[0])
        student.head.bias.copy_(head[1])
    _train(student, rows, classes, tuning, scratch, progress)
    student.cpu().eval()
    learned_head = student.head.weight.detach(), student.head.bias.detach()
    network = with_classifier(student.trained(), reading.output, reading.pooling, *learned_head)
    _check_alike(network, student, rows)
    return Tuned(network, before, judge.of(readouts(Program(network), logits, held_out)), names)


def _check_alike(network: Network, student: Student, rows: Feeds) -> None:
    """Raises: NotProven: the graph with its classifier gives something else than what was trained."""
    batch = rows.batches[0]
    with torch.no_grad():
        wanted = student(**batch)["logits"]
        found = Program(network)({port.name: batch[port.name] for port in network.inputs}).outputs[LOGITS]
    apart = float((wanted - found).abs().max() / wanted.abs().max().clamp(min=1))
    if not apart <= ALIKE:
        raise NotProven(f"{network.source}: the classifier gives logits that differ by {apart:.1e} from trained ones.")


def _fitted(program: Program, reading: Reading, rows: Feeds, classes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """A logistic regression on standardised features, as matrix (classes, hidden) and bias (classes,)."""
    found = []
    for batch in rows.batches:
        with torch.inference_mode():
            outputs = program({port.name: batch[port.name] for port in program.network.inputs}).outputs
            found.append(features(outputs, reading, valid_of(batch)).float().cpu())
    read = torch.cat(found).clone()
    mean, scale = read.mean(0), read.std(0).clamp(min=1e-6)
    read = (read - mean) / scale
    weight = torch.zeros(count, read.shape[1], requires_grad=True)
    bias = torch.zeros(count, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = nn.functional.cross_entropy(read @ weight.T + bias, classes) + PENALTY / 2 * weight.square().sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    matrix = weight.detach() / scale
    return matrix, bias.detach() - matrix @ mean


def _one_class(ready: Ready) -> bool:
    """Whether the network puts out a class of each row."""
    reading = ready.subject.reading
    shape = ready.subject.structure.shapes.shape(reading.output)
    return reading.kind in ("logits", "probabilities") and shape is not None and len(shape) == 2


def _names(labels: Sequence[Label]) -> tuple[str, ...]:
    """Classes by the labels: whole numbers in their order, or words in that of the alphabet."""
    found = {label for label in labels if isinstance(label, str | int)}
    if len(found) < 2:
        raise BadInput(f"labels name {len(found)} classes: a classifier needs two or more.")
    return tuple(map(str, sorted(found, key=lambda label: (isinstance(label, str), label))))


def _classes(labels: Sequence[Label], names: Sequence[str] | None) -> Tensor:
    """Numbers of the classes, (rows,).

    Raises: BadInput: a row has none.
    """
    found = []
    for number, label in enumerate(labels):
        if not isinstance(label, str | int):
            raise BadInput(f"row {number} of those to learn from has no class. Label all rows, or none.")
        if names is None and isinstance(label, str):
            raise BadInput(f"the label {label!r} is a name, and the order of the classes is not known: give numbers.")
        found.append(class_index(label, names) if names is not None else int(label))
    return torch.tensor(found)


class _Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows one by one, as Trainer draws them."""

    def __init__(self, rows: Feeds, classes: Tensor | None) -> None:
        self._rows, self._classes = rows.rows(), classes

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        labels = {} if self._classes is None else {"classes": self._classes[place : place + 1]}
        return {**self._rows[place], **labels}


def _train(
    student: Student, rows: Feeds, classes: Tensor | None, tuning: Tuning, scratch: Path | None, progress: Progress
) -> None:
    """Let Trainer do it; a state that a killed run left is gone on from."""
    if not tuning.epochs:
        return
    if rows.shared:
        raise BadInput(f"inputs without an axis of samples ({', '.join(rows.shared)}) cannot be trained with.")
    if find_spec("accelerate") is None:
        raise MissingDependency("fine-tuning needs accelerate: pip install 'optin-deploy[finetune]'.")
    from transformers import PrinterCallback

    exact = takes(student.graph.network).rows
    with _state(scratch, sha256_json([asdict(tuning), rows.fingerprint, student.graph.network.source])) as folder:
        trainer = _trainer(student, rows, classes, replace(tuning, batch_size=exact or tuning.batch_size), folder)
        trainer.add_callback(_callback(progress))
        trainer.pop_callback(PrinterCallback)
        saved = folder is not None and any(folder.glob("checkpoint-*"))
        trainer.train(resume_from_checkpoint=saved or None)
    student.cpu().eval()
    if not all(bool(value.isfinite().all()) for value in student.parameters()):
        raise BadInput(f"--learning-rate {tuning.learning_rate:g} led to NaN or infinity. Give a lower one.")


def _trainer(student: Student, rows: Feeds, classes: Tensor | None, tuning: Tuning, folder: Path | None) -> Any:
    from transformers import Trainer, TrainingArguments

    def collated(some: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: stacked([row[name] for row in some]) for name in some[0]}

    arguments = TrainingArguments(
        output_dir=str(folder or "unused"),
        num_train_epochs=tuning.epochs,
        per_device_train_batch_size=tuning.batch_size,
        learning_rate=tuning.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=0.1,
        weight_decay=0.01,
        seed=tuning.seed % 2**32,
        save_strategy="no" if folder is None else "steps",
        save_steps=STEPS,
        save_total_limit=1,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_drop_last=takes(student.graph.network).rows is not None,
        use_cpu=not torch.cuda.is_available(),
    )
    return Trainer(model=student, args=arguments, train_dataset=_Rows(rows, classes), data_collator=collated)


def _callback(progress: Progress) -> Any:
    from transformers import TrainerCallback

    class Told(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            progress(state.global_step, state.max_steps)

    return Told()


@contextmanager
def _state(scratch: Path | None, key: str) -> Iterator[Path | None]:
    """A folder for the state of this very training, which goes when it has ended well."""
    if scratch is None:
        yield None
        return
    folder = scratch / key[:16]
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    shutil.rmtree(scratch)
