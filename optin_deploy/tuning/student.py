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
from optin_deploy.scoring.losses import Readout, output_distance
from optin_deploy.scoring.reading import Reading
from optin_deploy.scoring.subject import valid_of

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
        valid = valid_of(batch)
        outputs = self.graph(**{name: batch[name] for name in self._inputs})
        found = self._reading.read(outputs, valid)
        loss = torch.zeros((), device=found.values.device)
        if self._distill:
            loss = loss + self._distill * self._distance(batch, valid, found, outputs)
        logits = found.values.flatten(1) if self.head is None else self.head(features(outputs, self._reading, valid))
        if classes is not None and self._distill < 1:
            loss = loss + (1 - self._distill) * nn.functional.cross_entropy(logits, classes)
        return {"loss": loss, "logits": logits}

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
