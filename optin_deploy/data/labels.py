"""Labels of rows against what a network puts out: which class a label stands for, and what has no classes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn

from optin_deploy.errors import BadInput
from optin_deploy.files.opening import short


def classifies(model: nn.Module) -> bool:
    """Does the model put out a class, of a row or of each token, and not what its config calls a regression?"""
    config: Any = model.config
    several = getattr(config, "problem_type", None) != "regression" and config.num_labels > 1
    return "Classification" in type(model).__name__ and several


def class_number(label: str | float, names: Sequence[str] | None, count: int) -> int:
    """The output of a network that a label stands for.

    Args: names: of the classes, in their order; used where there are as many as outputs. count: of the outputs.
    Raises: BadInput: no such class.
    """
    if isinstance(label, float):
        if not label.is_integer():
            raise BadInput(f"the label {label} is no class.")
        label = int(label)
    if names is not None and len(names) != count:
        names = None
    if names is None and isinstance(label, str):
        raise BadInput(
            f"the label {label!r} is a name, and the order of the classes is not known: give their numbers (0 to"
            f" {count - 1}), or config.json with id2label beside the network."
        )
    return class_index(label, names or [f"class {i}" for i in range(count)])


def class_index(label: str | int | None, names: Sequence[str]) -> int:
    """The output that a label stands for: the class of that name, or of that number where names are no numbers.

    Args: names: of the classes, in their order.
    Raises: BadInput: no such class.
    """
    places = {name: index for index, name in enumerate(names)}
    shared = Counter(names)[str(label)]
    if shared > 1:
        raise BadInput(f"label {short(label)} is the name of {shared} classes of the model.")
    numbers = {int(found[1]): index for name, index in places.items() if (found := _WHOLE.fullmatch(name))}
    index = places.get(str(label))
    if index is None and isinstance(label, int):
        # Ratings 1.0 to 5.0 are read as 1 to 5. Where all names are numbers, a label that is none of them is no index.
        index = numbers.get(label) if len(numbers) == len(places) else label
    if index is None or not 0 <= index < len(names):
        known = ", ".join(list(places)[:10])
        more = "" if len(numbers) == len(places) else f"; or 0 to {len(names) - 1}"
        raise BadInput(f"label {short(label)} is not one of the model's ({known}{more}).")
    return index


_WHOLE = re.compile(r"\s*(-?(?:0|[1-9][0-9]{0,17}))(?:\.0)?\s*")
