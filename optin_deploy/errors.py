"""Every error a user can meet, with the exit code the command line gives for it."""

from __future__ import annotations

EXIT_CODES = {
    0: "done",
    1: "a gate, a quality or a latency limit, or a check of doctor failed",
    2: "bad input",
    3: "artifact written, but the engine cannot be built here",
    4: "too unstable to judge",
    5: "an error of optin-deploy itself",
    130: "interrupted",
}
"""The one table of exit codes; `OptinError.exit_code` points into it."""


OWN_FAULT = 5
"""Exit code of an error that nobody meant to raise."""


class OptinError(Exception):
    """Base of all errors raised on purpose: says what happened, with which value, and what to do next."""

    exit_code = 2


class BadInput(OptinError, ValueError):
    """A value, file or folder from the user cannot be used."""


class InfeasibleBudget(BadInput):
    """The budget lies below what the unprunable layers alone cost."""


class PlanMismatch(BadInput):
    """A stored plan, score or weight file belongs to another model."""


class NonFiniteActivation(BadInput):
    """A layer put out NaN or infinity on calibration data."""


class QualityLimit(OptinError):
    """No model within the limits is good enough."""

    exit_code = 1


class MissedTime(OptinError):
    """The model that was made takes longer than the time it was planned for."""

    exit_code = 1


class GateFailed(OptinError):
    """An artifact is slower than its limit allows, and not by chance."""

    exit_code = 1


class TooUnstable(OptinError):
    """A measurement contradicts itself: nothing can be decided by it."""

    exit_code = 4


class ParityFailure(OptinError):
    """Two forms of the same model gave different outputs."""

    exit_code = 1


class ServerFault(OptinError):
    """An inference server did not answer, or not as the protocol says."""

    exit_code = 1


class MissingDependency(OptinError):
    """A package for the chosen engine is not installed."""


class CannotBuildHere(OptinError):
    """The portable artifact is written, but this machine cannot build the engine."""

    exit_code = 3
