"""Optimisation profiles: the batch sizes and lengths that an engine is built and tuned for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from optin_deploy.common.validation import INT32
from optin_deploy.errors import BadInput

Range = tuple[int, int, int]
"""Smallest, usual and largest size of one axis."""


@dataclass(frozen=True)
class Profile:
    """One profile: kernels are chosen for the usual size and work for every size between the other two."""

    batch: Range = (1, 8, 32)
    seq: Range = (16, 128, 512)
    """Tokens; images have their own size."""

    def __post_init__(self) -> None:
        for name, sizes in (("batch", self.batch), ("seq", self.seq)):
            if sizes[0] < 1 or list(sizes) != sorted(sizes) or sizes[2] > INT32:
                raise BadInput(f"--profile {name}={_text(sizes)}: give min, opt and max, rising, for example 1,8,32.")

    def up_to(self, longest: int | None) -> Profile:
        """The same, no longer than the model's position table."""
        if longest is None:
            return self
        low, usual, high = (min(tokens, longest) for tokens in self.seq)
        return Profile(self.batch, (low, usual, high))

    def corners(self) -> tuple[tuple[int, int], ...]:
        """(batch, tokens) at the smallest, usual and largest sizes."""
        return tuple(zip(self.batch, self.seq, strict=True))

    def holds(self, batch: int, tokens: int | None) -> bool:
        """Does a batch of this size, and length if it has one, lie inside?"""
        fits = self.batch[0] <= batch <= self.batch[2]
        return fits and (tokens is None or self.seq[0] <= tokens <= self.seq[2])

    def sized(self, shape: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Min, opt and max of a dynamic shape (-1 for the batch, then for the length)."""
        found = []
        for corner in self.corners():
            sizes = iter(corner)
            found.append(tuple(next(sizes) if size == -1 else size for size in shape))
        return tuple(found)

    def __str__(self) -> str:
        return f"batch={_text(self.batch)} seq={_text(self.seq)}"


def parse_profile(text: str) -> Profile:
    """Read `batch=1,8,32 seq=16,128,384`; one number stands for all three, what is left out has its default.

    Raises: BadInput.
    """
    given: dict[str, Range] = {}
    for part in text.split():
        name, _, sizes = part.partition("=")
        try:
            numbers = [int(size) for size in sizes.split(",")]
        except ValueError:
            numbers = []
        if name not in ("batch", "seq") or name in given or len(numbers) not in (1, 3):
            raise BadInput(f'--profile "{text}": give min, opt and max, as in "batch=1,8,32 seq=16,128,384".')
        low, usual, high = numbers * 3 if len(numbers) == 1 else numbers
        given[name] = (low, usual, high)
    if not given:
        raise BadInput('--profile is empty: give min, opt and max, as in "batch=1,8,32 seq=16,128,384".')
    return Profile(**given)


def _text(sizes: Sequence[int]) -> str:
    return ",".join(map(str, sizes))
