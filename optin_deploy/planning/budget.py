"""How much may stay: a share or an amount of MACs, of parameters, of bytes, or of several at once."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from dataclasses import dataclass
from numbers import Integral

from optin_deploy.common.arguments import checked, number
from optin_deploy.common.formatting import size
from optin_deploy.common.validation import parse_share
from optin_deploy.errors import BadInput, InfeasibleBudget

DEFAULT_FLOPS = 0.6
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
"""Shares of the MACs in a sweep, if nothing else is asked."""


@dataclass(frozen=True)
class Budget:
    """How much of one resource may stay."""

    limit: float
    relative: bool = True
    """True: limit is a share of what the dense model takes, in (0, 1]; False: an amount."""
    option: str = "--flops"
    """What the user calls it; amounts are bytes."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "limit", _plain(self.limit, self.option))
        if not math.isfinite(self.limit) or self.limit <= 0 or (self.relative and self.limit > 1):
            asked = "the share to keep, in (0, 1], for example 0.6" if self.relative else "a positive amount"
            raise BadInput(f"{self.option} {self.limit}: give {asked}.")

    def __str__(self) -> str:
        return f"{self.option} {self.limit:g}" if self.relative else f"{self.option} {size(self.limit)}"


def _plain(value: float, option: str) -> float:
    """Return the value as given if its type is Python's own, else the same value as a float.

    Raises: BadInput: no number.
    """
    found = number(value, option)
    if type(value) in (int, float):
        return value
    if isinstance(value, Integral):
        return int(found)
    with suppress(ValueError):  # a float32 of 0.6 was meant as 0.6
        return float(str(value))
    return found


@dataclass(frozen=True)
class TimeTarget:
    """How long one batch may take on the engine; measured, not calculated."""

    option: str
    """--latency, --speedup or --throughput."""
    value: float
    """Milliseconds for a batch at most; or times faster than dense, or samples a second, at least."""

    def __post_init__(self) -> None:
        least = 1 if self.option == "--speedup" else LEAST_TIME
        if not least < self.value < MOST_TIME:
            bounds = f"more than {least:g} and less than {MOST_TIME:g}"
            raise BadInput(f"{self}: give {bounds}, for example {TIME_EXAMPLES[self.option]}.")

    def __str__(self) -> str:
        return f"{self.option} {self.value:g}" + ("ms" if self.option == "--latency" else "")

    def limit_ms(self, dense_ms: float, batch: int) -> float:
        """Milliseconds that a batch may take where the dense model takes `dense_ms`."""
        allowed = {
            "--latency": self.value,
            "--speedup": dense_ms / self.value,
            "--throughput": 1000 * batch / self.value,
        }
        return allowed[self.option]

    def check_needed(self, dense_ms: float, batch: int, shown_ms: float | None = None) -> None:
        """Refuse a time that the dense model keeps.

        Args: shown_ms: what is said that it takes; default: `dense_ms`.
        Raises: InfeasibleBudget.
        """
        goal = self.limit_ms(dense_ms, batch)
        if goal >= dense_ms:
            raise InfeasibleBudget(
                f"{self} is {goal:.3g} ms a batch, and the dense model takes {shown_ms or dense_ms:.3g} ms already: "
                "nothing has to be cut for it. Ask for less time, or give another budget such as --flops."
            )


LEAST_TIME, MOST_TIME = 1e-6, 1e9
"""Bounds of milliseconds for a batch, a nanosecond and twelve days; --throughput and --speedup keep the same bounds as
numbers."""
MS_OF = {"us": 1e-3, "ms": 1.0, "s": 1e3}
TIME_EXAMPLES = {"--latency": "4.0ms", "--speedup": "2.0", "--throughput": "500"}


def parse_latency(text: str) -> float:
    """Milliseconds of `4.0ms`, `900us` or `0.5s`.

    Raises: BadInput.
    """
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(us|ms|s)", text.strip())
    if match is None:
        raise BadInput(f"--latency {text!r}: give a time such as 4.0ms, 900us or 0.5s.")
    return float(match[1]) * MS_OF[match[2]]


@dataclass(frozen=True)
class Limits:
    """What a user allows: budgets that must all hold, or a loss of quality; without any, 60% of the MACs."""

    flops: float | None = None
    """Share of the dense MACs, in (0, 1]."""
    params: float | None = None
    """Share of the dense parameters, in (0, 1]."""
    size: int | None = None
    """Bytes of all weights in float32."""
    max_drop: float | None = None
    """Points of the metric that may be lost, instead of a budget: the smallest such model is looked for."""
    time: TimeTarget | None = None
    """What is measured on the engine, at the first point."""

    def __post_init__(self) -> None:
        for name in ("flops", "params", "size", "max_drop"):
            if getattr(self, name) is not None:  # numbers of numpy become Python's: they are written as JSON
                object.__setattr__(self, name, _plain(getattr(self, name), f"--{name.replace('_', '-')}"))
        checked(self.time, TimeTarget, "time")
        given = any(limit is not None for limit in (self.flops, self.params, self.size, self.time))
        if self.max_drop is None:
            if not given:
                object.__setattr__(self, "flops", DEFAULT_FLOPS)
        elif given:
            raise BadInput("--max-drop finds the budget itself: leave out every other budget.")
        elif not 0 <= self.max_drop < 100:
            raise BadInput(f"--max-drop {self.max_drop}: give points to lose, 0 or more and under 100, such as 1.0.")
        self.budgets()  # what is impossible is refused at once

    def budgets(self) -> list[Budget]:
        """One for each limit.

        Raises: BadInput.
        """
        shares = (("--flops", self.flops), ("--params", self.params))
        found = [Budget(share, option=option) for option, share in shares if share is not None]
        return found if self.size is None else [*found, Budget(self.size, relative=False, option="--size")]

    def __str__(self) -> str:
        """Write the limits for names of folders: 0.6, params0.5, 60000000B."""
        parts = (
            "" if self.flops is None else f"{self.flops:g}",
            "" if self.params is None else f"params{self.params:g}",
            "" if self.size is None else f"{self.size}B",
            "" if self.max_drop is None else f"drop{self.max_drop:g}",
            "" if self.time is None else str(self.time).removeprefix("--").replace(" ", ""),
        )
        return "-".join(filter(None, parts))


def parse_shares(text: str | None) -> tuple[float, ...]:
    """Read shares of the MACs such as `0.8,0.6,0.4`.

    Raises: BadInput.
    """
    if text is None:
        return SHARES
    try:
        shares = tuple(dict.fromkeys(parse_share(part) for part in text.split(",")))
    except ValueError as err:
        raise BadInput(f"--flops {text!r}: give shares with commas between them, for example 0.8,0.6,0.4.") from err
    return tuple(Budget(share).limit for share in shares)


def check_tokens(share: float) -> None:
    """Refuse what is no share of the tokens.

    Raises: BadInput.
    """
    if not 0 < share <= 1:
        raise BadInput(f"--tokens {share:g}: give a share in (0, 1], such as 0.7.")
