"""Run a torch module with PyTorch, eagerly, numpy in and numpy out."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from optin_deploy.errors import BadInput
from optin_deploy.runtimes.base import Feeds, OwnThreads
from optin_deploy.runtimes.device import exact_float32


class TorchRuntime(OwnThreads):
    """A model in memory; it stays the caller's, and closing leaves it as it was."""

    def __init__(self, model: nn.Module, *, engine: str = "torch", threads: int = 0) -> None:
        """Wrap the model; nothing is copied.

        Args: model: in eval mode; its forward takes the feeds by name and gives tensors by name.
            threads: see `OwnThreads`.
        Raises: BadInput: a module is in training mode, or negative threads.
        """
        super().__init__(threads)
        training = next((name for name, module in model.named_modules() if module.training), None)
        if training is not None:
            raise BadInput(f"{training or 'The model'} is in training mode (dropout is on). Call model.eval() first.")
        parameter = next(model.parameters(), None)
        self.engine = engine
        self._model = model
        self._dtype = torch.float32 if parameter is None else parameter.dtype
        self._device = torch.device("cpu") if parameter is None else parameter.device

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """Run once under inference mode, on the device of the model's weights.

        Returns: the outputs that are tensors, by their names; bfloat16 comes back as float32.
        Raises: BadInput: the model gives none by name.
        """
        with torch.inference_mode(), exact_float32():
            # np.require copies only what from_numpy cannot share: read-only or strided arrays.
            arrays = {name: np.require(array, requirements=("C", "W")) for name, array in feeds.items()}
            inputs = {name: torch.from_numpy(a).to(self._device) for name, a in arrays.items()}
            result = self._model(**{k: v.to(self._dtype) if v.is_floating_point() else v for k, v in inputs.items()})
            named = result.items() if isinstance(result, Mapping) else ()
            # numpy has no bfloat16.
            found = {
                name: (value.float() if value.dtype == torch.bfloat16 else value).cpu().numpy()
                for name, value in named
                if isinstance(value, torch.Tensor)
            }
            if found:
                return found
        raise BadInput(
            f"{type(self._model).__name__} gave a {type(result).__name__} without tensors by name. "
            "Wrap it in a module that returns a dict of them."
        )

    def synchronize(self) -> None:
        """Nothing to wait for: `run` copies its output to host memory, which waits for the device."""
