"""Run an ONNX file with ONNX Runtime, on the CPU or on another of its execution providers."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from optin_deploy.common.processors import default_threads, is_limited
from optin_deploy.errors import MissingDependency
from optin_deploy.runtimes.base import OnnxSession, check_onnx_file, check_threads, does_not_load

PROVIDER = "CPUExecutionProvider"
FALLBACKS = {"TensorrtExecutionProvider": [("CUDAExecutionProvider", {"use_tf32": "0"})]}
"""Who takes the nodes that a provider does not, with its options."""

ERRORS = 3
"""The level from which ONNX Runtime writes to stderr; its warnings are about how it optimises."""
DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")
"""Packages that all install the same `onnxruntime` folder, so that only one may be present."""

ENGINES = {PROVIDER: "onnx", "CUDAExecutionProvider": "ort-cuda", "TensorrtExecutionProvider": "ort-trt"}
"""Names in the engine table."""


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


class OrtRuntime(OnnxSession):
    """One session on one provider, all graph optimisations on; its threads rest between runs."""

    replays = False

    def __init__(
        self, path: str | Path, *, threads: int = 0, provider: str = PROVIDER, options: Mapping[str, str] | None = None
    ) -> None:
        """Load the file.

        Args: path: an ONNX file; external data is looked for beside it.
            threads: intra-op threads; 0 = one per physical core, which ORT then also pins, or what a quota allows.
            provider: execution provider that the session must really get. options: its options.
        Raises: BadInput: no such file, one that does not load, or negative threads. MissingDependency: see
            `import_onnxruntime`; or the session runs on another provider than the asked one.
        """
        self.engine = ENGINES.get(provider, provider)
        check_threads(threads, "ONNX Runtime's default")
        check_onnx_file(path)
        ort = import_onnxruntime()
        settings = ort.SessionOptions()
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        settings.intra_op_num_threads = threads or (
            default_threads() if is_limited() else 0
        )  # its own 0 knows no quota
        settings.inter_op_num_threads = 1
        settings.log_severity_level = ERRORS
        # Threads of an idle session would spin on and slow the session that is measured beside it.
        settings.add_session_config_entry("session.force_spinning_stop", "1")
        providers = [(provider, dict(options or {})), *FALLBACKS.get(provider, [])]
        known = ort.get_available_providers()
        if provider not in known:
            raise MissingDependency(
                f"This onnxruntime has no {provider}; it has {', '.join(known)}. See `optin doctor`."
            )
        try:
            # No fallback: `run` would go on with another provider after an error of this one.
            session = ort.InferenceSession(str(path), sess_options=settings, providers=providers, enable_fallback=0)
        except Exception as err:  # its errors have no common base but Exception
            raise does_not_load(Path(path), self.engine, err) from err
        # ORT drops a provider that does not load without raising; the CPU's numbers must not pass as its own.
        wanted = [name for name, _ in providers]
        if session.get_providers()[: len(wanted)] != wanted:
            raise MissingDependency(
                f"ONNX Runtime chose {session.get_providers()} where {provider} was asked: that provider, its "
                "libraries or the driver do not fit. See `optin doctor`."
            )
        self.device = torch.device("cpu") if provider == PROVIDER else torch.device("cuda", 0)  # theirs by default
        self._path = Path(path)
        self._session = session
        self._inputs = tuple(node.name for node in session.get_inputs())
        self._outputs = tuple(node.name for node in session.get_outputs())

    def _infer(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        values: list[np.ndarray] = self._session.run(None, feeds)
        return values

    def launcher(self, inputs: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        """See `DeviceRuntime.launcher`; a launch waits for its work, which is on a stream of the session's own.

        Raises: BadInput: as `run`, which runs once to know the shapes of the outputs.
        """
        found = self.run({name: value.cpu().numpy() for name, value in inputs.items()})
        outputs = {name: torch.from_numpy(values).to(self.device) for name, values in found.items()}
        there = {name: inputs[name].to(self.device).contiguous() for name in self._inputs}
        binding = self._session.io_binding()
        for bind, tensors in ((binding.bind_input, there), (binding.bind_output, outputs)):
            for name, tensor in tensors.items():
                bind(
                    name=name,
                    device_type=self.device.type,
                    device_id=self.device.index or 0,
                    element_type=torch.empty(0, dtype=tensor.dtype).numpy().dtype.type,
                    shape=tuple(tensor.shape),
                    buffer_ptr=tensor.data_ptr(),
                )
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the session's stream does not wait for ours

        def launch(held: object = there) -> dict[str, Tensor]:  # the binding holds addresses only
            self._session.run_with_iobinding(binding)
            return outputs

        return launch
