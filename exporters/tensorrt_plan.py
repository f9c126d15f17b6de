"""Build a serialised TensorRT plan from an ONNX file: one strongly typed path for TensorRT 10.12+, 11 and RTX.

Precision comes from the types in the ONNX graph, not from builder flags. The module that is given as `trt` may be
`tensorrt` or TensorRT-RTX's bindings: the names used here exist in all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optin_deploy.errors import BadInput, CannotBuildHere
from optin_deploy.exporters.options import EngineOptions
from optin_deploy.exporters.profiles import Profile
from optin_deploy.files.storage import atomic_file
from optin_deploy.runtimes.tensorrt_bindings import EngineLog

COMPATIBLE = ("version", "hardware")
WEIGHTS = ("fixed", "refittable", "stripped")
SHOWN_LINES = 5
"""Last warnings and errors of the builder that go into our own error."""


@dataclass(frozen=True)
class PlanOptions(EngineOptions):
    """What the builder is told beyond the graph."""

    profiles: tuple[Profile, ...] = (Profile(),)
    workspace_bytes: int | None = None
    """Scratch memory that kernels may use; None: all of the device's."""
    compatible: tuple[str, ...] = ()
    """`version`: loads in later versions of the same major version; `hardware`: runs on every GPU from Ampere on."""
    weights: str = "fixed"
    """`refittable`: can be exchanged without another build; `stripped`: not in the plan, put in from the ONNX file
    when it is loaded."""
    timing_cache: Path | None = None
    """Measured kernel times, read and extended by every build; None: beside the engine."""

    def __post_init__(self) -> None:
        unknown = set(self.compatible) - set(COMPATIBLE)
        if unknown:
            raise BadInput(f"unknown --compatible {', '.join(sorted(unknown))}; possible: {', '.join(COMPATIBLE)}.")
        for option, given in (("--compatible", self.compatible), ("--profile", self.profiles)):
            twice = [str(each) for each in given if given.count(each) > 1]
            if twice:
                raise BadInput(f"{option} {twice[0]} is given twice. Give each once.")
        if self.weights not in WEIGHTS:
            raise BadInput(f"unknown --weights {self.weights!r}; possible: {', '.join(WEIGHTS)}.")

    def sizes(self) -> tuple[Profile, ...]:
        """See `EngineOptions.sizes`."""
        return self.profiles

    def settings(self) -> dict[str, str]:
        """See `EngineOptions.settings`."""
        return {
            "profiles": "; ".join(map(str, self.profiles)),
            "workspace_bytes": str(self.workspace_bytes or "all"),
            "compatible": " ".join(sorted(self.compatible)) or "no",
            "weights": self.weights,
        }


def build_engine(
    trt: Any,
    source: Path,
    options: PlanOptions,
    *,
    log: EngineLog,
    tf32: bool = False,
    timing_cache: Path | None = None,
    configure: Callable[[Any], None] | None = None,
) -> bytes:
    """Parse an ONNX file and build its plan.

    Args:
        tf32: may float32 products be rounded to TF32?
        timing_cache: file of measured kernel times, read if it fits this device and written back.
        configure: sets what only this kind of TensorRT has.
    Raises: CannotBuildHere: the parser or the builder refused, with what they said.
    """
    logger = log.to(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(source.read_bytes(), str(source)):
        said = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise CannotBuildHere(f"{log.name}'s parser refused {source.name}: {said}. See `optin doctor {source.parent}`.")
    config = builder.create_builder_config()
    for profile in options.profiles:
        _add_profile(builder, config, network, profile)
    _set_options(trt, config, options, tf32=tf32)
    if configure is not None:
        configure(config)
    if timing_cache is not None:
        _use_timings(config, timing_cache, log)
    plan = builder.build_serialized_network(network, config)
    if plan is None:  # a failed build raises nothing
        said = " ".join(log.problems[-SHOWN_LINES:]) or "it gave no reason"
        raise CannotBuildHere(f"{log.name}'s builder gave no plan for {source.name}: {said}")
    measured = None if timing_cache is None else config.get_timing_cache()
    if timing_cache is not None and measured is not None:
        with atomic_file(timing_cache) as temporary:
            temporary.write_bytes(bytes(measured.serialize()))
    return bytes(plan)


def _use_timings(config: Any, file: Path, log: EngineLog) -> None:
    """Attach known kernel times; those of another device or version are refused, and measured anew."""
    known = config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
    if known is None or not config.set_timing_cache(known, False):
        log.lines.append(f"WARNING: {file.name} is of another device or version; kernels are timed anew")
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _add_profile(builder: Any, config: Any, network: Any, profile: Profile) -> None:
    shapes = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        entry = network.get_input(index)
        shapes.set_shape(entry.name, *profile.sized(entry.shape))
    config.add_optimization_profile(shapes)


def _set_options(trt: Any, config: Any, options: PlanOptions, *, tf32: bool) -> None:
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    flags = {
        trt.BuilderFlag.TF32: tf32,  # on by default
        trt.BuilderFlag.VERSION_COMPATIBLE: "version" in options.compatible,
        trt.BuilderFlag.REFIT: options.weights == "refittable",
        trt.BuilderFlag.STRIP_PLAN: options.weights == "stripped",
    }
    for flag, wanted in flags.items():
        if wanted:
            config.set_flag(flag)
        else:
            config.clear_flag(flag)
    if "hardware" in options.compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
