"""What every engine can do at run time: take named arrays, give named arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from optin_deploy.common.processors import available_cpus
from optin_deploy.errors import BadInput

Feeds = Mapping[str, np.ndarray]
"""Named input arrays, batch first."""
SAID = 300
"""Characters of an engine's own error that are shown."""
UNKNOWN_OPERATOR = "is not a registered function/op"
"""How ONNX Runtime says that it does not have an operator."""


class Runtime(AbstractContextManager["Runtime", None], Protocol):
    """One loaded model on one engine; a context manager that frees the engine on exit."""

    engine: str
    """Name in the engine table, e.g. `onnx`."""

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """Run once; all outputs by name, in host memory."""

    def synchronize(self) -> None:
        """Return only when all started work is done (a no-op on CPU engines)."""

    def __enter__(self) -> Self: ...


class DeviceRuntime(Runtime, Protocol):
    """A runtime that also launches on inputs that lie on its device."""

    device: torch.device

    def launcher(self, inputs: Mapping[str, Tensor]) -> Callable[[], Mapping[str, Tensor]]:
        """Put inputs on the device once.

        Returns: a function that launches on torch's current stream, or waits for the work where the engine has a stream
            of its own, and gives the outputs on the device, by name and valid until the next launch.
        """

    @property
    def replays(self) -> bool:
        """Do launches replay a CUDA graph? Known once there is a launcher."""


class Closing(ABC):
    """`with` for runtimes that have a `close`."""

    @abstractmethod
    def close(self) -> None:
        """Free what was loaded; a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class OnnxSession(Closing):
    """An ONNX file that an engine has loaded, with the names of its inputs and outputs."""

    engine: str
    _path: Path
    _inputs: tuple[str, ...]
    _outputs: tuple[str, ...]
    _session: Any
    """What runs it; None: it is closed."""

    @abstractmethod
    def _infer(self, feeds: dict[str, np.ndarray]) -> Sequence[np.ndarray]:
        """Run once; values of the outputs, as copies."""

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """Run once; feeds that the graph does not take are left out.

        Returns: every output of the graph by name, as copies.
        Raises: BadInput: an input of the graph is not in `feeds`, or of a size that it does not take, or the runtime is
            closed.
        """
        if self._session is None:
            raise closed(self)
        check_names(self._inputs, feeds, self._path)
        try:
            values = self._infer({name: feeds[name] for name in self._inputs})
        except Exception as err:  # errors of engines have no common base but Exception
            raise does_not_run(self._path, self.engine, feeds, err) from err
        return dict(zip(self._outputs, values, strict=True))

    def synchronize(self) -> None:
        """Nothing to wait for: `run` returns when the work is done."""

    def close(self) -> None:
        """Free the session (its weights, buffers and threads); a second call does nothing."""
        self._session = None


class OwnThreads:
    """torch's intra-op threads between enter and exit; of two nested runtimes the inner one's number counts."""

    def __init__(self, threads: int) -> None:
        """Args: threads: 0 = PyTorch's own number within a quota. Raises: BadInput: negative."""
        check_threads(threads, "leave PyTorch's number")
        self._threads = threads
        self._threads_before = 0

    def __enter__(self) -> Self:
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(self._threads or torch_threads())
        return self

    def __exit__(self, *error: object) -> None:
        torch.set_num_threads(self._threads_before)

    def synchronize(self) -> None:
        """Nothing to wait for: `run` copies its outputs to host memory, which waits for the device."""


def torch_threads() -> int:
    """Intra-op threads of PyTorch where none are asked for: its own number, or what a quota allows if that is less."""
    return min(torch.get_num_threads(), available_cpus())


def check_names(needed: Sequence[str], given: Mapping[str, object], path: Path | None = None) -> None:
    """Refuse feeds that lack an input.

    Args: path: of the model.
    Raises: BadInput: names the missing ones and all that are needed.
    """
    missing = [name for name in needed if name not in given]
    if missing:
        raise BadInput(
            f"{path or 'The model'} needs {', '.join(missing)}, but the feeds are {', '.join(given) or 'empty'}. "
            f"Give all of: {', '.join(needed)}."
        )


def does_not_load(path: Path, engine: str, err: Exception) -> BadInput:
    """The error of an engine that cannot load an ONNX file: what is wrong with the file, else what the engine said."""
    from optin_deploy.network.onnx_data import data_files, remedy

    try:
        data_files(path)
    except BadInput as fault:
        return fault
    said = _said(err)
    if UNKNOWN_OPERATOR in said:
        return BadInput(
            f"{path} does not load on engine {engine}, which does not have this operator: {said}. Use --engine torch, "
            "or export the operator as a function of the model."
        )
    return BadInput(f"{path} does not load on engine {engine}: {said}. {remedy(path)}")


def does_not_run(path: Path, engine: str, feeds: Feeds, err: Exception) -> BadInput:
    """The error of an engine that loaded a file and cannot run it."""
    from optin_deploy.network.onnx_data import remedy

    sizes = ", ".join(f"{name} {'x'.join(map(str, np.shape(value)))}" for name, value in feeds.items())
    return BadInput(
        f"{path} does not run on engine {engine} with {sizes}: {_said(err)}. Give sizes that the model takes, e.g. "
        f"shorter texts. If it takes none: {remedy(path)}"
    )


def _said(err: Exception) -> str:
    return " ".join(str(err).split())[:SAID].rstrip(".")


def check_threads(threads: int, default: str) -> None:
    """Refuse a negative number of threads.

    Args: default: what 0 means.
    Raises: BadInput.
    """
    if threads < 0:
        raise BadInput(f"threads is {threads}; use 0 ({default}) or a positive number.")


def check_onnx_file(path: str | Path) -> None:
    """Refuse a path where no file is.

    Raises: BadInput.
    """
    if not Path(path).is_file():
        raise BadInput(f"There is no ONNX file at {path}. Give the path of a .onnx file.")


def closed(runtime: object) -> BadInput:
    """The error of a run after `close`."""
    return BadInput(f"This {type(runtime).__name__} is closed. Open a new one for more runs.")
