"""Fine-tune a cut network on rows of one's own: towards its labels, and towards what the dense network gives.

transformers' Trainer does the work. What is trained is the graph itself, so that whatever was cut, merged or repaired
stays as it is; tables that are looked up, such as embeddings, are left alone.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from optin_deploy.cutting.proof import NotProven
from optin_deploy.data.labels import class_index
from optin_deploy.data.ports import takes
from optin_deploy.data.rows import MASK, Batch, Feeds, Label
from optin_deploy.data.text_feeds import ROLES
from optin_deploy.errors import BadInput, MissingDependency
from optin_deploy.jobs.pruning import Ready
from optin_deploy.judging import stacked
from optin_deploy.network.graph import Network
from optin_deploy.network.hashing import network_hash
from optin_deploy.network.heads import with_classifier
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
from optin_deploy.storage import sha256_json, sha256_tensors

log = logging.getLogger(__name__)

STEPS = 200
"""The state of a training is kept after so many steps."""
PENALTY = 0.02
"""Weight of the squared entries of a classifier that is fitted to standardised features."""
LEAST = 1e-12
"""Smallest size of an output that others are held against."""
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
    """Quality of the cut network before; where classifiers were fitted, with one of its own, as the dense one has."""
    after: Quality
    dense: Network
    """The dense network, with its classifier where one was fitted."""
    names: tuple[str, ...] | None = None
    """Classes of a new classifier, in the order of its outputs; None: the network had its own."""


def check(ready: Ready, smaller: Network, tuning: Tuning) -> None:
    """Make sure, before the long work, that a network can learn from these rows.

    Raises: BadInput: it cannot; says why. MissingDependency: accelerate is not installed.
    """
    rows, reading, source = ready.rows.calibration, ready.subject.reading, smaller.source
    if tuning.epochs and find_spec("accelerate") is None:
        raise MissingDependency("fine-tuning needs accelerate: pip install 'optin-deploy[finetune]'.")
    missing = {*reading.outputs} - {port.name for port in smaller.outputs}
    if missing:
        raise BadInput(
            f"{source} does not give {', '.join(sorted(missing))}, which is compared with the dense network: it has a "
            "classifier of an earlier fine-tuning. Fine-tune from the folder that it was made of."
        )
    if rows.shared:
        raise BadInput(f"inputs without an axis of samples ({', '.join(rows.shared)}) cannot be trained with.")
    types = {str(smaller.weights[name].dtype) for name in learned(smaller)} - {"FLOAT", "DOUBLE"}
    if types or not learned(smaller):
        told = f"weights of {', '.join(sorted(types))}" if types else "no weights of real numbers"
        raise BadInput(
            f"{source} has {told}, in which small steps are lost. Fine-tune the model of a float32 network; `optin "
            "build --precision fp16` makes its file of 16 bits afterwards."
        )
    shapes = {tuple(value.shape[1:] for value in row.values()) for row in rows.rows()}
    if len(shapes) > 1 and not any(MASK in batch for batch in rows.batches):
        raise BadInput(f"{source} takes no mask of padding, so that rows of unequal sizes cannot share a step.")
    labelled = any(label is not None for label in rows.labels)
    if not tuning.epochs and not (reading.kind == "embedding" and labelled):
        raise BadInput("--epochs 0 fits a classifier alone, to an embedder and labelled rows. Give --epochs 1.")
    if tuning.distill == 0 and not labelled:
        raise BadInput(f"--distill 0 learns from labels alone, and {rows.origin} has none. Leave --distill out.")


def finetune(
    ready: Ready, smaller: Network, tuning: Tuning, *, scratch: Path | None = None, progress: Progress = silent
) -> Tuned:
    """Train a cut network.

    Args:
        ready: the dense network with the rows that teach, and those that judge.
        smaller: the cut one.
        scratch: folder in which the state of the training is kept, and gone on from; None: it is not kept.

    Raises: BadInput: see `check`. NonFiniteActivation, NotProven.
    """
    check(ready, smaller, tuning)
    rows = ready.rows.calibration
    labelled = any(label is not None for label in rows.labels)
    if ready.subject.reading.kind == "embedding" and labelled:
        return _with_classifier(ready, smaller, tuning, scratch, progress)
    before = ready.quality_of(smaller)
    classes = _known_classes(ready) if labelled else None
    if classes is None and tuning.distill == 0:
        raise BadInput(f"{rows.origin}: the network puts out no class of a row, and --distill 0. Leave --distill out.")
    distill = 1.0 if classes is None else tuning.distill
    student = Student(smaller, ready.subject.program, ready.subject.reading, distill)
    _train(student, ready, classes, tuning, scratch, progress)
    network = student.trained()
    return Tuned(network, before, ready.quality_of(network), ready.network)


class Student(nn.Module):
    """A network that learns, its teacher, and the loss of a batch, called as Trainer calls a model."""

    def __init__(self, network: Network, teacher: Program, reading: Reading, distill: float) -> None:
        """Args: teacher: the dense network. reading: what is compared. distill: see `Tuning`."""
        super().__init__()
        self.graph = NetworkModule(network, trained=learned(network))
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
            loss = loss + self._distill * self._distance(batch, valid, found, outputs)
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

    def _distance(self, batch: Batch, valid: Tensor | None, found: Readout, outputs: Mapping[str, Tensor]) -> Tensor:
        """Distance of what is compared to the dense network's, and of its other outputs, as parts of their size."""
        device = found.values.device
        if device not in self._teacher:
            self._teacher[device] = Program(next(iter(self._teacher.values())).network, device=device)
        with torch.no_grad():
            dense = self._teacher[device]({name: batch[name] for name in self._inputs}).outputs
            wanted = self._reading.read(dense, valid)
        apart = output_distance(wanted, found.values)[0].mean()
        others = [
            (value - outputs[name]).square().sum() / value.square().sum().clamp(min=LEAST)
            for name, value in dense.items()
            if self.head is None and name not in self._reading.outputs and value.is_floating_point()
        ]
        return apart + torch.stack(others).mean() if others else apart


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
    """Train a cut embedder with a classifier of the classes that the labels name."""
    rows, held_out, reading = ready.rows.calibration, ready.rows.held_out, ready.subject.reading
    assert held_out is not None, "rows that judge were asked for"
    names = _names([*rows.labels, *held_out.labels])
    classes = _classes(rows, names, len(names))
    mask = next((port.name for port in smaller.inputs if ROLES.get(port.name.partition(":")[0]) == MASK), None)

    def classifier(network: Network, head: tuple[Tensor, Tensor]) -> Network:
        return with_classifier(network, reading.output, reading.pooling, mask, head)

    dense = classifier(ready.network, _fitted(ready.subject.program, reading, rows, classes, len(names)))
    logits = Reading(dense.outputs[0].name, "logits")
    judge = NetworkJudge(readouts(Program(dense), logits, held_out), held_out, names=names, strict=ready.strict)

    def worth(network: Network) -> Quality:
        return judge.of(readouts(Program(network), Reading(network.outputs[0].name, "logits"), held_out))

    head = _fitted(Program(smaller), reading, rows, classes, len(names))
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
    _train(student, ready, classes, tuning, scratch, progress)
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


def _known_classes(ready: Ready) -> Tensor | None:
    """Classes of the rows, (rows,); None, with a warning: the network puts out no class of a row."""
    rows, reading = ready.rows.calibration, ready.subject.reading
    shape = ready.subject.structure.shapes.shape(reading.output)
    if reading.kind not in ("logits", "probabilities") or shape is None or len(shape) != 2:
        log.warning("%s: the network puts out no class of a row: it learns from the dense outputs alone", rows.origin)
        return None
    return _classes(rows, ready.names, int(shape[1]))


def _names(labels: Sequence[Label]) -> tuple[str, ...]:
    """Classes by the labels: whole numbers in their order, or words in that of the alphabet."""
    found = {label for label in labels if isinstance(label, str | int)}
    if len(found) < 2:
        raise BadInput(f"labels name {len(found)} classes: a classifier needs two or more.")
    return tuple(map(str, sorted(found, key=lambda label: (isinstance(label, str), label))))


def _classes(rows: Feeds, names: Sequence[str] | None, count: int) -> Tensor:
    """Numbers of the classes, (rows,).

    Raises: BadInput: a row has none, or the network does not know it.
    """
    found = []
    for label in rows.labels:
        whole = int(label) if isinstance(label, float) and label.is_integer() else label
        if not isinstance(whole, str | int):
            raise BadInput(f"{rows.origin}: a row to learn from has no class, but {label!r}. Label all rows, or none.")
        if names is None and isinstance(whole, str):
            raise BadInput(f"the label {whole!r} is a name, and the order of the classes is not known: give numbers.")
        number = class_index(whole, names) if names is not None else int(whole)
        if not 0 <= number < count:
            raise BadInput(f"{rows.origin}: the label {label!r} is class {number}; the network knows 0 to {count - 1}.")
        found.append(number)
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
    student: Student, ready: Ready, classes: Tensor | None, tuning: Tuning, scratch: Path | None, progress: Progress
) -> None:
    """Let Trainer do it; the state that a killed run of the very same training left is gone on from."""
    from transformers import PrinterCallback

    rows, network = ready.rows.calibration, student.graph.network
    labels = {} if classes is None else {"classes": classes}
    key = [asdict(tuning), ready.key, rows.fingerprint, network_hash(network), sha256_tensors(labels)]
    key += [sha256_tensors(student.state_dict()), version("torch"), version("transformers")]
    exact = takes(network).rows
    with TemporaryDirectory() as nowhere:
        folder = Path(nowhere) if scratch is None else scratch / sha256_json(key)[:16]
        folder.mkdir(parents=True, exist_ok=True)
        how = replace(tuning, batch_size=exact or tuning.batch_size)
        trainer = _trainer(
            student, _Rows(rows, classes), how, folder, kept=scratch is not None, exact=exact is not None
        )
        trainer.add_callback(_callback(progress))
        trainer.pop_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=_newest(folder))
    student.cpu().eval()
    if not all(bool(value.isfinite().all()) for value in student.parameters()):
        raise BadInput(f"--learning-rate {tuning.learning_rate:g} led to NaN or infinity. Give a lower one.")


def _newest(folder: Path) -> str | None:
    """The newest state that was written whole; what a killed run left half is removed."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if (path / "trainer_state.json").is_file():  # is written last
            return str(path)
        shutil.rmtree(path)
    return None


def _trainer(student: Student, rows: _Rows, tuning: Tuning, folder: Path, *, kept: bool, exact: bool) -> Any:
    from transformers import Trainer, TrainingArguments

    def collated(some: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: stacked([row[name] for row in some]) for name in some[0]}

    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=tuning.epochs,
        per_device_train_batch_size=tuning.batch_size,
        learning_rate=tuning.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=0.1,
        weight_decay=0.01,
        seed=tuning.seed % 2**32,
        save_strategy="steps" if kept else "no",
        save_steps=STEPS,
        save_total_limit=1,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_drop_last=exact,
        use_cpu=not torch.cuda.is_available(),
    )
    return Trainer(model=student, args=arguments, train_dataset=rows, data_collator=collated)


def _callback(progress: Progress) -> Any:
    from transformers import TrainerCallback

    class Told(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            progress(state.global_step, state.max_steps)

    return Told()
