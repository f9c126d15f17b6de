"""pytest plugin: the fixture `latency_regression` fails a test whose artifact is slower than its baseline allows.

def test_the_new_model_is_as_fast(latency_regression):
    latency_regression("new/model.onnx", baseline="baseline.json", max_ratio=1.05)

It holds no asserts for pytest to rewrite: PYTEST_DONT_REWRITE, so that importing it first is no warning.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from optin_deploy.errors import BadInput, GateFailed, OptinError, TooUnstable

if TYPE_CHECKING:
    from optin_deploy.measuring.gate import Gate

MARKER = "latency_regression"
STRICT = "--latency-strict"
BASELINE, MAX_RATIO = "baseline.json", 1.05
"""What is compared with, and the limit, where neither the call nor the marker says so."""
KINDS: Mapping[str, tuple[Any, str]] = {
    "candidate": (str | PathLike, 'a path such as "new/model.onnx"'),
    "baseline": (str | PathLike, 'a path such as "baseline.json"'),
    "max_ratio": (Real, "a number such as max_ratio=1.05"),
    "min_speedup": (Real, "a number such as min_speedup=1.5"),
    "at": (str | list | tuple, 'a text such as at="batch=1,seq=128", or a list of them'),
    "engine": (str, 'a text such as engine="onnx"'),
    "precision": (str, 'a text such as precision="fp32"'),
    "threads": (Integral, "a whole number such as threads=1"),
}
"""What each setting may be, and an example of it."""
SETTINGS = tuple(name for name in KINDS if name != "candidate")
"""What the marker may set."""


class LatencyWarning(UserWarning):
    """The limit lies within the measured interval: neither held nor missed."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --latency-strict."""
    text = "Latency regressions: fail also where the limit lies in the interval, or the machine is too unstable."
    parser.getgroup("optin-deploy").addoption(STRICT, action="store_true", help=text)


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    text = (
        f"{MARKER}(baseline='{BASELINE}', max_ratio={MAX_RATIO}): defaults of the fixture {MARKER}; "
        f"possible: {', '.join(SETTINGS)}."
    )
    config.addinivalue_line("markers", text)


@pytest.fixture
def latency_regression(request: pytest.FixtureRequest) -> Callable[..., Gate]:
    """Measure a candidate beside its baseline, here and now; paths are relative to the test's own folder.

    Called as `latency_regression(candidate, baseline="baseline.json", max_ratio=1.05)`, or with `min_speedup=1.5`;
    also `at="batch=1,seq=128"` or several of these, `engine`, `precision` and `threads`. What the call leaves out comes
    from the marker of the same name, then from the pin. A missed limit fails the test, an undecided one warns, and a
    machine that is too unstable skips it; with --latency-strict these two fail as well.
    """
    marker = request.node.get_closest_marker(MARKER)
    strict: bool = request.config.getoption(STRICT)

    def check(candidate: str | Path, baseline: str | Path | None = None, **settings: Any) -> Gate:
        __tracebackhide__ = True
        given = settings if baseline is None else {**settings, "baseline": baseline}
        try:
            found = _measure(request.path.parent, candidate, _merged(marker, given))
            found.check(strict=strict)
        except TooUnstable as err:
            if not strict:
                pytest.skip(str(err))
            pytest.fail(str(err), pytrace=False)
        except OptinError as err:
            pytest.fail(str(err) if isinstance(err, GateFailed) else f"{MARKER}: {err}", pytrace=False)
        if found.outcome == "straddles":
            warnings.warn(LatencyWarning(found.sentence), stacklevel=2)
        return found

    return check


def _merged(marker: pytest.Mark | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The call's settings over the marker's; a limit in either form replaces the other.

    Raises: BadInput: an unknown name.
    """
    marked = {} if marker is None else dict(marker.kwargs)
    unknown = sorted({*marked, *given} - {*SETTINGS})
    if unknown or (marker is not None and marker.args):
        wrong = ", ".join(unknown) or "a setting without a name"
        raise BadInput(f"unknown: {wrong}; possible: {', '.join(f'{name}=' for name in SETTINGS)}.")
    if "max_ratio" in given or "min_speedup" in given:
        marked = {name: value for name, value in marked.items() if name not in ("max_ratio", "min_speedup")}
    merged = {**marked, **given}
    return merged if "max_ratio" in merged or "min_speedup" in merged else {**merged, "max_ratio": MAX_RATIO}


def _check(name: str, value: Any) -> None:
    """Refuse a value of the wrong type; None stands for a setting that is left out, but not for a path.

    Raises: BadInput: names the setting, the value and an example.
    """
    kinds, example = KINDS[name]
    wrong = not isinstance(value, kinds) or isinstance(value, bool)
    if name == "at" and isinstance(value, list | tuple):
        wrong = not all(isinstance(each, str) for each in value)
    if wrong and (value is not None or name in ("candidate", "baseline")):
        raise BadInput(f"{name}={value!r:.80} is a {type(value).__name__}; give {example}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadInput(f"{name}={value}: give {example}.")


def _measure(folder: Path, candidate: str | Path, settings: Mapping[str, Any]) -> Gate:
    from optin_deploy.measuring.comparing import comparison_of
    from optin_deploy.measuring.gate import limit_of
    from optin_deploy.measuring.points import parse_point

    for name, value in {"candidate": candidate, **settings}.items():
        _check(name, value)
    at: str | Sequence[str] = settings.get("at") or ()
    contest = comparison_of(
        folder / settings.get("baseline", BASELINE),
        folder / candidate,
        engine=settings.get("engine"),
        precision=settings.get("precision"),
        threads=settings.get("threads"),
        points=[parse_point(text) for text in ([at] if isinstance(at, str) else at)],
    )
    return contest.run(limit_of(settings.get("max_ratio"), settings.get("min_speedup")))
