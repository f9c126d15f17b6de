"""Build an ONNX file ahead of time with TensorRT-RTX, where it is installed: no GPU is needed for that.

It shares the parser and much of the compiler with TensorRT, but is not the same product: what it builds, TensorRT will
most likely build too, and what it refuses, TensorRT will most likely refuse.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from optin_deploy.errors import MissingDependency
from optin_deploy.exporters.profiles import Profile
from optin_deploy.exporters.tensorrt_plan import PlanOptions, build_engine
from optin_deploy.feeds.inputs import longest_text
from optin_deploy.files.storage import read_json
from optin_deploy.runtimes.tensorrt_bindings import MODULES, EngineLog, import_tensorrt


def build_ahead(path: Path, options: PlanOptions | None = None) -> str | None:
    """Build, and throw the engine away.

    Args: options: default: the usual batch sizes and lengths, up to the longest in config.json beside it.
    Returns: what was built; None: TensorRT-RTX is not installed, or nothing says how long the inputs may be.
    Raises: CannotBuildHere: with what the parser or the builder said.
    """
    try:
        trt = import_tensorrt("trt-rtx")
    except MissingDependency:
        return None
    if options is None:
        config = path.with_name("config.json")
        if not config.is_file():
            return None
        options = PlanOptions(profiles=(Profile().up_to(_longest(config)),))
    started = time.perf_counter()
    log = EngineLog(MODULES["trt-rtx"][1])
    plan = build_engine(trt, path, replace(options, compatible=(), weights="fixed"), log=log)
    size_mib, seconds = len(plan) / 2**20, time.perf_counter() - started
    shapes = " and ".join(map(str, options.profiles))
    return f"{log.name} {trt.__version__} builds it ahead of time for {shapes} ({size_mib:.1f} MiB, {seconds:.1f} s)."


def _longest(path: Path) -> int | None:
    data = read_json(path, "Run `optin build` again.")
    known = {"model_type": data.get("model_type"), "pad_token_id": data.get("pad_token_id") or 0}
    positions = data.get("max_position_embeddings")
    if not isinstance(positions, int):
        return None
    return longest_text(SimpleNamespace(max_position_embeddings=positions, **known))
