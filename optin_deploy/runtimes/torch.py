"""Run a torch module with PyTorch, eager or compiled, numpy in and numpy out, or on tensors that lie on its device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from optin_deploy.errors import BadInput
from optin_deploy.runtimes.base import Feeds, OwnThreads
from optin_deploy.runtimes.cuda_graph import recorded
from optin_deploy.runtimes.device import float32_mode

SHAPES = 64
"""Input shapes that are compiled for one model class in a process."""
WITHOUT_GRAPHS = "max-autotune-no-cudagraphs"
"""Mode of torch.compile for launchers, which record graphs of their own."""


class TorchRuntime(OwnThreads):
    """A model in memory; it stays the caller's, and closing leaves it as it was."""

    def __init__(
        self,
        model: nn.Module,
        *,
        engine: str = "torch",
        threads: int = 0,
        tf32: bool = False,
        cuda_graph: bool = False,
    ) -> None:
        """Wrap the model; nothing is copied.

        Args: model: in eval mode; its forward takes the feeds by name and gives tensors by name.
            threads: see `OwnThreads`. tf32: may float32 products be rounded to TF32?
            cuda_graph: shall a launcher on a GPU record a CUDA graph and replay it?
        Raises: BadInput: a module is in training mode, or negative threads.
        """
        super().__init__(threads)
        training = next((name for name, module in model.named_modules() if module.training), None)
        if training is not None:
            raise BadInput(f"{training or 'The model'} is in training mode (dropout is on). Call model.eval() first.")
        parameter = next(model.parameters(), None)
        self.engine = engine
        self.device = torch.device("cpu") if parameter is None else parameter.device
        self.replays = False
        self._model = model
        self._dtype = torch.float32 if parameter is None else parameter.dtype
        self._tf32, self._cuda_graph = tf32, cuda_graph and self.device.type == "cuda"

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """Run once under inference mode, on the device of the model's weights.

        Returns: the outputs that are tensors, by their names; bfloat16 comes back as float32.
        Raises: BadInput: the model gives none by name.
        """
        # np.require copies only what from_numpy cannot share: read-only or strided arrays.
        arrays = {name: np.require(array, requirements=("C", "W")) for name, array in feeds.items()}
        found = self._forward(self._there({name: torch.from_numpy(array) for name, array in arrays.items()}))
        # numpy has no bfloat16.
        return {
            name: (value.float() if value.dtype == torch.bfloat16 else value).cpu().numpy()
            for name, value in found.items()
        }

    def launcher(self, inputs: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        """See `DeviceRuntime.launcher`."""
        there = self._there(inputs)

        def launch() -> dict[str, Tensor]:
            return self._forward(there)

        if not self._cuda_graph:
            return launch
        torch.cuda.synchronize(self.device)  # the stream that records does not wait for the one that copied
        found = recorded(launch, torch.cuda.Stream(self.device))  # type: ignore[no-untyped-call]  # torch's own gap
        self.replays = found is not None
        if found is None:
            return launch
        graph, outputs = found

        def replay() -> dict[str, Tensor]:
            graph.replay()
            return outputs

        return replay

    def _there(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inputs on the model's device, floats in its type."""
        there = {name: value.to(self.device) for name, value in inputs.items()}
        return {k: v.to(self._dtype) if v.is_floating_point() else v for k, v in there.items()}

    def _forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.inference_mode(), float32_mode(tf32=self._tf32):
            result = self._model(**inputs)
        named = result.items() if isinstance(result, Mapping) else ()
        found = {name: value for name, value in named if isinstance(value, Tensor)}
        if found:
            return found
        raise BadInput(
            f"{type(self._model).__name__} gave a {type(result).__name__} without tensors by name. "
            "Wrap it in a module that returns a dict of them."
        )


def compiled(model: Any, mode: str) -> Any:
    """The model with its forward compiled at the first run of each shape, which takes seconds to minutes.

    Args: model: changed in place. mode: see `torch.compile`.
    """
    # Past the limit torch would go on without compiling, and such a time must not pass as compiled.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
    model.forward = torch.compile(model.forward, mode=mode, dynamic=False)
    return model
