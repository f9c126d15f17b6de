"""Run a transformers model with PyTorch, eagerly, numpy in and numpy out."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from optin_deploy.errors import BadInput
from optin_deploy.runtimes.base import Feeds, OwnThreads
from optin_deploy.runtimes.device import exact_float32

OUTPUTS = ("logits", "last_hidden_state")
"""The output that is read: the first of these that the model gives."""


class TorchRuntime(OwnThreads):
    """A model in memory; it stays the caller's, and closing leaves it as it was."""

    def __init__(self, model: nn.Module, *, engine: str = "torch", threads: int = 0) -> None:
        """Wrap the model; nothing is copied.

        Args: model: in eval mode; its forward takes the feeds by name and gives `.logits` or `.last_hidden_state`.
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

        Returns: one output, `logits` if the model gives it, else `last_hidden_state`; bfloat16 comes back as float32.
        Raises: BadInput: the model gives neither.
        """
        with torch.inference_mode(), exact_float32():
            # np.require copies only what from_numpy cannot share: read-only or strided arrays.
            arrays = {name: np.require(array, requirements=("C", "W")) for name, array in feeds.items()}
            inputs = {name: torch.from_numpy(a).to(self._device) for name, a in arrays.items()}
            result = self._model(**{k: v.to(self._dtype) if v.is_floating_point() else v for k, v in inputs.items()})
            for name in OUTPUTS:
                value = getattr(result, name, None)
                if value is not None:
                    # numpy has no bfloat16.
                    value = value.float() if value.dtype == torch.bfloat16 else value
                    return {name: value.cpu().numpy()}
        raise BadInput(
            f"{type(self._model).__name__} gave a {type(result).__name__} with neither of {', '.join(OUTPUTS)}. "
            "Wrap it in a module whose output has one of them."
        )

    def synchronize(self) -> None:
        """Nothing to wait for: `run` copies its output to host memory, which waits for the device."""
