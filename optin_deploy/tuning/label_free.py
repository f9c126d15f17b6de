"""Tune a cut network towards the dense one's outputs on rows without labels, for some minutes; what was killed goes on.

Some rows are held out, also from the repairs, as nearly every step comes nearer on rows that taught those. The weights
that came nearest to the dense outputs on them are kept, unless that may be chance.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from optin_deploy.common.progress import Progress, silent
from optin_deploy.errors import BadInput
from optin_deploy.feeds.ports import takes
from optin_deploy.feeds.rows import Batch, Batching, Feeds, grouped, rows_of
from optin_deploy.files.storage import read_tensors, write_tensors
from optin_deploy.network.graph import Network
from optin_deploy.network.learned import learned
from optin_deploy.network.module import NetworkModule
from optin_deploy.network.weights import with_weights
from optin_deploy.pruning.ready import Ready
from optin_deploy.quality.held_out import spread
from optin_deploy.scoring.subject import read_tokens
from optin_deploy.tuning.settings import LabelFree
from optin_deploy.tuning.student import check_trainable, distance

log = logging.getLogger(__name__)
HELD_OUT_EVERY = 8
"""Every eighth calibration row is held out, of a large set fewer."""
MOST_HELD_OUT = 512
"""Rows that are held out."""
JUDGED = 4
"""Batches of the held-out rows are so much smaller than those of a step: their differences tell what is chance."""
CERTAIN = 2.0
"""Standard errors that the nearest weights must be nearer by."""
LOOKS = 20
"""Times that the held-out rows are looked at, and the state is kept, in the course of a tuning."""
PATIENCE = 10
"""It ends after so many looks in a row that found nothing nearer; many, as most is gained while the rate falls."""
WARM_UP = 0.1
"""Part of a tuning in which the learning rate rises; then it falls as a cosine does."""
LEAST_SIZE = 1e-3
"""Weights are taken to be at least so large, as a root mean square, where steps are parts of their size."""
MOST_HELD = 2**29
"""Bytes of dense outputs that are kept; those of other batches are computed whenever they are needed."""
seconds_now = time.monotonic


@dataclass(frozen=True)
class LabelFreeRecord:
    """What a tuning did."""

    steps: int
    seconds: float
    rows: int
    """Rows that were learned from."""
    held_out: int
    """Rows that chose the weights that are kept; both are calibration rows."""
    before: float
    """Distance to the dense outputs on the held-out rows, of the cut network."""
    after: float
    """Distance of the weights that are kept: those of the beginning where none came nearer for certain."""


def check(ready: Ready, settings: LabelFree) -> None:
    """Make sure, before the network is cut, that it can be tuned on these rows.

    Raises: BadInput: it cannot be trained, there are too few rows, or it takes more at once than are learned from or
    held out; says why.
    """
    check_trainable(ready, ready.network)
    _divided(ready, ready.network, settings.batch_size)


def tune(
    ready: Ready, smaller: Network, settings: LabelFree, *, state: Path | None = None, progress: Progress = silent
) -> tuple[Network, LabelFreeRecord]:
    """Tune the learned weights of a cut network.

    Args: state: file in which what an unfinished tuning knows is kept, and gone on from; None: it is not kept.
    Raises: BadInput: the network cannot be trained; says why.
    """
    check_trainable(ready, smaller)
    learning, judging = _divided(ready, smaller, settings.batch_size)
    tuning = _Tuning(ready, smaller, settings, learning, judging)
    if state is not None and state.is_file():
        tuning.go_on(read_tensors(state, f"Delete {state}: the tuning then begins anew."))
        log.warning("the tuning goes on after step %d of an earlier run", tuning.step)
    while not tuning.ended:
        tuning.until_next_look(progress)
        if state is not None and not tuning.ended:
            write_tensors(state, tuning.known())
    before, after, better = tuning.distances[0], min(tuning.distances), tuning.better
    if not better:
        log.warning(
            "the tuning came no nearer for certain (%.4g to %.4g on %d held-out rows): the weights stay as they were. "
            "More calibration rows help, or fewer steps",
            *(before, after, len(judging)),
        )
    rows = len(learning), len(judging)
    record = LabelFreeRecord(tuning.step, round(tuning.seconds, 1), *rows, before, after if better else before)
    return (with_weights(smaller, tuning.nearest) if better else smaller), record


def without_held_out(ready: Ready) -> Ready:
    """The same network with the calibration rows that a tuning learns from, by which it is repaired before."""
    return ready.some(~_held_out(ready.rows.calibration))


def _held_out(rows: Feeds) -> Tensor:
    """Which rows are held out, (rows,); they are spread over all lengths.

    Raises: BadInput: too few rows.
    """
    if len(rows) < HELD_OUT_EVERY:
        raise BadInput(
            f"{len(rows)} calibration samples are too few to tune with: give at least {HELD_OUT_EVERY} (--samples), or "
            "leave --tune out."
        )
    return spread(len(rows), HELD_OUT_EVERY, MOST_HELD_OUT)


def _divided(ready: Ready, smaller: Network, batch_size: int) -> tuple[Feeds, Feeds]:
    """Calibration rows that are learned from, and those that are held out, in batches of rows of one shape."""
    rows, exact = ready.rows.calibration, takes(smaller).rows
    marks = _held_out(rows)

    def part(some: Tensor, size: int) -> Feeds:
        kept = rows.kept(some.tolist())
        return grouped(kept.rows(), kept.labels, kept.origin, Batching(exact or size, exact is not None))

    return part(~marks, batch_size), part(marks, max(1, batch_size // JUDGED))


class _Tuning:
    """The loop, and all that it knows between two looks at the held-out rows."""

    def __init__(self, ready: Ready, smaller: Network, settings: LabelFree, learning: Feeds, judging: Feeds) -> None:
        self._ready, self._settings = ready, settings
        self._learning, self._judging = learning.batches, judging.batches
        self._student = NetworkModule(smaller, trained=learned(smaller))
        self._parameters = list(self._student.parameters())
        # Repaired weights are of very different sizes, and a step of one size for all makes the outputs worse.
        groups = [{"params": [each], "size": _size(each)} for each in self._parameters]
        self._optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0)
        self._dense: dict[int, dict[str, Tensor]] = {}
        self._room = MOST_HELD
        self.step, self.seconds, self.distances = 0, 0.0, list[float]()
        self.nearest: dict[str, Tensor] = {}
        rows = torch.tensor([rows_of(batch) for batch in self._judging], dtype=torch.float64)
        self._shares = rows / rows.sum()
        self._first = self._best = self._look()

    @property
    def done(self) -> float:
        """Part of the tuning that is behind us, from 0 to 1."""
        steps = self._settings.steps
        in_time = self.seconds / (60 * self._settings.minutes)
        return min(1.0, in_time if steps is None or in_time >= 1 else self.step / steps)

    @property
    def ended(self) -> bool:
        """Is there nothing left to do?"""
        return self.done >= 1 or len(self.distances) - 1 - self.distances.index(min(self.distances)) >= PATIENCE

    def until_next_look(self, progress: Progress) -> None:
        """Take steps, then look at the held-out rows."""
        begun = seconds_now() - self.seconds
        until = (math.floor(self.done * LOOKS) + 1) / LOOKS
        while self.done < min(1, until):
            self._learn()
            self.seconds = seconds_now() - begun
            progress(round(100 * self.done), 100)
        self._look()
        self.seconds = seconds_now() - begun

    @property
    def better(self) -> bool:
        """Whether the nearest weights are nearer than those of the beginning, by more than chance: batch by batch."""
        gains = self._first - self._best
        mean = float(self._shares @ gains)
        error = float((self._shares.square() @ (gains - mean).square()).sqrt())
        return mean > CERTAIN * error

    def known(self) -> dict[str, Tensor]:
        """Return what `go_on` needs."""
        moments = self._optimizer.state_dict()["state"]
        return {
            "progress": torch.tensor([self.step, self.seconds, *self.distances], dtype=torch.float64),
            "judged": self._best,
            **{f"nearest {name}": value for name, value in self.nearest.items()},
            **{f"weights {name}": value for name, value in self._student.trained().items()},
            **{f"{place} {name}": value for place, each in moments.items() for name, value in each.items()},
        }

    def go_on(self, known: Mapping[str, Tensor]) -> None:
        """Be where another one was."""
        step, self.seconds, *self.distances = known["progress"].tolist()
        self.step, self._best = int(step), known["judged"]
        self.nearest = {name: known[f"nearest {name}"] for name in self.nearest}
        with torch.no_grad():
            for name, value in self._student.trained().items():
                value.copy_(known[f"weights {name}"])
        places = {place: f"{place} " for place in range(len(self._parameters))}
        moments = {
            place: {name.removeprefix(start): value for name, value in known.items() if name.startswith(start)}
            for place, start in places.items()
        }
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": moments})

    def _learn(self) -> None:
        """Take one step; each epoch has an order of its own."""
        epoch, place = divmod(self.step, len(self._learning))
        drawn = torch.Generator().manual_seed(self._ready.seed + epoch)
        order = torch.randperm(len(self._learning), generator=drawn)
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.learning_rate * group["size"] * _rate(self.done)
        self._optimizer.zero_grad()
        self._distance(self._learning[int(order[place])]).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self.step += 1

    def _look(self) -> Tensor:
        """Measure the distance on each batch of the held-out rows, (batches,), and keep the nearest weights."""
        with torch.no_grad():
            found = torch.tensor([float(self._distance(batch)) for batch in self._judging], dtype=torch.float64)
        now = float(self._shares @ found)
        if not self.distances or now < min(self.distances):
            self.nearest = {name: value.clone() for name, value in self._student.trained().items()}
            self._best = found
        self.distances.append(now if math.isfinite(now) else math.inf)
        return found

    def _distance(self, batch: Batch) -> Tensor:
        """How far the student's outputs are from the dense ones."""
        subject = self._ready.subject
        outputs = self._student(**subject.fed(batch))
        return distance(subject.reading, self._taught(batch), outputs, read_tokens(batch))

    def _taught(self, batch: Batch) -> dict[str, Tensor]:
        """The dense outputs; they are kept as long as there is room."""
        if id(batch) in self._dense:
            return self._dense[id(batch)]
        with torch.no_grad():
            dense = self._ready.subject.run(batch).outputs
        size = sum(value.nbytes for value in dense.values())
        if size <= self._room:
            self._dense[id(batch)] = dense
            self._room -= size
        return dense


def _size(weight: Tensor) -> float:
    """Root mean square of the entries."""
    return max(LEAST_SIZE, float(weight.detach().square().mean().sqrt()))


def _rate(done: float) -> float:
    """Part of the highest learning rate."""
    return min(1.0, (done + 1e-3) / WARM_UP) * (1 + math.cos(math.pi * done)) / 2
