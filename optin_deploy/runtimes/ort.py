"""Run an ONNX file with ONNX Runtime on the CPU."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

import numpy as np

from optin_deploy.errors import BadInput, MissingDependency
from optin_deploy.runtimes.base import Feeds

PROVIDER = "CPUExecutionProvider"

DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")
"""Packages that all install the same `onnxruntime` folder, so that only one may be present."""


def import_onnxruntime() -> ModuleType:
    """Import onnxruntime, or say how to get exactly one.

    Raises: MissingDependency: none is installed, or several that overwrite each other.
    """
    installed = [name for name in DISTRIBUTIONS if any(importlib.metadata.distributions(name=name))]
    if len(installed) > 1:
        raise MissingDependency(
            f"{' and '.join(installed)} are installed together, but they overwrite each other's files. "
            f"Run: pip uninstall -y {' '.join(installed)} && pip install 'optin-deploy[cpu]'"
        )
    try:
        import onnxruntime
    except ModuleNotFoundError as err:
        raise MissingDependency("onnxruntime is not installed. Run: pip install 'optin-deploy[cpu]'") from err
    module: ModuleType = onnxruntime
    return module


class OrtRuntime:
    """One session on the CPU provider, all graph optimisations on; its threads rest between runs."""

    engine = "onnx"

    def __init__(self, path: str | Path, *, threads: int = 0) -> None:
        """Load the file.

        Args: path: an ONNX file; external data is looked for beside it.
            threads: intra-op threads; 0 = ORT's default (one per physical core).
        Raises: BadInput: no such file, or negative threads. MissingDependency: see `import_onnxruntime`.
        """
        if threads < 0:
            raise BadInput(f"threads is {threads}; use 0 (ONNX Runtime's default) or a positive number.")
        if not Path(path).is_file():
            raise BadInput(f"There is no ONNX file at {path}. Give the path of a .onnx file.")
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Threads of an idle session would spin on and slow the session that is measured beside it.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = ort.InferenceSession(str(path), sess_options=options, providers=[PROVIDER])
        # ORT may add or drop providers without raising; a number from another one must not pass as CPU's.
        if session.get_providers() != [PROVIDER]:
            raise MissingDependency(
                f"ONNX Runtime chose {session.get_providers()} where {PROVIDER} was asked. "
                "Reinstall it: pip install --force-reinstall onnxruntime"
            )
        self._session: Any = session
        self._inputs = tuple(node.name for node in session.get_inputs())
        self._outputs = tuple(node.name for node in session.get_outputs())

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """Run once; feeds that the graph does not take are left out.

        Returns: every output of the graph by name.
        Raises: BadInput: an input of the graph is not in `feeds`, or the runtime is closed.
        """
        if self._session is None:
            raise BadInput("This OrtRuntime is closed. Open a new one for more runs.")
        missing = [name for name in self._inputs if name not in feeds]
        if missing:
            raise BadInput(
                f"The ONNX model needs {', '.join(missing)}, but the feeds are {', '.join(feeds) or 'empty'}. "
                f"Give all of: {', '.join(self._inputs)}."
            )
        values = self._session.run(None, {name: feeds[name] for name in self._inputs})
        return dict(zip(self._outputs, values, strict=True))

    def synchronize(self) -> None:
        """Nothing to wait for: `run` returns when the work is done."""

    def close(self) -> None:
        """Free the session (its weights, arena and threads); a second call does nothing."""
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
