"""Run a TensorRT or TensorRT-RTX plan: fixed buffers, a CUDA graph per input shape, nothing allocated in the loop."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optin_deploy.errors import BadInput
from optin_deploy.files.storage import sha256_file
from optin_deploy.runtimes.base import Closing, Feeds, check_names, closed
from optin_deploy.runtimes.cuda_graph import recorded
from optin_deploy.runtimes.device import NO_GPU, current_gpu, describe_device
from optin_deploy.runtimes.record import EngineRecord, read_record
from optin_deploy.runtimes.tensorrt_bindings import MODULES, EngineLog, import_tensorrt

KEPT_SHAPES = 16
"""Input shapes whose buffers and graph are kept; of more, the one unused for longest is dropped."""


@dataclass
class _Bound:
    """An execution context bound to the buffers of one set of input shapes."""

    context: Any
    device: dict[str, Tensor]
    host: dict[str, Tensor]
    """Pinned, so that copies do not wait for the processor."""
    arrays: dict[str, np.ndarray]
    """The same memory as `host`."""
    graph: torch.cuda.CUDAGraph | None = None


class TensorRTRuntime(Closing):
    """One plan on one device."""

    def __init__(
        self,
        path: str | Path,
        *,
        engine: str = "trt",
        cuda_graph: bool = True,
    ) -> None:
        """Check the plan's record, load it, and put its weights in if it was built without.

        Args: path: the plan; engine.json lies beside it.
            cuda_graph: record one graph per input shape and replay it (fewer launches by the processor).
        Raises: MissingDependency. BadInput: no GPU, or the plan is not for this device or version.
        """
        self.engine = engine
        path = Path(path)
        record = read_record(path)
        trt: Any = import_tensorrt(engine)
        gpu = current_gpu()
        if gpu is None:
            raise BadInput(f"{path} cannot run: {NO_GPU}. See `optin doctor`.")
        self.device = gpu
        record.check(path, version=trt.__version__, capability=describe_device(gpu)[1])
        self._trt = trt
        self._log = EngineLog(MODULES[engine][1])
        self._logger = self._log.to(trt)
        self._runtime = trt.Runtime(self._logger)
        if record.any_version:
            self._runtime.engine_host_code_allowed = True  # such plans carry the code that runs them
        self._plan: Any = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._plan is None:
            raise BadInput(f"{path} cannot be loaded: {' '.join(self._log.problems) or 'no reason given'}")
        if record.stripped:
            self._put_weights_in(path, record)
        self._on_gpu = self.device.type == "cuda"
        self._graphs = cuda_graph and self._on_gpu
        self._stream: Any = torch.cuda.Stream(self.device) if self._on_gpu else None  # type: ignore[no-untyped-call]
        self._types = _torch_types(trt)
        names = [self._plan.get_tensor_name(i) for i in range(self._plan.num_io_tensors)]
        self.inputs = tuple(n for n in names if self._plan.get_tensor_mode(n) == trt.TensorIOMode.INPUT)
        self.outputs = tuple(n for n in names if n not in self.inputs)
        # Contexts run one after another on one stream, so they can share their scratch memory.
        self._scratch: Any = torch.empty(
            max(1, self._plan.device_memory_size_v2), dtype=torch.uint8, device=self.device
        )
        self._bound: OrderedDict[tuple[tuple[int, ...], ...], _Bound] = OrderedDict()

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """Copy the inputs to the device, run, copy the outputs back.

        Returns: all outputs; the arrays are overwritten by the next run of the same shapes.
        Raises: BadInput: an input is missing, or no profile takes its shape.
        """
        bound = self._bound_to(feeds)
        for name in self.inputs:
            np.copyto(bound.arrays[name], feeds[name], casting="same_kind")
        with self._on_stream():
            for name in self.inputs:
                bound.device[name].copy_(bound.host[name], non_blocking=True)
            self._start(bound)
            for name in self.outputs:
                bound.host[name].copy_(bound.device[name], non_blocking=True)
        self.synchronize()
        return {name: bound.arrays[name] for name in self.outputs}

    def launcher(self, inputs: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        """Put inputs into the engine's own memory once, for timing without transfers.

        Returns: a function that launches on torch's current stream and gives the output buffers on the device. Launch
            nothing else of this runtime on another stream meanwhile: all shapes share one scratch memory.
        """
        bound = self._bound_to(inputs)
        for name in self.inputs:
            bound.device[name].copy_(inputs[name])
        if self._on_gpu:
            torch.cuda.synchronize(self.device)  # the caller's stream and ours do not wait for each other
        outputs = {name: bound.device[name] for name in self.outputs}

        def launch() -> dict[str, Tensor]:
            self._start(bound)
            return outputs

        return launch

    @property
    def replays(self) -> bool:
        """Do launches replay a CUDA graph? Known after the first shapes: False also if none could be recorded."""
        return bool(self._bound) and all(bound.graph is not None for bound in self._bound.values())

    def synchronize(self) -> None:
        """Wait for the stream."""
        if self._stream is not None:
            self._stream.synchronize()

    def close(self) -> None:
        """Free graphs, contexts, buffers and the plan, in this order."""
        if self._plan is not None:
            self.synchronize()
        for bound in self._bound.values():
            bound.graph = None
            bound.context = None
        self._bound.clear()
        self._plan = self._runtime = self._scratch = None

    def _bound_to(self, inputs: Mapping[str, np.ndarray] | Mapping[str, Tensor]) -> _Bound:
        if self._plan is None:
            raise closed(self)
        check_names(self.inputs, inputs)
        shapes = tuple(tuple(inputs[name].shape) for name in self.inputs)
        bound = self._bound.get(shapes) or self._bind(shapes)
        self._bound.move_to_end(shapes)
        return bound

    def _bind(self, shapes: tuple[tuple[int, ...], ...]) -> _Bound:
        """A context of its own for these shapes: a recorded graph must not see its context change."""
        if len(self._bound) >= KEPT_SHAPES:
            self._bound.popitem(last=False)
        profile = self._profile_for(shapes)
        with self._on_stream():  # all of it: nothing waits for torch's default stream by itself
            bound = self._prepare(profile, shapes)
            self.synchronize()
        if self._graphs:
            found = recorded(lambda: self._launch(bound.context), self._stream)
            bound.graph = None if found is None else found[0]
        self._bound[shapes] = bound
        return bound

    def _prepare(self, profile: int, shapes: tuple[tuple[int, ...], ...]) -> _Bound:
        config = self._plan.create_runtime_config()
        config.set_execution_context_allocation_strategy(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        specialization = getattr(self._trt, "DynamicShapesKernelSpecializationStrategy", None)
        if specialization is not None:  # TensorRT-RTX: else a graph could keep the kernels that bridge a compilation
            config.dynamic_shapes_kernel_specialization_strategy = specialization.EAGER
        context = self._plan.create_execution_context(config)
        context.set_device_memory(self._scratch.data_ptr(), self._scratch.numel())
        context.set_optimization_profile_async(profile, self._handle())
        self.synchronize()
        for name, shape in zip(self.inputs, shapes, strict=True):
            if not context.set_input_shape(name, shape):
                raise BadInput(f"The engine refused {name} of shape {shape}: {' '.join(self._log.problems[-2:])}")
        bound = _Bound(context, {}, {}, {})
        for name in (*self.inputs, *self.outputs):
            shape = tuple(context.get_tensor_shape(name))
            dtype = self._types[self._plan.get_tensor_dtype(name)]
            bound.device[name] = torch.zeros(shape, dtype=dtype, device=self.device)
            bound.host[name] = torch.zeros(shape, dtype=dtype, pin_memory=self._on_gpu)
            bound.arrays[name] = bound.host[name].numpy()
            context.set_tensor_address(name, bound.device[name].data_ptr())
        return bound

    def _start(self, bound: _Bound) -> None:
        if bound.graph is not None:
            bound.graph.replay()
        else:
            self._launch(bound.context)

    def _launch(self, context: Any) -> None:
        if not context.execute_async_v3(self._handle()):
            raise BadInput(f"The engine failed: {' '.join(self._log.problems[-2:]) or 'no reason given'}")

    def _profile_for(self, shapes: tuple[tuple[int, ...], ...]) -> int:
        """The profile that takes these shapes; of several the one with the smallest maximum, being tuned for less."""
        ranges, fitting = [], {}
        for profile in range(self._plan.num_optimization_profiles):
            limits = [tuple(map(tuple, self._plan.get_tensor_profile_shape(name, profile))) for name in self.inputs]
            if all(_holds(low, high, shape) for (low, _, high), shape in zip(limits, shapes, strict=True)):
                fitting[profile] = sum(int(np.prod(high)) for _, _, high in limits)
            low, _, high = limits[0]
            ranges.append(f"{low} to {high}")
        if not fitting:
            raise BadInput(
                f"{self.inputs[0]} has shape {shapes[0]}, but the engine takes {' or '.join(ranges)}. "
                "Build it with another --profile."
            )
        return min(fitting, key=fitting.__getitem__)

    def _put_weights_in(self, path: Path, record: EngineRecord) -> None:
        source = path.parent / Path(record.onnx or "").name
        needed = {source.name: record.onnx_sha256, **record.onnx_data}
        for file, sha256 in ((path.parent / Path(name).name, sha256) for name, sha256 in needed.items()):
            if not file.is_file() or sha256_file(file) != sha256:
                raise BadInput(
                    f"{path} was built without weights, and {file} is not the file they came from. Put it back, or "
                    f"run: optin build {path.parent} --engine {self.engine}"
                )
        refitter = self._trt.Refitter(self._plan, self._logger)
        parser = self._trt.OnnxParserRefitter(refitter, self._logger)
        if not parser.refit_from_file(str(source)) or not refitter.refit_cuda_engine():
            raise BadInput(f"{source} does not fill {path}: {' '.join(self._log.problems) or 'no reason given'}")

    def _handle(self) -> int:
        # While a graph is recorded, torch's current stream is the one that records.
        return int(torch.cuda.current_stream(self.device).cuda_stream) if self._on_gpu else 0

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def _holds(low: tuple[int, ...], high: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return len(low) == len(shape) and all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))


def _torch_types(trt: Any) -> dict[Any, torch.dtype]:
    """TensorRT's types of inputs and outputs that numpy has too."""
    return {
        trt.DataType.FLOAT: torch.float32,
        trt.DataType.HALF: torch.float16,
        trt.DataType.INT32: torch.int32,
        trt.DataType.INT64: torch.int64,
        trt.DataType.BOOL: torch.bool,
    }
