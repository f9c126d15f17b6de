"""Ask TensorRT's own ONNX parser, where there is one, which nodes of a graph it refuses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optin_deploy.common.formatting import listed, named
from optin_deploy.doctor.findings import Finding
from optin_deploy.errors import MissingDependency
from optin_deploy.runtimes.tensorrt_bindings import MODULES, EngineLog, import_tensorrt


@dataclass(frozen=True)
class Parser:
    """TensorRT or TensorRT-RTX, which share the parser."""

    trt: Any
    """The module of the bindings."""
    name: str
    """Name with the version, for people."""


def find_parser() -> Parser | None:
    """TensorRT if it imports, else TensorRT-RTX, else None."""
    for engine, (_, name) in MODULES.items():
        try:
            trt = import_tensorrt(engine)
        except MissingDependency:
            continue
        return Parser(trt, f"{name} {trt.__version__}")
    return None


def check_support(parser: Parser, path: Path, nodes: int, subject: str) -> list[Finding] | None:
    """What the parser says of a file whose external data, if any, was found to be in order.

    Args: nodes: in the graph, for the text.
    Returns: None: the parser cannot be started here (the full TensorRT wants a GPU for that).
    """
    trt, log = parser.trt, EngineLog(parser.name)
    try:
        logger = log.to(trt)
        network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        onnx_parser = trt.OnnxParser(network, logger)
    except (TypeError, RuntimeError):  # how pybind11 tells that a constructor gave nothing
        return None
    if onnx_parser.supports_model_v2(path.read_bytes(), str(path)):
        return [Finding("ok", subject, f"the parser of {parser.name} takes all {nodes} nodes.")]
    errors = [onnx_parser.get_error(i) for i in range(onnx_parser.num_errors)]
    said = listed((_said(error) for error in errors), 3) or "the graph, without a reason"
    text = f"the parser of {parser.name} refuses {said}."
    return [Finding("problem", subject, text, "export again with `optin build`, or use engine onnx for this file")]


def _said(error: Any) -> str:
    """One error of the parser: the node, and why. Its text is `false` where the code says all there is."""
    node = f"{error.node_operator()} {named(error.node_name())}" if error.node_operator() else "the graph"
    why = error.code().name if error.desc() in ("", "false") else str(error.desc()).replace("\n", " ")
    return f"{node} ({why})"
