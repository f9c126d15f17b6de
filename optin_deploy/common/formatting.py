"""Numbers, names and lists as people read them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from optin_deploy.files.opening import short

NAME_LENGTH = 80
"""Longest name of a tensor or node that is printed whole."""
COUNTS = {"": 1.0, " k": 1e3, " M": 1e6, " G": 1e9, " T": 1e12, " P": 1e15}
"""Units of counts such as MACs, rising."""
BYTES = {name: 1024.0**power for power, name in enumerate((" bytes", " KiB", " MiB", " GiB", " TiB"))}
"""Units of sizes, rising."""


def milliseconds(value: float) -> str:
    """Three digits: 0.0912 ms, 20.3 ms, 1,230 ms."""
    return f"{figures(value)} ms"


def si(value: float) -> str:
    """A count with three digits: 22.6 M."""
    return _scaled(value, 1000, COUNTS)


def size(value: float) -> str:
    """Bytes with three digits: 86.1 MiB."""
    return _scaled(value, 1024, BYTES)


def _scaled(value: float, base: int, units: Collection[str]) -> str:
    """Write a value in the largest unit in which it is 1 or more after rounding."""
    *smaller, largest = units
    for unit in smaller:
        if float(f"{value:.3g}") < base:
            return f"{figures(value)}{unit}"
        value /= base
    return f"{figures(value)}{largest}"


def pair(dense: float, pruned: float, units: Mapping[str, float]) -> tuple[str, str]:
    """Two amounts in the largest unit in which the smaller one is 0.1 or more: 1.43 G and 0.86 G.

    Args: units: COUNTS or BYTES.
    """
    fitting = [name for name, unit in units.items() if min(dense, pruned) >= unit / 10]
    name = fitting[-1] if fitting else next(iter(units))
    return f"{dense / units[name]:.2f}{name}", f"{pruned / units[name]:.2f}{name}"


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
