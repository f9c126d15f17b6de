"""Run an AOTInductor package: compiled ahead of time, loaded by torch alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optin_deploy.runtimes.base import Feeds, OwnThreads, check_names, closed
from optin_deploy.runtimes.device import current_gpu, describe_device, float32_mode
from optin_deploy.runtimes.record import read_record


class AotiRuntime(OwnThreads):
    """One package."""

    engine = "aoti"
    replays = False

    def __init__(self, path: str | Path, *, threads: int = 0) -> None:
        """Check the package's record and load it (it holds machine code: load only what you trust).

        Args: threads: intra-op threads between enter and exit; 0 = leave as is.
        Raises: BadInput: made for another device or torch, or not the file that was recorded.
        """
        super().__init__(threads)
        path = Path(path)
        record = read_record(path)
        self.device = current_gpu() or torch.device("cpu")
        record.check(path, version=torch.__version__, capability=describe_device(self.device)[1])
        inductor: Any = torch._inductor
        self._package: Any = inductor.aoti_load_package(str(path))
        metadata = self._package.get_metadata()
        self._inputs = tuple(metadata["inputs"].split(","))
        self._outputs = tuple(metadata["outputs"].split(","))

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """Run once.

        Raises: BadInput: an input is missing.
        """
        there = self._there({k: torch.from_numpy(np.require(v, requirements=("C", "W"))) for k, v in feeds.items()})
        return {name: value.cpu().numpy() for name, value in self._forward(there).items()}

    def launcher(self, inputs: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        """See `DeviceRuntime.launcher`."""
        there = self._there(inputs)
        return lambda: self._forward(there)

    def _there(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        check_names(self._inputs, inputs)
        return [inputs[name].to(self.device) for name in self._inputs]

    def _forward(self, there: list[Tensor]) -> dict[str, Tensor]:
        if self._package is None:
            raise closed(self)
        with torch.inference_mode(), float32_mode():
            found = self._package(*there)
        values = found if isinstance(found, (tuple, list)) else (found,)
        return dict(zip(self._outputs, values, strict=True))

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._package = None
