"""The points at which latency is measured: batch sizes, and lengths of texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from optin_deploy.common.validation import whole_number
from optin_deploy.errors import BadInput

BLOCKS = 12
"""Blocks of a measurement: few enough for half a minute, enough for an interval (see `bootstrap_ci`)."""
AT_HINT = "Give positive whole numbers such as batch=8,seq=128."


@dataclass(frozen=True)
class Point:
    """A batch size and a length at which latency is measured."""

    batch: int = 1
    seq: int | None = None
    """Tokens; None = the calibration length. Images have their own size."""

    def __post_init__(self) -> None:
        for name, value in (("batch", self.batch), ("seq", self.seq)):
            if value is not None:
                whole_number(value, f"--at {name}=", 1, hint=AT_HINT)

    def __str__(self) -> str:
        """Write the point as it is typed on the command line."""
        return f"--at batch={self.batch}" + ("" if self.seq is None else f",seq={self.seq}")


def parse_point(text: str) -> Point:
    """Read `batch=8,seq=128`.

    Raises: BadInput: says which part is wrong.
    """
    values: dict[str, int] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in ("batch", "seq"):
            raise BadInput(f"--at {text!r}: {name!r} is not known; possible are batch and seq. {AT_HINT}")
        if name in values:
            raise BadInput(f"--at {text!r}: {name} is given twice. {AT_HINT} For two points, give --at twice.")
        try:
            values[name] = int(value)
        except ValueError as err:
            raise BadInput(f"--at {text!r}: {value!r} is no whole number. {AT_HINT}") from err
    return Point(**values)


def parse_points(texts: Sequence[str] | None) -> tuple[Point, ...]:
    """Every `--at`; none where none is given.

    Raises: BadInput: one cannot be read, or is there twice.
    """
    points = tuple(map(parse_point, texts or ()))
    check_different(points)
    return points


def check_different(points: Sequence[Point]) -> None:
    """Refuse a point that is given twice: it would be measured twice.

    Raises: BadInput.
    """
    twice = next((point for point in points if points.count(point) > 1), None)
    if twice is not None:
        raise BadInput(f"{twice} is given twice. Give each point once.")


def point_name(batch: int, seq_len: int | None) -> str:
    """`8 x 128`; the batch alone where there is no length."""
    return f"{batch}" if seq_len is None else f"{batch} x {seq_len}"
