"""Run an AOTInductor package: compiled ahead of time, loaded by torch alone."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from optin_deploy.runtimes.base import Feeds, OwnThreads, check_names, closed
from optin_deploy.runtimes.device import current_gpu, describe_device, exact_float32
from optin_deploy.runtimes.record import read_record


class AotiRuntime(OwnThreads):
    """One package; inputs and outputs in host memory."""

    engine = "aoti"

    def __init__(self, path: str | Path, *, threads: int = 0) -> None:
        """Check the package's record and load it (it holds machine code: load only what you trust).

        Args: threads: intra-op threads between enter and exit; 0 = leave as is.
        Raises: BadInput: made for another device or torch, or not the file that was recorded.
        """
        super().__init__(threads)
        path = Path(path)
        record = read_record(path)
        self._device = current_gpu() or torch.device("cpu")
        record.check(path, version=torch.__version__, capability=describe_device(self._device)[1])
        inductor: Any = torch._inductor
        self._package: Any = inductor.aoti_load_package(str(path))
        metadata = self._package.get_metadata()
        self._inputs = tuple(metadata["inputs"].split(","))
        self._outputs = tuple(metadata["outputs"].split(","))

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """Run once.

        Raises: BadInput: an input is missing.
        """
        if self._package is None:
            raise closed(self)
        check_names(self._inputs, feeds)
        with torch.inference_mode(), exact_float32():
            arrays = (np.require(feeds[name], requirements=("C", "W")) for name in self._inputs)
            found = self._package(*(torch.from_numpy(array).to(self._device) for array in arrays))
        values = found if isinstance(found, (tuple, list)) else (found,)
        return {name: value.cpu().numpy() for name, value in zip(self._outputs, values, strict=True)}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._package = None

    def synchronize(self) -> None:
        """Nothing to wait for: `run` copies its outputs to host memory."""
