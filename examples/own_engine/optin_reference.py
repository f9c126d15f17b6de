"""An engine that runs ONNX files by onnx's reference evaluator: numpy alone, slow, and independent of all others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from optin_deploy.common.processors import default_threads
from optin_deploy.errors import BadInput
from optin_deploy.exporters.onnx_engine import OnnxEngineExporter
from optin_deploy.runtimes.base import (
    Closing,
    Feeds,
    Runtime,
    check_names,
    check_onnx_file,
    closed,
    does_not_load,
    does_not_run,
)


class ReferenceRuntime(Closing):
    """One loaded ONNX file."""

    engine = "reference"

    def __init__(self, path: Path) -> None:
        """Load the file.

        Raises: BadInput: there is none, or it does not load.
        """
        from onnx.reference import ReferenceEvaluator  # here: commands that do not run this engine stay quick

        check_onnx_file(path)
        self._path = path
        try:
            self._evaluator: Any = ReferenceEvaluator(str(path))
        except Exception as err:  # its errors have no common base but Exception
            raise does_not_load(path, self.engine, err) from err

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """Run once; all outputs by name.

        Raises: BadInput: an input is missing or does not fit, or the runtime is closed.
        """
        if self._evaluator is None:
            raise closed(self)
        names = self._evaluator.input_names
        check_names(names, feeds, self._path)
        try:
            values = self._evaluator.run(None, {name: feeds[name] for name in names})
        except Exception as err:  # as above
            raise does_not_run(self._path, self.engine, feeds, err) from err
        return dict(zip(self._evaluator.output_names, values, strict=True))

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def close(self) -> None:
        """Free the weights."""
        self._evaluator = None


class ReferenceExporter(OnnxEngineExporter):
    """The artifact is the ONNX file as it is, in float32."""

    engine = "reference"
    precisions = ("fp32",)
    extra = "cpu"

    def threads(self, asked: int) -> int:
        """Those of numpy, which no command sets."""
        if asked:
            raise BadInput(f"--threads {asked}: engine {self.engine} takes numpy's. Set OMP_NUM_THREADS instead.")
        return default_threads()

    def open(self, path: Path, *, precision: str | None = None, threads: int = 0, task: str | None = None) -> Runtime:
        """Read anew each time it is opened."""
        return ReferenceRuntime(path)
