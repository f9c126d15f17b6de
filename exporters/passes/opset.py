"""A network in a newer version of ONNX's operator set."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from optin_deploy.errors import BadInput
from optin_deploy.exporters.passes.schemas import signature
from optin_deploy.network.graph import Network
from optin_deploy.network.normal import FOREIGN, normalise, reason
from optin_deploy.network.read_torch import quiet


def raised(network: Network, opset: int, precision: str) -> Network:
    """Return a network whose operators are of this version or a newer one, which a precision needs.

    Only the number changes where every operator means the same in both; else onnxscript's converter is asked, and after
    it that of ONNX.
    Raises: BadInput: neither can convert it.
    """
    now = network.model.graph.opset_imports.get("", opset)
    if now >= opset:
        return network
    model = network.model.clone()
    differs = next((node for node in model.graph.all_nodes() if not _same(node, now, opset)), None)
    if differs is None:
        model.graph.opset_imports[""] = opset
        return Network(model, network.source)
    try:
        _convert(model, opset)
        normalise(model, network.source)
    except (*FOREIGN, ir.passes.PassError) as err:
        raise BadInput(_refusal(network, differs, (now, opset), precision, reason(err))) from err
    if model.graph.opset_imports.get("", 0) != opset:
        raise BadInput(_refusal(network, differs, (now, opset), precision, "no converter knows how"))
    return Network(model, network.source)


def _refusal(network: Network, node: ir.Node, versions: tuple[int, int], precision: str, why: str) -> str:
    now, opset = versions
    return (
        f"--precision {precision} needs opset {opset}; {network.source} is of opset {now}, and its {node.op_type} "
        f"means another thing in the newer one: {why}. Use --precision fp32, or export the model in opset {opset}."
    )


def _convert(model: ir.Model, opset: int) -> None:
    from onnxscript.version_converter import ConvertVersionPass

    with quiet():  # what it cannot convert is told by the version that it leaves
        ConvertVersionPass(opset, fallback=True)(model)


def _same(node: ir.Node, now: int, opset: int) -> bool:
    """Does a node mean the same in two versions? Newer ones may take more types, and have more defaults."""
    if node.domain not in ("", "ai.onnx"):
        return True
    if onnx.defs.get_schema(node.op_type, now).since_version == onnx.defs.get_schema(node.op_type, opset).since_version:
        return True
    old, new = (signature(node, {"": version}) for version in (now, opset))
    places = [(each.name, each.repeated) for each in old.inputs] == [
        (each.name, each.repeated) for each in new.inputs[: len(old.inputs)]
    ]
    kept = all(new.defaults.get(name, ...) == default for name, default in old.defaults.items())
    added = all(default is not None for name, default in new.defaults.items() if name not in old.defaults)
    return places and kept and added and len(old.outputs) == len(new.outputs)
