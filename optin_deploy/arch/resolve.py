"""Row + model -> ModelLayout, with every path and size checked against the real modules."""

from __future__ import annotations

from typing import Any

from torch import nn

from optin_deploy.arch.spec import ArchSpec
from optin_deploy.arch.table import TABLE
from optin_deploy.arguments import checked
from optin_deploy.errors import BadInput, UnknownArchitecture
from optin_deploy.guard import check_model
from optin_deploy.layout import Branch, LayerSpec, ModelLayout
from optin_deploy.rewrite.slices import KINDS, Projection, projection_at
from optin_deploy.rewrite.torch import REWRITTEN

QKV = 3
"""Queries, keys and values."""


def resolve(model: nn.Module, spec: ArchSpec | None = None) -> ModelLayout:
    """Find the prunable weights of a transformers model.

    Args:
        model: a PreTrainedModel, dense (not yet pruned).
        spec: an own row; default: the first row of the table that fits.
    Raises:
        UnknownArchitecture: no row fits; says how to give an own one.
        BadInput: already pruned, a path is missing, two layers share weights, or sizes do not agree.
    """
    check_model(model)
    spec = checked(spec, ArchSpec, "spec")
    if hasattr(model, REWRITTEN):
        raise BadInput(f"this {type(model).__name__} is already pruned; start from the dense model.")
    base, prefix = _base_model(model)
    spec = spec or _row_for(model, base)
    try:
        blocks: Any = base.get_submodule(spec.blocks)
    except AttributeError as err:
        raise BadInput(f"row {spec.name!r}: {type(model).__name__} has no module {prefix + spec.blocks!r}.") from err
    if not isinstance(blocks, (nn.ModuleList, nn.Sequential)):
        raise BadInput(f"row {spec.name!r}: {prefix + spec.blocks!r} is a {type(blocks).__name__}, not a ModuleList.")
    said: Any = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    if spec in TABLE and isinstance(said, int) and said != len(blocks):
        raise BadInput(
            f"this {type(model).__name__} has {len(blocks)} blocks, but its config says num_hidden_layers = {said}: as "
            "it would be saved, it could not be loaded. Set the config's to the blocks that there are."
        )
    layers = tuple(_layer(model, spec, f"{prefix}{spec.blocks}.{i}") for i in range(len(blocks)))
    _refuse_shared_weights(model, layers)
    return ModelLayout(arch=spec.name, model_class=type(model).__name__, layers=layers)


def served(model: nn.Module) -> bool:
    """Whether a row of the table is for models of this type."""
    return getattr(getattr(model, "config", None), "model_type", None) in supported_model_types()


def supported_model_types() -> tuple[str, ...]:
    """All `config.model_type` values that a row serves, sorted."""
    return tuple(sorted(set().union(*(row.model_types for row in TABLE))))


def _base_model(model: nn.Module) -> tuple[nn.Module, str]:
    prefix = getattr(model, "base_model_prefix", "")
    base = getattr(model, prefix, None) if prefix else None
    return (base, f"{prefix}.") if isinstance(base, nn.Module) else (model, "")


def _row_for(model: nn.Module, base: nn.Module) -> ArchSpec:
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    for row in TABLE:
        if model_type in row.model_types and _fits(base, row):
            return row
    raise UnknownArchitecture(
        f"no architecture row fits model type {model_type!r} ({type(model).__name__}). "
        f"Supported: {', '.join(supported_model_types())}. For another model write an ArchSpec row "
        "(optin_deploy/arch/table.py shows some) and call optin_deploy.resolve(model, spec=my_row)."
    )


def _fits(base: nn.Module, row: ArchSpec) -> bool:
    try:
        for path in (*row.qkv, row.attn_out, *row.ffn_in, row.ffn_out):
            base.get_submodule(f"{row.blocks}.0.{path}")
    except AttributeError:
        return False
    return True


def _layer(model: nn.Module, spec: ArchSpec, path: str) -> LayerSpec:
    def at(relative: str) -> str:
        return f"{path}.{relative}" if relative else path

    attn_out, ffn_out = (_projection(model, at(p)) for p in (spec.attn_out, spec.ffn_out))
    config: Any = model.config
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int) or heads < 1:
        raise BadInput(f"the config of {type(model).__name__} has num_attention_heads {heads!r}; give 1 or more.")
    head_dim, rest = divmod(attn_out.inputs, heads)
    if rest:
        raise BadInput(f"{at(spec.attn_out)}: width {attn_out.inputs} is not a multiple of {heads} heads.")
    scales = tuple(map(at, spec.layer_scale)) if spec.layer_scale else (None, None)
    if len(spec.qkv) not in (1, QKV):
        raise BadInput(f"row {spec.name!r}: qkv has {len(spec.qkv)} paths; give three, or one that is fused.")
    qkv, ffn_in = (tuple(map(at, paths)) for paths in (spec.qkv, spec.ffn_in))
    attention = Branch(qkv, at(spec.attn_out), at(spec.residual[0]), scales[0], heads, head_dim, spec.split)
    ffn = Branch(ffn_in, at(spec.ffn_out), at(spec.residual[1]), scales[1], ffn_out.inputs, 1)
    _check_inputs(model, attention, QKV // len(qkv))
    _check_inputs(model, ffn, 1)
    if spec.split and getattr(_module(model, at(spec.core)), spec.split, None) != attention.width:
        raise BadInput(
            f"{at(spec.core)} has no {spec.split!r} of {attention.width}; the architecture row does not fit."
        )
    for module in (spec.core, *spec.residual):
        _module(model, at(module))
    for scale in filter(None, scales):
        _parameter(model, scale)
    return LayerSpec(path, attn_out.outputs, at(spec.core), attention, ffn)


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as err:
        raise BadInput(f"{type(model).__name__} has no module {path!r}; the architecture row does not fit.") from err


def _parameter(model: nn.Module, path: str) -> nn.Parameter:
    try:
        return model.get_parameter(path)
    except AttributeError as err:
        raise BadInput(f"{type(model).__name__} has no parameter {path!r}; the architecture row does not fit.") from err


def _projection(model: nn.Module, path: str) -> Projection:
    module = _module(model, path)
    if not isinstance(module, KINDS):
        possible = " and ".join(f"{kind.__module__}.{kind.__name__}" for kind in KINDS)
        raise BadInput(f"{path} is a {type(module).__name__}; only {possible} can be cut.")
    if not isinstance(module.weight, nn.Parameter):
        raise BadInput(
            f"{path}.weight is computed anew in each forward, as torch's parametrizations and pruning masks do. Make "
            "it permanent first (parametrize.remove_parametrizations, prune.remove), or merge it."
        )
    return projection_at(model, path)


def _check_inputs(model: nn.Module, branch: Branch, parts: int) -> None:
    """Args: parts: queries, keys, values in one projection: 3, else 1."""
    width = branch.width * parts
    for path in branch.inputs:
        found = _projection(model, path).outputs
        if found != width:
            raise BadInput(
                f"{path} has {found} outputs, not the {width} that go with {branch.output}. The model is already "
                "pruned or shares key/value heads; start from the dense model."
            )


def _refuse_shared_weights(model: nn.Module, layers: tuple[LayerSpec, ...]) -> None:
    owner: dict[int, str] = {}
    for layer in layers:
        for branch in layer.branches:
            for path in (*branch.inputs, branch.output):
                weight = _projection(model, path).module.weight
                first = owner.setdefault(id(weight), path)
                if first != path:
                    raise BadInput(f"{path} shares its weight with {first}; cutting one would cut both.")
