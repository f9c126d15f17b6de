"""TensorRT-RTX's builder, which needs no GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

Sizes = tuple[int, ...]


def builds(path: Path, profile: Mapping[str, tuple[Sizes, Sizes, Sizes]]) -> bool:
    """Whether an ONNX file becomes an engine for these smallest, usual and largest sizes of its inputs."""
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    log = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(log)
    definition = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(definition, log)
    assert parser.parse(path.read_bytes()), [parser.get_error(n) for n in range(parser.num_errors)]
    config, sizes = builder.create_builder_config(), builder.create_optimization_profile()
    for name, shapes in profile.items():
        sizes.set_shape(name, *shapes)
    config.add_optimization_profile(sizes)
    return builder.build_serialized_network(definition, config) is not None
