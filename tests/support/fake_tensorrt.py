"""A stand-in for the `tensorrt` module on machines without it: the calls this project makes, run by ONNX Runtime.

Only what the project calls is here, under TensorRT's own names; tests/exporters/test_tensorrt_api.py holds every name
and its number of arguments against the real bindings of TensorRT 10 and 11. So code that runs on this module calls
nothing that a real one lacks. Memory is the CPU's: addresses are read and written through ctypes.
"""

from __future__ import annotations

import ctypes
import enum
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

__version__ = "10.12.0.36"

SCRATCH_BYTES = 4096


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1
    INT32 = 3
    BOOL = 4
    INT64 = 8


ONNX_TYPES = {1: DataType.FLOAT, 10: DataType.HALF, 6: DataType.INT32, 9: DataType.BOOL, 7: DataType.INT64}
NUMPY = {
    DataType.FLOAT: np.float32,
    DataType.HALF: np.float16,
    DataType.INT32: np.int32,
    DataType.BOOL: np.bool_,
    DataType.INT64: np.int64,
}


class TensorIOMode(enum.Enum):
    INPUT = 1
    OUTPUT = 2


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class BuilderFlag(enum.Enum):
    TF32 = 0
    REFIT = 1
    VERSION_COMPATIBLE = 2
    STRIP_PLAN = 3


class MemoryPoolType(enum.Enum):
    WORKSPACE = 0


class HardwareCompatibilityLevel(enum.Enum):
    AMPERE_PLUS = 1


class ExecutionContextAllocationStrategy(enum.Enum):
    USER_MANAGED = 2


class _Severity(enum.IntEnum):
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    Severity = _Severity

    def log(self, severity: Any, message: str) -> None:
        raise NotImplementedError


class IHostMemory(bytes):
    """What bytes() takes."""


class ITimingCache:
    def __init__(self, known: bytes) -> None:
        self._known = known

    def serialize(self) -> IHostMemory:
        return IHostMemory(self._known + b"measured;")


class IOptimizationProfile:
    def __init__(self) -> None:
        self._shapes: dict[str, list[list[int]]] = {}

    def set_shape(self, input: str, min: Sequence[int], opt: Sequence[int], max: Sequence[int]) -> None:
        self._shapes[input] = [list(min), list(opt), list(max)]


class IBuilderConfig:
    def __init__(self) -> None:
        self._profiles: list[IOptimizationProfile] = []
        self._flags = {BuilderFlag.TF32}
        self._cache: ITimingCache | None = None
        self._workspace: int | None = None
        self._level: HardwareCompatibilityLevel | None = None

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def set_flag(self, flag: BuilderFlag) -> None:
        self._flags.add(flag)

    def clear_flag(self, flag: BuilderFlag) -> None:
        self._flags.discard(flag)

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        self._workspace = pool_size

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        return ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache:
        assert self._cache is not None
        return self._cache

    @property
    def hardware_compatibility_level(self) -> HardwareCompatibilityLevel | None:
        return self._level

    @hardware_compatibility_level.setter
    def hardware_compatibility_level(self, level: HardwareCompatibilityLevel) -> None:
        self._level = level


class ITensor:
    def __init__(self, value: onnx.ValueInfoProto) -> None:
        self._value = value

    @property
    def name(self) -> str:
        return self._value.name

    @property
    def shape(self) -> tuple[int, ...]:
        dims = self._value.type.tensor_type.shape.dim
        return tuple(-1 if d.dim_param else d.dim_value for d in dims)


class INetworkDefinition:
    def __init__(self) -> None:
        self._model: onnx.ModelProto | None = None

    @property
    def num_inputs(self) -> int:
        assert self._model is not None
        return len(self._model.graph.input)

    def get_input(self, index: int) -> ITensor:
        assert self._model is not None
        return ITensor(self._model.graph.input[index])


class OnnxParser:
    """Refuses operators of other domains, as TensorRT does."""

    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network, self._errors = network, list[str]()

    def parse(self, model: bytes, path: str | None = None) -> bool:
        proto = onnx.load_from_string(model)
        self._errors = [f"no importer for {n.domain}::{n.op_type}" for n in proto.graph.node if n.domain]
        self._network._model = proto
        return not self._errors

    def supports_model_v2(self, model: bytes, path: str | None = None) -> bool:
        return self.parse(model)

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> str:
        return self._errors[index]


refuse_to_build: list[str] = []
"""Put a message in and the builder gives no plan, having said it."""
built: list[IBuilderConfig] = []
"""Configurations of the plans built, oldest first."""


class Builder:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        assert flags == 1 << int(NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        return INetworkDefinition()

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None:
        self._logger.log(ILogger.Severity.INFO, "building")
        for message in refuse_to_build:
            self._logger.log(ILogger.Severity.ERROR, message)
        if refuse_to_build:
            return None
        assert network._model is not None
        built.append(config)
        stripped = BuilderFlag.STRIP_PLAN in config._flags
        header = {"version": __version__, "stripped": stripped, "profiles": [p._shapes for p in config._profiles]}
        return IHostMemory(json.dumps(header).encode() + b"\0" + network._model.SerializeToString())


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self._logger, self._host_code = logger, False

    @property
    def engine_host_code_allowed(self) -> bool:
        return self._host_code

    @engine_host_code_allowed.setter
    def engine_host_code_allowed(self, allowed: bool) -> None:
        self._host_code = allowed

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        header, _, model = serialized_engine.partition(b"\0")
        try:
            return ICudaEngine(json.loads(header), model)
        except ValueError:
            self._logger.log(ILogger.Severity.ERROR, "magic tag does not match")
            return None


class ICudaEngine:
    def __init__(self, header: dict[str, Any], model: bytes) -> None:
        self._profiles, self._has_weights = header["profiles"], not header["stripped"]
        self._graph = onnx.load_from_string(model).graph
        self._values = {v.name: v for v in (*self._graph.input, *self._graph.output)}
        self._session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
        self._inferred: dict[Any, Mapping[str, tuple[int, ...]]] = {}

    @property
    def num_io_tensors(self) -> int:
        return len(self._values)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    @property
    def device_memory_size_v2(self) -> int:
        return SCRATCH_BYTES

    def get_tensor_name(self, index: int) -> str:
        return list(self._values)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        is_input = any(v.name == name for v in self._graph.input)
        return TensorIOMode.INPUT if is_input else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return ONNX_TYPES[self._values[name].type.tensor_type.elem_type]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
        shapes: list[list[int]] = self._profiles[profile_index][name]
        return shapes

    def _output_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the outputs, as TensorRT itself infers them; here by a run."""
        key = tuple(shapes.items())
        if key not in self._inferred:
            zeros = {name: np.zeros(shape, NUMPY[self.get_tensor_dtype(name)]) for name, shape in shapes.items()}
            found = self._session.run(None, zeros)
            names = (value.name for value in self._graph.output)
            self._inferred[key] = {name: array.shape for name, array in zip(names, found, strict=True)}
        return self._inferred[key]

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(self, runtime_config: IRuntimeConfig) -> IExecutionContext:
        assert runtime_config._strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        return IExecutionContext(self)


class IRuntimeConfig:
    def __init__(self) -> None:
        self._strategy: ExecutionContextAllocationStrategy | None = None

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self._strategy = strategy


launches: list[str] = []
"""One entry a launch: the shapes it ran with."""


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine, self._profile, self._scratch = engine, -1, 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= SCRATCH_BYTES
        self._scratch = memory

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._profile = profile_index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self._engine.get_tensor_profile_shape(name, self._profile)
        self._shapes[name] = tuple(shape)
        return all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._shapes:
            return self._shapes[name]
        return self._engine._output_shapes(self._shapes)[name]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        if not (self._engine._has_weights and self._scratch):
            return False
        launches.append(str(self._shapes))
        feeds = {name: self._memory(name) for name in self._shapes}
        found = self._engine._session.run(None, {k: v.copy() for k, v in feeds.items()})
        for value, array in zip(self._engine._graph.output, found, strict=True):
            np.copyto(self._memory(value.name), array)
        return True

    def _memory(self, name: str) -> np.ndarray:
        shape, dtype = self.get_tensor_shape(name), NUMPY[self._engine.get_tensor_dtype(name)]
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        buffer = (ctypes.c_char * size).from_address(self._addresses[name])
        return np.frombuffer(buffer, dtype=dtype).reshape(shape)


class Refitter:
    def __init__(self, engine: ICudaEngine, logger: ILogger) -> None:
        self._engine = engine

    def refit_cuda_engine(self) -> bool:
        return self._engine._has_weights


class OnnxParserRefitter:
    def __init__(self, refitter: Refitter, logger: ILogger) -> None:
        self._refitter = refitter

    def refit_from_file(self, model: str) -> bool:
        onnx.checker.check_model(model)
        self._refitter._engine._has_weights = True
        return True


def reset() -> None:
    """Forget what was built and said."""
    for remembered in (refuse_to_build, built, launches):
        remembered.clear()
