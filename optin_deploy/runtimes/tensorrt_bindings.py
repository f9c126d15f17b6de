"""TensorRT's Python bindings: import them with clear errors, and keep what TensorRT says."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

from optin_deploy.errors import MissingDependency

MODULES = {"trt": ("tensorrt", "TensorRT"), "trt-rtx": ("tensorrt_rtx_bindings", "TensorRT-RTX")}
"""Engine -> module of its Python bindings, name for people."""


def import_tensorrt(engine: str) -> ModuleType:
    """The Python bindings of an engine.

    Raises: MissingDependency: not installed, or its libraries do not load.
    """
    module, name = MODULES[engine]
    extra = f"pip install 'optin-deploy[{engine}]'"
    try:
        return import_module(module)
    except ModuleNotFoundError as err:
        if err.name != module:
            raise MissingDependency(f"{name} is installed but lacks {err.name}. Run: {extra}") from err
        raise MissingDependency(f"{name} is not installed. Run: {extra}") from err
    except (ImportError, OSError) as err:  # a shared library is missing or too old
        raise MissingDependency(f"{name} is installed but does not load: {err}. See `optin doctor`.") from err


@dataclass
class EngineLog:
    """What a builder or runtime said, kept for the log file and for our own error texts."""

    name: str
    lines: list[str] = field(default_factory=list)
    """Everything but the chatter."""
    problems: list[str] = field(default_factory=list)
    """Warnings and errors."""

    def to(self, trt: Any) -> Any:
        """The process's one logger for TensorRT (it ignores a second one), writing here from now on."""
        if trt.__name__ not in _LOGGERS:
            _LOGGERS[trt.__name__] = _make_logger(trt)
        logger = _LOGGERS[trt.__name__]
        logger.current = self
        return logger


_LOGGERS: dict[str, Any] = {}
"""Loggers by module; they are never freed, as a logger must outlive everything that was made with it."""


def _make_logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]  # the base class exists only where TensorRT does
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.current = EngineLog("")

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.INFO:
                self.current.lines.append(f"{severity.name}: {message}")
            if severity <= trt.ILogger.Severity.WARNING:
                self.current.problems.append(message)

    return Logger()
