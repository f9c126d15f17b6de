"""Classes that labels name, and a logistic regression on the states of an embedder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from optin_deploy.data.labels import class_number
from optin_deploy.data.targets import Role
from optin_deploy.errors import BadInput
from optin_deploy.feeds.rows import Feeds, Label
from optin_deploy.files.opening import short
from optin_deploy.network.run import Program
from optin_deploy.scoring.reading import Reading
from optin_deploy.scoring.subject import read_tokens
from optin_deploy.tuning.student import features

PENALTY = 0.02
"""Weight of the squared entries of a classifier that is fitted to standardised features."""
WITHOUT = "Give rows with one class each, or texts or images without labels, to learn from the dense outputs alone."
"""How an embedder is fine-tuned with classes and without."""


def fitted(program: Program, reading: Reading, rows: Feeds, classes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """A logistic regression on standardised features, as matrix (classes, hidden) and bias (classes,)."""
    found = []
    for batch in rows.batches:
        with torch.inference_mode():
            outputs = program({port.name: batch[port.name] for port in program.network.inputs}).outputs
            found.append(features(outputs, reading, read_tokens(batch)).float().cpu())
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


def names_of(labels: Sequence[Label]) -> tuple[str, ...]:
    """Classes by the labels: whole numbers in their order, or words in that of the alphabet.

    A number stands for the class of its name, so that 1, 1.0 and "1" are one class.
    Raises: BadInput: they name fewer than two, or are something else than classes.
    """
    found: set[str | int] = set()
    for label in labels:
        if isinstance(label, float) and label.is_integer():
            found.add(int(label))
        elif isinstance(label, str | int):
            found.add(label)
        elif label is not None:
            what = "what searches should find" if isinstance(label, Role) else short(label)
            raise BadInput(f"a row's label is {what}: such rows teach no classes. {WITHOUT}")
    ordered = sorted(found, key=lambda label: (isinstance(label, str), label))
    names = tuple(dict.fromkeys(map(str, ordered)))
    if len(names) < 2:
        raise BadInput(f"labels name {len(names)} classes: a classifier needs two or more. {WITHOUT}")
    return names


def classes_of(rows: Feeds, names: Sequence[str] | None, count: int) -> Tensor:
    """Numbers of the classes, (rows,).

    Raises: BadInput: a row has none, or the network does not know it.
    """
    found = []
    for label in rows.labels:
        if not isinstance(label, str | int | float):
            raise BadInput(f"{rows.origin}: a row to learn from has no class, but {label!r}. Label all rows, or none.")
        try:
            found.append(class_number(label, names, count))
        except BadInput as err:
            raise BadInput(f"{rows.origin}: {err}") from err
    return torch.tensor(found)
