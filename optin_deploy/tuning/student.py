"""A cut network that learns: its teacher, and the loss of a batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from optin_deploy.errors import BadInput
from optin_deploy.feeds.pooling import pooled_states
from optin_deploy.feeds.rows import Batch
from optin_deploy.network.graph import Network
from optin_deploy.network.learned import learned
from optin_deploy.network.module import NetworkModule
from optin_deploy.network.run import Program
from optin_deploy.network.weights import with_weights
from optin_deploy.pruning.ready import Ready
from optin_deploy.scoring.losses import output_distance
from optin_deploy.scoring.reading import Reading
from optin_deploy.scoring.subject import read_tokens

LEAST = 1e-12
"""Smallest size of an output that others are held against."""


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
        valid = read_tokens(batch)
        outputs = self.graph(**{name: batch[name] for name in self._inputs})
        found = self._reading.read(outputs, valid)
        loss = torch.zeros((), device=found.values.device)
        if self._distill:
            dense = self._dense(batch, loss.device)
            compared = dense if self.head is None else {name: dense[name] for name in self._reading.outputs}
            loss = loss + self._distill * distance(self._reading, compared, outputs, valid)
        logits = found.values.flatten(1) if self.head is None else self.head(features(outputs, self._reading, valid))
        if classes is not None and self._distill < 1:
            loss = loss + (1 - self._distill) * nn.functional.cross_entropy(logits, classes)
        return {"loss": loss, "logits": logits}

    def trained(self) -> Network:
        """Return the graph with the weights that it has now."""
        return with_weights(self.graph.network, self.graph.trained())

    def _dense(self, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        """What the dense network gives."""
        if device not in self._teacher:
            self._teacher[device] = Program(next(iter(self._teacher.values())).network, device=device)
        with torch.no_grad():
            return self._teacher[device]({name: batch[name] for name in self._inputs}).outputs


def check_trainable(ready: Ready, smaller: Network) -> None:
    """Make sure that a cut network can learn from the dense one on these rows.

    Raises: BadInput: it cannot; says why.
    """
    rows, reading, source = ready.rows.calibration, ready.subject.reading, smaller.source
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
        stored = f"weights of {', '.join(sorted(types))}" if types else "no weights of real numbers"
        raise BadInput(
            f"{source} has {stored}, in which small steps are lost. Fine-tune the model of a float32 network; `optin "
            "build --precision fp16` makes its file of 16 bits afterwards."
        )


def distance(
    reading: Reading, dense: Mapping[str, Tensor], outputs: Mapping[str, Tensor], valid: Tensor | None
) -> Tensor:
    """Return how far outputs are from the dense network's: what is compared by its own distance, a mean over the rows,
    and other outputs, of those that are given, as parts of their size."""
    apart = output_distance(reading.read(dense, valid), reading.read(outputs, valid).values)[0].mean()
    others = [
        (value - outputs[name]).square().sum() / value.square().sum().clamp(min=LEAST)
        for name, value in dense.items()
        if name not in reading.outputs and value.is_floating_point()
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
