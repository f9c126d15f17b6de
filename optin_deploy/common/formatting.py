"""Numbers, names and lists as people read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from optin_deploy.files.opening import short

NAME_LENGTH = 80
"""Longest name of a tensor or node that is printed whole."""


def milliseconds(value: float) -> str:
    """Three digits: 0.0912 ms, 20.3 ms, 1,230 ms."""
    return f"{figures(value)} ms"


def si(value: float) -> str:
    """A count with three digits: 22.6 M."""
    return _scaled(value, 1000, ("", " k", " M", " G", " T", " P"))


def size(value: float) -> str:
    """Bytes with three digits: 86.1 MiB."""
    return _scaled(value, 1024, (" bytes", " KiB", " MiB", " GiB", " TiB"))


def _scaled(value: float, base: int, units: Sequence[str]) -> str:
    """Write a value in the largest unit in which it is 1 or more after rounding."""
    for unit in units[:-1]:
        if float(f"{value:.3g}") < base:
            return f"{figures(value)}{unit}"
        value /= base
    return f"{figures(value)}{units[-1]}"


def figures(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, never as 1.2e+03; very small ones as 1.2e-10."""
    rounded = float(f"{value:.{digits}g}")
    exponent = int(f"{rounded:e}".split("e")[1])
    if rounded and exponent < -4:
        return f"{value:.{digits - 1}e}"
    return f"{rounded:,.{max(0, digits - 1 - exponent)}f}"


def named(text: str) -> str:
    """A name out of a foreign file, quoted, of bounded length and without control characters."""
    return short(text, NAME_LENGTH)


def plain(text: str) -> str:
    """Text of a foreign file or tool without terminal codes."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def listed(items: Iterable[str], limit: int = 5) -> str:
    """The first few items with commas, and how many more there are."""
    every = list(items)
    more = f" and {len(every) - limit} more" if len(every) > limit else ""
    return ", ".join(every[:limit]) + more
